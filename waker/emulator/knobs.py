"""Every number and every reading that the platform leaves open, named, with the less kind one as the default.

What is documented has one value; what is undocumented, or where sources disagree, is a knob that says where it comes
from: a page of Fly's documentation by its path, or what others have observed. `time_scale` makes the platform's own
delays shorter and its rates higher; its patience, and what the user sets (kill timeout, restart budget), stay.
"""

# ruff: noqa: RUF009 - _knob is dataclasses.field with less to write

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

__all__ = ["Knob", "Knobs", "Span", "shown"]

Span = tuple[float, float]  # seconds, drawn evenly between the two

START_RULE = "reference/fly-proxy-autostop-autostart"
BALANCING = "reference/load-balancing"
CONCURRENCY = "apps/concurrency"
CODES = "monitoring/error-codes"
REPLAY = "networking/dynamic-request-routing"
API = "machines/api/machines-resource"
RATES = "machines/api/working-with-machines-api"
CONFIG = "reference/configuration"
LONG_TASKS = "blueprints/long-running-tasks"
OBSERVED = "observed by others"
UNDOCUMENTED = "undocumented"


def _knob(default: Any, doc: str, source: str, *choices: str) -> Any:  # as dataclasses.field
    return field(default=default, metadata={"doc": doc, "source": source, "choices": choices})


@dataclass(frozen=True, slots=True)
class Knob:
    """One knob as a program or a person sees it."""

    name: str
    value: Any
    choices: tuple[str, ...]
    doc: str
    source: str


