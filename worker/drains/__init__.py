"""Drains: a small module per queue library that runs the library's own worker until nothing is ready.

How one is written. A drain module is loaded after the user's code, when `worker` and `waker` may be names of the user's
own modules, under a private name (`worker/aside.py`). So it imports its neighbours relatively, its library inside
functions, and the probe of the same library with `late`, which finds our `waker` whatever that name means by then:

    from ..aside import late
    from . import Backlog, Options, Pulse, Refused

    probe = late("waker.queues.rq")

It has a class `Drain(target, pulse, options)` with what `Drain` below says; `rq.py` is the one to copy. Its library is
registered in `waker.queues.LIBRARIES`, under the module's name.
"""

import threading
from typing import NamedTuple, Protocol

from ..aside import late

__all__ = ["KNOWN", "NAMES", "Backlog", "Drain", "Options", "Pulse", "Refused", "UnknownQueue", "drain_for",
           "install_hint"]  # fmt: skip

_queues = late("waker.queues")
# The module and name of an object's class → the drain for it.
KNOWN: dict[str, str] = _queues.KNOWN
# What --drain takes.
NAMES: tuple[str, ...] = tuple(_queues.LIBRARIES)


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


class Options(NamedTuple):
    """What a drain is told beside its target."""

    queues: tuple[str, ...] = ()  # by name, as the library's users write them; none: those its own worker would take
    # Only one drainer at a time has this name: what an earlier one of that name holds is held by nobody. "" if unknown.
    machine: str = ""


class Refused(Exception):  # noqa: N818 - what happened
    """This target cannot be drained; the message ends the sentence "'myapp.tasks:app' cannot be drained: "."""


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

    why: str


def drain_for(target: object, queues: tuple[str, ...] = ()) -> str | UnknownQueue:
    """The name of the drain for *target*, by its class or the first base class that is known."""
    name, why = _queues.name_of(target, queues)
    return name or UnknownQueue(why)


def install_hint(error: BaseException | None) -> str:
    """What installs the module that *error* misses, as the end of a sentence; "" if it is none of ours to know."""
    hint: str = _queues.install_hint(error)
    return hint
