"""Drains: a small module per queue library that runs the library's own worker until nothing is ready.

A drain is loaded after the user's code, under a private name (`worker/aside.py`), so a drain module imports relatively, and
its library inside functions. It has a class `Drain(target, pulse)` with what `Drain` below says.
"""

import threading
from typing import NamedTuple, Protocol

__all__ = ["KNOWN", "Backlog", "Drain", "Pulse", "drain_for"]

# The module and name of an object's class → the drain for it, and the extra that installs the library.
KNOWN = {
    "waker.sqlite_queue.SqliteQueue": "sqlite",
}


class Backlog(Protocol):
    """What a reading of the queue tells; `waker.backlog.Backlog` has the meaning of the fields."""

    @property
    def ready(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def due_at(self) -> float | None: ...


class Pulse:
    """What a drain says of itself while it works. Written by the drain, read from other threads, guarded by nothing:
    each field is a number of its own, and a reader that is a moment late is not wrong."""

    __slots__ = ("done", "failed", "running", "slots")

    def __init__(self) -> None:
        self.running = 0  # jobs running in this process
        self.slots = 1  # how many could
        self.done = 0  # jobs run in this process, failed ones included
        self.failed = 0


class Drain(Protocol):
    """One library's worker, as the drainer sees it."""

    # What this library raises while its broker cannot be reached; retried for WORKER_BROKER_RETRY_S.
    broker_errors: tuple[type[BaseException], ...]

    def backlog(self) -> Backlog | None:
        """A fresh reading; None where only running it tells (a command)."""

    def work(self, stop: threading.Event) -> int:
        """Run jobs until none is ready and none is running here, or *stop* is set; put back what is held, disconnect.

        Returns 0, or the exit code that this run of the machine must end with.
        """

    def release(self) -> None:
        """The time after a stop is up, and `work` has not returned: put back what is held. From another thread."""


class UnknownQueue(NamedTuple):
    """No drain is known for this object."""

    kind: str


def drain_for(target: object) -> str | UnknownQueue:
    """The name of the drain for *target*, by its class or the first base class that is known."""
    for base in type(target).__mro__:
        name = KNOWN.get(f"{base.__module__}.{base.__qualname__}")
        if name is not None:
            return name
    return UnknownQueue(f"{type(target).__module__}.{type(target).__qualname__}")
