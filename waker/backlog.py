"""What a queue holds at one moment: the one record that probes, drains and the watch share."""

from typing import NamedTuple

__all__ = ["Backlog"]


class Backlog(NamedTuple):
    """A fresh reading of a queue.

    *ready*: jobs that are due and could run this moment. *running*: jobs held by any worker, here or elsewhere.
    *due_at*: when the next job becomes ready by itself (a delay, a retry, the end of a lease), Unix time in seconds;
    None if nothing is scheduled.
    """

    ready: int
    running: int = 0
    due_at: float | None = None
