"""Scheduled machines: so far apart that several of one interval start one after the other.

The platform starts a scheduled machine about once an interval, counted from its creation: so each is created when its
turn is. The plan and the next steps are pure; apply takes the steps, and can be interrupted and run again at any time.
"""

import asyncio
import hashlib
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .. import rules
from ..errors import UsageError
from . import shapes
from .client import AsyncMachines
from .errors import MachinesError
from .jobs import image_of
from .records import Machine

__all__ = [
    "INTERVALS_S", "NOT_PROMISED", "SCHEDULE", "Plan", "Scheduled", "Slot", "Step", "apply", "configuration", "look",
    "plan", "remove", "span", "steps",
]  # fmt: skip

# Seconds of each interval that the platform knows. A month is as good as 30 days: nothing exact is promised.
INTERVALS_S = {"hourly": 3600.0, "daily": 86_400.0, "weekly": 604_800.0, "monthly": 2_592_000.0}
# The marks on a schedule's machines: its name, the slot, and what it was made from.
SCHEDULE = "wake_schedule"
SLOT = "wake_slot"
SPEC = "wake_spec"
# So late a start is still in its slot.
TOLERANCE_S = 60.0
MAX_MACHINES = 1000

NOT_PROMISED = (
    "the platform starts a scheduled machine about once an interval: minutes may drift, and no time of day is kept",
    "if the host has no room at that time, the run is left out, and nothing tries it again",
    "it counts from the creation of each machine: one that is made anew starts a count of its own",
)


@dataclass(frozen=True, slots=True)
class Slot:
    """One machine's place in the interval."""

    index: int
    machine_name: str
    offset_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Who runs when."""

    name: str
    every: str
    stagger_s: float
    slots: tuple[Slot, ...]

    @property
    def interval_s(self) -> float:
        """Seconds between two runs of one machine."""
        return INTERVALS_S[self.every]


@dataclass(frozen=True, slots=True)
class Step:
    """A slot, and its machine or, if there is none, when it is to be created (unix time)."""

    slot: Slot
    at: float
    machine: Machine | None = None


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A machine of a schedule, as it is deployed. Times are unix times."""

    schedule: str
    slot: int
    every: str
    machine: Machine
    created_at: float | None


def plan(name: str, every: str, machines: int, stagger_s: float | None = None) -> Plan:
    """Plan *machines* starts, *stagger_s* apart (evenly over the interval unless given), within one interval. Pure."""
    shapes.name(name, "schedule")
    if every not in INTERVALS_S:
        raise UsageError(f"every {every!r}: expected {', '.join(INTERVALS_S)}")
    if not 1 <= machines <= MAX_MACHINES:
        raise UsageError(f"machines {machines}: expected a number from 1 to {MAX_MACHINES}")
    interval_s = INTERVALS_S[every]
    stagger_s = interval_s / machines if stagger_s is None else stagger_s
    if not 0 < stagger_s <= interval_s / machines:
        fits = interval_s / machines
        raise UsageError(
            f"stagger {span(stagger_s)}: {machines} machines so far apart do not fit into one interval ({every}); "
            f"expected {span(fits)} at most"
        )
    slots = tuple(Slot(index, f"{name}-{index + 1}", index * stagger_s) for index in range(machines))
    return Plan(name, every, stagger_s, slots)


def steps(plan: Plan, there: Sequence[Machine], now: float) -> list[Step]:
    """What is there, and when what is missing is to be created: at its own place beside what is there. Pure.

    Raises UsageError for machines of the schedule that have no place in the plan.
    """
    found = {int(machine.metadata.get(SLOT, "-1")): machine for machine in there}
    surplus = sorted(index for index in found if index not in range(len(plan.slots)))
    if surplus:
        names = ", ".join(found[index].name or found[index].id for index in surplus)
        raise UsageError(f"schedule {plan.name} has machines that are not in this plan ({names}): remove it first")
    anchors = [
        made_at - plan.slots[index].offset_s
        for index, machine in sorted(found.items())
        if (made_at := _unix(machine.created_at)) is not None
    ]
    anchor = anchors[0] if anchors else now
    made = []
    for slot in plan.slots:
        machine = found.get(slot.index)
        at = anchor + slot.offset_s
        if machine is not None:
            at = _unix(machine.created_at) or at
        elif at < now - TOLERANCE_S:
            # Its time has passed: the next one at the same place of the interval, or now if that was a moment ago.
            at += math.ceil((now - TOLERANCE_S - at) / plan.interval_s) * plan.interval_s
        made.append(Step(slot, at if machine is not None else max(at, now), machine))
    return made


