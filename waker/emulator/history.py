"""What the platform writes down of a machine's life, as the Machines API tells it: made from the log's events.

Newest first when told. Types and statuses are those of the docs' samples and of others' output (GH flyctl#2143); the
whole vocabulary is undocumented. Who started it: the docs know `user` and `flyd`.
"""

import datetime as dt
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .events import Event
from .knobs import Knobs

__all__ = ["History", "Told", "rfc3339"]

MAX_TOLD = 200
NO_SIGNAL = -1
KILLED = 9
PLATFORM_STARTS = ("restart-policy", "schedule")


@dataclass(frozen=True, slots=True)
class Told:
    """One entry. *step*: how many steps the machine had taken by then."""

    id: str
    type: str
    status: str
    source: str
    timestamp: int  # Unix time in milliseconds
    step: int
    request: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """As the API shows it."""
        shown: dict[str, Any] = {
            "id": self.id,
            "type": self.type,
            "status": self.status,
            "source": self.source,
            "timestamp": self.timestamp,
        }
        return shown if self.request is None else {**shown, "request": self.request}


class History:
    """The newest entries of one machine."""

    def __init__(self, machine: str, epoch: float, knobs: Knobs) -> None:
        self._machine = machine
        self._epoch = epoch
        self._knobs = knobs
        self._told: deque[Told] = deque(maxlen=MAX_TOLD)
        self._count = 0

    def __iter__(self) -> Iterator[Told]:
        """Newest first."""
        return reversed(self._told)

    def find(self, event_id: str) -> Told | None:
        """The entry of that id."""
        return next((told for told in self if told.id == event_id), None)

    def note(self, event: Event, step: int) -> None:
        """Take in what happened, if it is something that is told."""
        at = self._epoch + event.at
        entry = _entry(event, at, self._knobs)
        if entry is None:
            return
        kind, status, source, request = entry
        self._count += 1
        # As long as a ULID, and in the order of time as those are.
        number = f"01EVENT{self._machine[-8:].upper()}{self._count:011d}"
        self._told.append(Told(number, kind, status, source, int(at * 1000), step, request))


def _entry(event: Event, at: float, knobs: Knobs) -> tuple[str, str, str, Mapping[str, Any] | None] | None:
    fields = event.fields
    asked = "user" if fields.get("source") in ("api", "emulator", "destroy") else "flyd"
    match event.type:
        case "machine.created":
            return "launch", "created", "user", None
        case "machine.starting":
            return "start", "starting", "flyd" if fields["source"] in PLATFORM_STARTS else "user", None
        case "machine.started":
            return "start", "started", "flyd", None
        case "machine.stopping":
            return "stop", "stopping", asked, None
        case "machine.replacing":
            return "update", "replacing", "user", None
        case "machine.replaced":
            return "update", "stopped", "flyd", None
        case "machine.destroying":
            return "destroy", "destroying", asked, None
        case "machine.destroyed":
            return "destroy", "destroyed", "flyd", None
        case "machine.stopped" | "machine.restarting":
            if fields.get("reason"):
                return "start", "failed", "flyd", None
            if fields["exit_code"] is None:
                return None
            return "exit", "stopped", "flyd", _exit(event, at, knobs)
    return None


def _exit(event: Event, at: float, knobs: Knobs) -> Mapping[str, Any]:
    """`request` of an exit: where the exit code is, is a soft contract (Fly docs: machines, the sample of a get)."""
    fields = event.fields
    code = fields["exit_code"]
    exit_event: dict[str, Any] = {
        "exit_code": code,
        "guest_exit_code": 0,
        "guest_signal": NO_SIGNAL,
        "signal": fields.get("signal", NO_SIGNAL),
        "oom_killed": fields.get("oom", False),
        "requested_stop": bool(fields.get("requested", False)),
        "restarting": event.type == "machine.restarting",
        "exited_at": int(at * 1000) if knobs.exited_at == "milliseconds" else rfc3339(at),
    }
    if knobs.exit_event_omits_zeros:
        exit_event = {name: value for name, value in exit_event.items() if value}
    request: dict[str, Any] = {"restart_count": fields.get("restart", 0)}
    if knobs.exit_event_in != "MonitorEvent":
        request["exit_event"] = exit_event
    if knobs.exit_event_in != "request":
        request["MonitorEvent"] = {"exit_event": exit_event}
    return request


def rfc3339(at: float) -> str:
    """Unix time the way the API writes it."""
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
