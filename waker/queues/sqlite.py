"""The embedded queue on the waker's side."""

from typing import TYPE_CHECKING

from ..backlog import Backlog
from . import Finding, Row
from .hook import Nudges, nudge_with

if TYPE_CHECKING:
    from ..sqlite_queue import SqliteQueue

__all__ = ["ROWS", "Nudges", "backlog", "findings", "nudge_on_enqueue"]

ROWS = (
    Row(
        "embedded (SQLite)",
        "worker up myapp.tasks:queue",
        "waker.queues.sqlite.nudge_on_enqueue(queue)",
        "everything; at once on the same host, elsewhere after lease_s (30 s)",
        "ready, running, delayed, retries, leases",
        'a file outside a volume; `durability="process"`',
    ),
)


def backlog(queue: "SqliteQueue") -> Backlog:
    """Read the queue afresh."""
    return queue.backlog()


def nudge_on_enqueue(queue: "SqliteQueue", waker: Nudges | None = None) -> None:
    """From now on, nudge after each enqueue of a job that is ready at once, when it has been committed.

    Without a *waker*, the first such enqueue makes a `Waker()` from the environment. If that fails, each enqueue logs
    why; the jobs are in the queue all the same.
    A job enqueued for later nudges nobody: the watch wakes for it.
    """
    queue.after_enqueue(nudge_with(waker))


def findings(queue: "SqliteQueue") -> list[Finding]:
    """Its settings that lose jobs; where the file is, `worker check` looks at with what is mounted."""
    if queue.durability == "full":
        return []
    risk, remedy = "jobs of the last moments are lost with the host", 'leave it out, for "full"'
    return [Finding("durability", queue.durability, risk, remedy)]
