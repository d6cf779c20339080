"""The embedded queue on the waker's side."""

from typing import TYPE_CHECKING, Protocol

from ..backlog import Backlog

if TYPE_CHECKING:
    from ..sqlite_queue import SqliteQueue

__all__ = ["Nudges", "backlog", "nudge_on_enqueue"]


class Nudges(Protocol):
    """A Waker or an AsyncWaker, as far as an enqueue needs it."""

    def nudge(self) -> None: ...


def backlog(queue: "SqliteQueue") -> Backlog:
    """Read the queue afresh."""
    return queue.backlog()


def nudge_on_enqueue(queue: "SqliteQueue", waker: Nudges | None = None) -> None:
    """From now on, nudge after each enqueue of a job that is ready at once, when it has been committed.

    Without a *waker*, the first such enqueue makes a `Waker()` from the environment: a module that defines tasks is
    also imported where nobody enqueues. If that fails, each enqueue logs why; the jobs are in the queue all the same.
    A job enqueued for later nudges nobody: the watch wakes for it.
    """
    nudges = waker

    def nudge() -> None:
        nonlocal nudges
        if nudges is None:
            from ..client import Waker

            nudges = Waker()
        nudges.nudge()

    queue.after_enqueue(nudge)
