"""RQ's worker that does not fork: it has no heartbeat, so elsewhere a killed job waits for its timeout and a minute."""

from rq import SimpleWorker
from rq_app import enqueue, queue

hooked = queue
__all__ = ["enqueue", "hooked"]


def __getattr__(name):
    if name == "target":
        return SimpleWorker([queue])
    raise AttributeError(name)
