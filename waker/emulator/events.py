"""One log of everything that happened; what a machine's runs cost is read from it.

Times are seconds since the platform began, on its one clock. Event types, each with its fields:

    platform.started url=…              platform.stopped
    machine.created                     machine.destroyed
    machine.starting source=…           the start was accepted (by the proxy, a person or the restart policy)
    machine.started                     its VM runs: billing begins
    machine.stopping signal=… source=…
    machine.stopped exit_code=… requested=…      billing has ended
    machine.restarting exit_code=…               the same, and the restart policy will start it again
    machine.process_exited process=… exit_code=… one of several processes ended
    start.refused code=… status=… reason=… source=…
    request.arrived request=… method=… path=…    request.sent machine=…
    request.held machine=…              waits for a machine to start     request.queued   waits for a free place
    request.moved machine=… code=…      this machine could not take it; another try follows
    request.replayed machine=…
    request.answered status=… machine=… elapsed_s=… code=…      request.gone   the caller left
    fault.struck fault=…
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Event", "EventLog", "Run"]

MAX_EVENTS = 100_000
MAX_RUNS = 10_000


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: *at* seconds after the platform began, to *machine* if it was one."""

    at: float
    type: str
    machine: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = {"machine": self.machine, **self.fields} if self.machine else self.fields
        return " ".join([f"{self.at:9.3f}", self.type, *(f"{name}={value}" for name, value in words.items())])

    def as_dict(self) -> dict[str, Any]:
        """One flat record, for JSON."""
        return {"at": round(self.at, 6), "type": self.type, "machine": self.machine, **self.fields}


@dataclass(frozen=True, slots=True)
class Run:
    """One VM of a machine, from its accepted start to its exit; None is what has not happened yet."""

    starting_at: float
    source: str
    started_at: float | None = None
    stopped_at: float | None = None
    exit_code: int | None = None
    requested_stop: bool = False

    def billed_s(self, now: float) -> float:
        """Seconds in the state `started`, which are billed, up to *now* if it still runs."""
        if self.started_at is None:
            return 0.0
        return (now if self.stopped_at is None else self.stopped_at) - self.started_at


class EventLog:
    """Keeps the newest events and each machine's runs; tells who listens. Safe to read from another thread."""

    def __init__(self, *, max_events: int = MAX_EVENTS) -> None:
        self._lock = threading.Lock()  # guards all below
        self._events: deque[Event] = deque(maxlen=max_events)
        self._runs: dict[str, deque[Run]] = {}
        self._listeners: list[Callable[[Event], None]] = []
        self.count = 0  # of all events ever; only grows

    def append(self, event: Event) -> None:
        """Record *event*, then tell the listeners, outside the lock."""
        with self._lock:
            self._events.append(event)
            self.count += 1
            if event.machine is not None:
                _fold(self._runs.setdefault(event.machine, deque(maxlen=MAX_RUNS)), event)
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener(event)

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call *listener* with each event from now on, in the platform's thread; return what ends that."""
        with self._lock:
            self._listeners.append(listener)

        def end() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return end

    def since(self, count: int = 0) -> list[Event]:
        """The events after the first *count* ones, as far as they are still kept."""
        with self._lock:
            events = list(self._events)
            return events[max(0, len(events) - (self.count - count)) :] if count < self.count else []

    def runs(self, machine: str) -> tuple[Run, ...]:
        """The runs of *machine*, oldest first."""
        with self._lock:
            return tuple(self._runs.get(machine, ()))


def _fold(runs: deque[Run], event: Event) -> None:
    """Apply one event to a machine's runs."""
    if event.type == "machine.starting":
        runs.append(Run(event.at, event.fields["source"]))
    elif event.type == "machine.started":
        runs[-1] = Run(runs[-1].starting_at, runs[-1].source, started_at=event.at)
    elif event.type in ("machine.stopped", "machine.restarting") and runs and runs[-1].stopped_at is None:
        last = runs[-1]
        runs[-1] = Run(
            last.starting_at,
            last.source,
            last.started_at,
            event.at,
            event.fields["exit_code"],
            bool(event.fields.get("requested")),
        )
