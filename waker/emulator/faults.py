"""What the platform may do wrong, each by a name, each with its own seeded dice.

A fault strikes with a probability at each occasion, at most a number of times: `0.3`, or `1x2` for the first two
occasions. One fault's draws never change another's, so switching one on leaves the rest of a seed's story alone.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["FAULTS", "Dice", "Fault", "Faults"]

# name → what happens when it strikes.
FAULTS: Mapping[str, str] = {
    "start_refused_after_exit": "a start is refused with 412 though the machine has settled, PM07",
    "start_rate_limited": "a start is refused: rate limit exceeded, PM01",
    "start_lease_held": "a start is refused because somebody holds the machine's lease, PM01",
    "start_fails": "an accepted start comes to nothing: the VM does not boot, PM10",
    "slow_start": "a boot takes the knob slow_start_s longer, PM03",
    "start_too_many": "one machine more is started although a running one is idle",
    "late_gossip": "the proxy learns of an exit the knob late_gossip_s later; wakes go there until then",
    "drop_connect": "a connect to a machine fails",
    "reset_before_answer": "the machine got the request, and its answer is lost: the caller sees 502, PC03",
    "reset_mid_answer": "the caller's connection is reset in the middle of the answer",
    "slow_answer": "an answer takes the knob slow_answer_s longer",
    "delivered_twice": "the machine gets the request twice; the caller gets the first answer",
    "kill_machine": "the host kills the VM a moment after a start (the knob kill_machine_s): exit code 137",
    "out_of_memory": "the kernel kills the program a moment after a start (the knob kill_machine_s): exit code 137",
    "no_capacity": "a create or a start through the API fails: the region has no capacity, 412 or 409",
    "host_unreachable": "a machine is shown without its config, for its host cannot be reached",
    "lease_held": "somebody takes a machine's lease just before a change of it through the API, 409",
    "api_rate_limited": "the API answers 429 though the limit is not reached",
    "api_error": "the API answers 500 and has done nothing",
    "api_error_after": "the API answers 500 though it has done what was asked",
    "api_bad_gateway": "something before the API answers 502 in HTML; nothing was done",
    "api_drop": "the connection to the API breaks before the request is looked at",
    "api_reset_before_answer": "the API has done what was asked, and the connection breaks before its answer",
    "api_reset_mid_answer": "the API has done what was asked, and the connection breaks in the middle of its answer",
    "api_slow_answer": "an answer of the API takes the knob api_slow_s longer",
    "api_create_late": "a create's connection breaks, and the machine is created the knob api_create_late_s later",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """Strike with *probability* at each occasion, at most *times* times (None: no limit)."""

    probability: float
    times: int | None = None

    @classmethod
    def parsed(cls, text: "str | float | Fault") -> "Fault":
        """From `0.3` or `1x2`; ValueError for anything else."""
        if isinstance(text, Fault):
            return text
        probability, _, times = str(text).partition("x")
        fault = cls(float(probability), int(times) if times else None)
        if not 0 <= fault.probability <= 1 or (fault.times or 0) < 0:
            raise ValueError(text)
        return fault


class Faults:
    """The faults that are switched on: `Faults(drop_connect=0.2, reset_mid_answer="1x2")`. None is by default."""

    __slots__ = ("_on",)

    def __init__(self, **faults: "str | float | Fault") -> None:
        errors: list[str] = []
        self._on: dict[str, Fault] = {}
        for name, text in faults.items():
            if name not in FAULTS:
                errors.append(f"no fault is called {name!r}; there are {', '.join(FAULTS)}")
                continue
            try:
                self._on[name] = Fault.parsed(text)
            except ValueError:
                errors.append(f"{name}={text!r}: expected a probability like 0.3, or 1x2 for the first two occasions")
        if errors:
            raise ValueError("; ".join(errors))

    def __iter__(self) -> Iterator[tuple[str, Fault]]:
        return iter(self._on.items())

    def __repr__(self) -> str:
        return f"Faults({', '.join(f'{name}={fault}' for name, fault in self)})"


class Dice:
    """Decides, from a seed, whether a fault strikes now."""

    def __init__(self, faults: Faults, seed: int) -> None:
        self._seed = seed
        self._faults = dict(faults)
        self._dice: dict[str, random.Random] = {}
        self._struck: dict[str, int] = {}

    def set(self, faults: Faults) -> None:
        """Switch to other *faults*, from now on; a count starts anew."""
        self._faults = dict(faults)
        self._struck = {}

    def strikes(self, name: str) -> bool:
        """Whether the fault *name* strikes at this occasion."""
        fault = self._faults.get(name)
        if fault is None or (fault.times is not None and self._struck.get(name, 0) >= fault.times):
            return False
        dice = self._dice.setdefault(name, random.Random(f"{self._seed}:{name}"))
        if dice.random() >= fault.probability:
            return False
        self._struck[name] = self._struck.get(name, 0) + 1
        return True
