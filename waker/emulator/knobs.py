"""Every number and every reading that the platform leaves open, named, with the less kind one as the default.

Sections in brackets are those of the platform facts this emulator follows: what is documented has one value; what is
undocumented, or where sources disagree, is a knob. Durations are the platform's own and are multiplied by `time_scale`;
what the user sets (kill timeout, restart budget) is not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

__all__ = ["Knob", "Knobs", "Span"]

Span = tuple[float, float]  # seconds, drawn evenly between the two


def _knob(default: Any, doc: str, *choices: str) -> Any:
    return field(default=default, metadata={"doc": doc, "choices": choices})


@dataclass(frozen=True, slots=True)
class Knob:
    """One knob as a program or a person sees it."""

    name: str
    value: Any
    choices: tuple[str, ...]
    doc: str


@dataclass(frozen=True, slots=True)
class Knobs:
    """How the platform behaves where the sources do not settle it."""

    time_scale: float = _knob(1.0, "multiplies the platform's own delays; 0.1 makes tests quick, 1 is the real thing")

    # Which machine gets a request
    soft_limit_reading: str = _knob(
        "above",
        "a machine is full above its soft limit, or at it [1.3, 2: start rule says above, load balancing says at]",
        "above",
        "at-or-above",
    )
    start_threshold: str = _knob(
        "soft-limit",
        "which limit all running machines must have reached before a stopped one is started"
        " [1.3: the start rule says soft, the Machines API page says hard]",
        "soft-limit",
        "hard-limit",
    )
    autostart_reach: str = _knob(
        "every-machine",
        "whether a second machine is started while one runs [1.3: newer pages say yes, an older staff answer no]",
        "every-machine",
        "zero-to-one",
    )
    balance: str = _knob(
        "bands",
        "the choice among machines that are not full [2: load is seen in three bands; or exactly; or round-robin]",
        "bands",
        "least-loaded",
        "round-robin",
    )

    # How long the platform takes
    boot_s: Span = _knob((0.48, 1.3), "from the accepted start to the running VM [9, observed]")
    gossip_s: Span = _knob((0.2, 1.0), "until the proxy has learned of a start or an exit [1.3: a short delay]")
    exit_settle_s: Span = _knob(
        (1.0, 3.0), "after an exit the state reads stopped, but a start is refused with 412 [1.6: a window of 1 to 3 s]"
    )
    restart_delay_s: float = _knob(0.0, "what the restart policy waits beyond the settling [1.4: undocumented]")
    wake_timeout_s: float = _knob(10.0, "how long a request waits for a machine to start, PM03 [1.3: undocumented]")
    connect_retry_s: float = _knob(0.55, "between two connects to a machine that does not listen yet [1.5, observed]")
    connect_attempts: int = _knob(15, "connects before the proxy gives a machine up, PM05 [1.5, observed]")
    connect_timeout_s: float = _knob(
        1.0, "for one connect that is neither accepted nor refused, PC05 [1.5: undocumented]"
    )
    candidate_attempts: int = _knob(40, "machines tried for one request, PR03 [1.5: 90 documented, 40 and 1 observed]")
    start_attempts: int = _knob(
        3, "rounds over all machines whose start was refused before the request fails, PM07/PM01 [1.6: undocumented]"
    )
    start_rate_per_s: float = _knob(1.0, "starts per second and machine, by whomever [6.8]")
    start_burst: int = _knob(3, "starts at once and machine [6.8]")
    recently_stopped_s: float = _knob(
        300.0, "a machine that stopped this recently hands its request to another if there is one, PM11 [1.6]"
    )
    queue_timeout_s: float = _knob(5.0, "how long a request waits when all are at the hard limit [1.5: if prolonged]")
    queue_size: int = _knob(1000, "requests that may wait at the hard limit at once [undocumented]")
    max_connections: int = _knob(2048, "concurrent requests at one edge for one app, PL01 [1.5]")
    pool_idle_s: float = _knob(4.0, "how long a connection to a machine is kept for the next request [1.5]")
    idle_timeout_s: float = _knob(60.0, "silence after which the proxy gives up on an answer [1.5: 60 s or never]")
    on_reset: str = _knob(
        "502",
        "a machine that resets a request before answering: 502 to the caller, or another try [1.7: PC03]",
        "502",
        "retry",
    )

    # fly-replay and forced routing
    force_instance_wakes: bool = _knob(
        False, "whether fly-force-instance-id starts a stopped machine [3: undocumented]"
    )
    elsewhere_starts: bool = _knob(False, "whether fly-replay elsewhere starts a stopped machine [3: undocumented]")
    replay_max_bytes: int = _knob(1_000_000, "the largest request that can be sent again [1.5: 1 MB or 10 MB]")
    replay_max_hops: int = _knob(10, "fly-replay hops of one request, PA02 [1.7]")
    replay_src_separator: str = _knob(";", "between the fields of fly-replay-src [3: the pages disagree]", ";", ",")

    # Stopping, and machines with several processes
    default_kill_signal: str = _knob(
        "SIGINT", "the stop signal if none is configured [5.1: the pages disagree]", "SIGINT", "SIGTERM"
    )
    after_kill_timeout: str = _knob(
        "SIGKILL", "what is sent when the kill timeout is over [5.1: the pages disagree]", "SIGKILL", "SIGTERM"
    )
    process_failure: str = _knob(
        "nothing",
        "when one of a machine's `processes` exits non-zero [6.3.2: undocumented]",
        "nothing",
        "restart-process",
        "restart-machine",
        "stop",
    )

    # How long the faults last
    slow_start_s: float = _knob(8.0, "what the fault slow_start adds to a boot")
    slow_answer_s: float = _knob(2.0, "what the fault slow_answer adds to an answer")
    late_gossip_s: float = _knob(5.0, "how much later the fault late_gossip lets the proxy learn of an exit")
    kill_machine_s: Span = _knob((0.0, 2.0), "when, after a start, the fault kill_machine strikes")

    def __post_init__(self) -> None:
        errors = [error for knob in self for error in _errors(knob)]
        if errors:
            raise ValueError("; ".join(errors))

    def __iter__(self) -> Iterator[Knob]:
        for each in fields(self):
            yield Knob(each.name, getattr(self, each.name), each.metadata["choices"], each.metadata["doc"])

    def changed(self, settings: Mapping[str, str]) -> "Knobs":
        """A copy with *settings* applied as a command line gives them; ValueError lists everything that is wrong."""
        known = {knob.name: knob for knob in self}
        values, errors = {}, []
        for name, text in settings.items():
            if name not in known:
                errors.append(f"no knob is called {name!r}; see --list-knobs")
                continue
            try:
                values[name] = _parsed(known[name].value, text)
            except ValueError:
                errors.append(f"{name}={text!r}: expected something like {shown(known[name].value)}")
        if errors:
            raise ValueError("; ".join(errors))
        return replace(self, **values)


def shown(value: Any) -> str:
    """*value* the way a command line takes it."""
    if isinstance(value, tuple):
        return f"{value[0]}..{value[1]}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parsed(default: Any, text: str) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if isinstance(default, tuple):
        low, dots, high = text.partition("..")
        return (float(low), float(high if dots else low))
    return type(default)(text)


def _errors(knob: Knob) -> Iterator[str]:
    value = knob.value
    if knob.choices and value not in knob.choices:
        yield f"{knob.name}={value!r}: expected one of {', '.join(knob.choices)}"
    elif isinstance(value, tuple):
        if not 0 <= value[0] <= value[1] < float("inf"):
            yield f"{knob.name}={shown(value)}: expected two durations in order, like 0.2..1.0"
    elif isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < float("inf"):
        yield f"{knob.name}={value}: expected a number that is not negative"