def configuration(
    plan: Plan, slot: Slot, command: Sequence[str], image: str, *, guest: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The machine of one slot. Pure."""
    words = shapes.command(command)
    variables = shapes.environment(env)
    if rules.worker_verb(rules.Command(tuple(words), "")) == "up":
        # Nobody's request started it: there is no first one to wait for.
        variables.setdefault("WORKER_GREET_S", "0")
    config: dict[str, Any] = {
        "image": image,
        "init": {"exec": words},
        "schedule": plan.every,
        "restart": {"policy": "on-failure"},
        "stop_config": {"signal": "SIGTERM", "timeout": "5s"},
        **({"env": variables} if variables else {}),
        **({"guest": dict(guest)} if guest else {}),
    }
    spec = json.dumps([config, plan.stagger_s, len(plan.slots)], sort_keys=True)
    marks = {SCHEDULE: plan.name, SLOT: str(slot.index), SPEC: hashlib.sha256(spec.encode()).hexdigest()[:16]}
    return {**config, "metadata": marks}


async def apply(
    api: AsyncMachines,
    plan: Plan,
    command: Sequence[str],
    *,
    image: str | None = None,
    region: str | None = None,
    guest: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    told: Callable[[Sequence[Step]], None] = lambda steps: None,
    made: Callable[[Step], None] = lambda step: None,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> list[Step]:
    """Create what is missing of *plan*, each machine when its turn is; takes up to an interval.

    *told* is called with all the steps at the beginning, *made* with each one that is there, at once or later. What was
    created stays if it is interrupted or fails: the next apply creates the rest in its place.
    Raises UsageError if the schedule is there with another configuration.
    """
    there = [machine for machine in await api.list() if machine.metadata.get(SCHEDULE) == plan.name
             and machine.state not in ("destroyed", "destroying")]  # fmt: skip
    image = image or (there[0].image if there else "") or await image_of(api)
    todo = steps(plan, there, now())
    for step in todo:
        wanted = configuration(plan, step.slot, command, image, guest=guest, env=env)
        if step.machine is not None and step.machine.metadata.get(SPEC) != wanted["metadata"][SPEC]:
            raise UsageError(
                f"schedule {plan.name} is there with another configuration: remove it first, or give this one another "
                f"name (machine {step.machine.id})"
            )
    told(todo)
    done = []
    for step in sorted(todo, key=lambda step: (step.machine is None, step.at)):
        reached = step
        if step.machine is None:
            await sleep(max(0.0, step.at - now()))
            config = configuration(plan, step.slot, command, image, guest=guest, env=env)
            machine = await api.create_once(config, name=step.slot.machine_name, region=region)
            reached = Step(step.slot, _unix(machine.created_at) or now(), machine)
        made(reached)
        done.append(reached)
    return sorted(done, key=lambda step: step.slot.index)


async def look(api: AsyncMachines, name: str | None = None) -> list[Scheduled]:
    """The scheduled machines of an app, also those that were not made by us (their schedule has no name)."""
    found = [
        Scheduled(
            machine.metadata.get(SCHEDULE, ""),
            int(machine.metadata.get(SLOT, "0")),
            str(machine.config["schedule"]),
            machine,
            _unix(machine.created_at),
        )
        for machine in await api.list()
        if machine.config.get("schedule") and machine.state not in ("destroyed", "destroying")
    ]
    return sorted(
        (each for each in found if name in (None, each.schedule)), key=lambda each: (each.schedule, each.slot)
    )


async def remove(api: AsyncMachines, name: str, *, force: bool = False) -> list[Machine]:
    """Delete the machines of a schedule; with *force* also those that run. Returns them.

    Raises UsageError if there is no such schedule, or if one of its machines runs: nothing is deleted then.
    """
    there = await look(api, name) if name else []
    if not there:
        raise UsageError(f"app {api.app} has no schedule {name!r}; `waker schedule list` shows those it has")
    running = [each.machine.id for each in there if each.machine.state not in ("stopped", "created", "failed")]
    if running and not force:
        raise UsageError(f"schedule {name}: {', '.join(running)} runs; wait for its end, or say --force")
    left, failed = [], None
    for each in there:
        try:
            await api.delete(each.machine.id, force=force)
        except MachinesError as error:
            left.append(each.machine.id)
            failed = error
    if failed is not None:
        raise MachinesError(f"schedule {name}: {', '.join(left)} could not be deleted: {failed}") from failed
    return [each.machine for each in there]


def _unix(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def span(seconds: float) -> str:
    """Seconds as people write them, like 15m."""
    for unit, size in (("d", 86_400.0), ("h", 3600.0), ("m", 60.0)):
        if seconds >= size and not seconds % size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:g}s"