@dataclass(frozen=True, slots=True)
class Knobs:
    """How the platform behaves where the sources do not settle it."""

    time_scale: float = _knob(1.0, "multiplies the platform's own delays, not its patience; 0.05 suits tests", "ours")

    # Which machine gets a request
    soft_limit_reading: str = _knob(
        "above",
        "whether a machine is full above its soft limit or at it",
        f"{START_RULE} says above, {BALANCING} says at or above",
        "above",
        "at-or-above",
    )
    start_threshold: str = _knob(
        "soft-limit",
        "the limit that all running machines must have reached before a stopped one is started",
        f"{START_RULE} says soft, {API} says hard",
        "soft-limit",
        "hard-limit",
    )
    autostart_reach: str = _knob(
        "every-machine",
        "whether a second machine is started while one runs",
        f"{START_RULE} says yes, an older answer of Fly's staff (community 10911) says only the first",
        "every-machine",
        "zero-to-one",
    )
    balance: str = _knob(
        "bands",
        "the choice among machines that are not full: at random, the least loaded, or in turn",
        f"{CONCURRENCY} says load is seen in three bands, {BALANCING} least loaded, a blueprint round-robin",
        "bands",
        "least-loaded",
        "round-robin",
    )

    # How long the platform takes
    boot_s: Span = _knob((0.48, 1.3), "from the accepted start to the running VM", OBSERVED)
    gossip_s: Span = _knob(
        (0.2, 1.0), "until the proxy has learned of a start or an exit", f"{START_RULE}: a short delay"
    )
    exit_settle_s: Span = _knob(
        (1.0, 3.0), "after an exit: the state reads stopped, and a start is refused with 412, PM07", OBSERVED
    )
    restart_delay_s: float = _knob(0.0, "what the restart policy waits beyond the settling", UNDOCUMENTED)
    wake_timeout_s: float = _knob(10.0, "how long a request waits for a machine to start, PM03", UNDOCUMENTED)
    connect_retry_s: float = _knob(0.55, "between two connects to a machine that does not listen yet", OBSERVED)
    connect_attempts: int = _knob(15, "connects before the proxy gives a machine up, PM05", OBSERVED)
    connect_timeout_s: float = _knob(1.0, "for a connect that is neither accepted nor refused", UNDOCUMENTED)
    candidate_attempts: int = _knob(
        40, "machines tried for one request, PR03", f"{CODES} says 90; 40 and 1 were observed"
    )
    start_attempts: int = _knob(
        3, "rounds over all machines that refused to start, before the request fails with PM07 or PM01", UNDOCUMENTED
    )
    start_rate_per_s: float = _knob(1.0, "starts of one machine in a second, by whomever, PM01", RATES)
    start_burst: int = _knob(3, "starts of one machine at once, PM01", RATES)
    recently_stopped_s: float = _knob(
        300.0, "a machine that stopped this recently hands its request to another if there is one, PM11", CODES
    )
    queue_timeout_s: float = _knob(
        5.0, "how long a request waits when all are at the hard limit", f"{BALANCING}: prolonged"
    )
    queue_size: int = _knob(1000, "requests that may wait at the hard limit at once", UNDOCUMENTED)
    max_connections: int = _knob(2048, "concurrent requests at one edge for one app, PL01", "community 15160")
    pool_idle_s: float = _knob(4.0, "how long a connection to a machine is kept for the next request", BALANCING)
    idle_timeout_s: float = _knob(
        60.0, "silence after which the proxy gives up on an answer", "60 s were observed; community 15160 says never"
    )
    on_reset: str = _knob(
        "502", "a machine that resets a request before answering it, PC03", UNDOCUMENTED, "502", "retry"
    )

    # fly-replay and forced routing
    force_instance_wakes: bool = _knob(False, "whether fly-force-instance-id starts a stopped machine", UNDOCUMENTED)
    elsewhere_starts: bool = _knob(False, "whether fly-replay elsewhere starts a stopped machine", UNDOCUMENTED)
    replay_max_bytes: int = _knob(
        1_000_000, "the largest request that can be sent again, PA01", f"{REPLAY} says 1 MB, {CODES} 10 MB"
    )
    replay_max_hops: int = _knob(10, "fly-replay hops of one request, PA02", CODES)
    replay_src_separator: str = _knob(
        ";", "between the fields of fly-replay-src", f"{REPLAY} and the user-machines guide disagree", ";", ","
    )

    # Stopping, and machines with several processes
    default_kill_signal: str = _knob(
        "SIGINT", "the stop signal if none is configured", f"{CONFIG} and {LONG_TASKS} disagree", "SIGINT", "SIGTERM"
    )
    after_kill_timeout: str = _knob(
        "SIGKILL",
        "what is sent when the kill timeout is over",
        f"{LONG_TASKS} and {CONFIG} disagree",
        "SIGKILL",
        "SIGTERM",
    )
    process_failure: str = _knob(
        "nothing",
        "what follows when one of a machine's `processes` exits non-zero",
        UNDOCUMENTED,
        "nothing",
        "restart-process",
        "restart-machine",
        "stop",
    )

    # The Machines API
    api_rate_per_s: float = _knob(1.0, "requests for one action on one machine or app in a second; 429 beyond", RATES)
    api_burst: int = _knob(3, "requests for one action on one machine or app at once", RATES)
    api_get_rate_per_s: float = _knob(5.0, "the same for getting a machine", RATES)
    api_get_burst: int = _knob(10, "the same for getting a machine", RATES)
    api_app_deletes_per_min: int = _knob(100, "apps that may be deleted in a minute", RATES)
    prepare_s: Span = _knob(
        (3.0, 12.0),
        "from a create to the start of its first boot; a start is refused until then",
        "machines/overview: low double-digit seconds; a start 6 s after a create was refused",
    )
    destroy_s: Span = _knob((0.1, 0.5), "how long a machine is `destroying`", UNDOCUMENTED)
    destroyed_shown_s: float = _knob(
        172_800.0, "how long a destroyed machine can be got", "cron-manager's source: 48 h"
    )
    start_when_started: str = _knob(
        "refused",
        "a start through the API of a machine that is up: 412, or 200",
        "blueprints advise to call it and to ignore the error",
        "refused",
        "accepted",
    )
    wait_stopped_needs_version: bool = _knob(
        False,
        "whether waiting for `stopped` without version or instance_id is refused with 400",
        "machines-resource and Kilo-Org/cloud#297 say yes; flyctl never sends one and works",
    )
    wait_max_s: int = _knob(
        60, "the longest wait that may be asked for; 400 beyond", "machines-resource; fly-go clamps"
    )
    lease_ttl_s: int = _knob(13, "how long a lease is held that was asked for without a ttl", UNDOCUMENTED)
    lease_envelope: bool = _knob(
        True,
        "whether a lease comes as {status, data} or bare",
        "machines-resource and fly-go say enveloped, the OpenAPI file bare",
    )
    exit_event_in: str = _knob(
        "request",
        "where an exit event's `request` holds its exit_event: at once, in MonitorEvent, or in both",
        "machines/_get.erb; fly-go prefers MonitorEvent where it is present",
        "request",
        "MonitorEvent",
        "both",
    )
    exit_event_omits_zeros: bool = _knob(
        False, "whether zeros and falses are left out of an exit event", "fly-go's own JSON does"
    )
    exited_at: str = _knob(
        "rfc3339",
        "how an exit event writes its time",
        "machines/_get.erb (2023) shows milliseconds, fly-go reads a time string",
        "rfc3339",
        "milliseconds",
    )
    autostop_in_answers: str = _knob(
        "boolean",
        "how answers write `autostop`: false and true for off and stop, or the words",
        "the OpenAPI file's description and its schema disagree",
        "boolean",
        "string",
    )
    autostart_default: bool = _knob(
        False, "a service without `autostart`", "machines-resource says false, fly.toml's reference true"
    )
    no_capacity_status: int = _knob(
        412, "a create in a region without capacity", "Kilo-Org/cloud#412 saw 412, #787 400; the docs' table has 422"
    )
    unknown_image_status: int = _knob(422, "a create whose image cannot be found", UNDOCUMENTED)
    full_regions: str = _knob("", "regions without capacity, with commas between: creates and starts fail", "ours")
    schedule_jitter: float = _knob(
        0.1, "how far a scheduled start may be off, as a part of its interval", "fly-machine-run: approximately"
    )

    # How long the faults last
    slow_start_s: float = _knob(8.0, "what the fault slow_start adds to a boot", "ours")
    slow_answer_s: float = _knob(2.0, "what the fault slow_answer adds to an answer", "ours")
    late_gossip_s: float = _knob(5.0, "how much later the fault late_gossip lets the proxy learn of an exit", "ours")
    kill_machine_s: Span = _knob(
        (0.0, 2.0), "when, after a start, the faults kill_machine and out_of_memory strike", "ours"
    )
    api_slow_s: float = _knob(5.0, "what the fault api_slow_answer adds to an answer of the Machines API", "ours")
    api_create_late_s: float = _knob(
        3.0, "how long after its connection broke the fault api_create_late creates the machine", "ours"
    )
    lease_held_s: float = _knob(10.0, "how long the fault lease_held holds a machine's lease", "ours")

    def __post_init__(self) -> None:
        errors = [error for knob in self for error in _errors(knob)]
        if not self.time_scale > 0:
            errors.append(f"time_scale={self.time_scale}: expected a number above 0")
        if errors:
            raise ValueError("; ".join(errors))

    def __iter__(self) -> Iterator[Knob]:
        for each in fields(self):
            yield Knob(
                each.name,
                getattr(self, each.name),
                each.metadata["choices"],
                each.metadata["doc"],
                each.metadata["source"],
            )

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
                errors.extend(_errors(replace(known[name], value=values[name])))
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
