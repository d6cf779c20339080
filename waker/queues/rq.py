"""RQ (3.0.0 was read): what its registries in Redis tell.

A job that a worker holds is in the started registry, with the time at which it counts as abandoned; one that waits for
its time, a retry with an interval too, is in the scheduled registry. A job that was popped and not yet registered is
in the queue's intermediate list. None of them is read here through a method that cleans up: RQ's own clean-up gives up
jobs that our drain brings back.
"""

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..backlog import Backlog
from . import Row
from .hook import Nudges, nudge_after, nudge_with

if TYPE_CHECKING:
    from rq import Queue
    from rq.worker import BaseWorker

__all__ = ["ROWS", "backlog", "nudge_on_enqueue", "queues_of"]

ROWS = (
    Row(
        "RQ",
        "worker up myapp.tasks:queue (or a list of queues, or a Worker for its class and settings)",
        "nudge_on_enqueue(queue)",
        "everything; at once when the same Machine starts again, elsewhere after its heartbeat (30 s; SimpleWorker: "
        "the job's timeout + 60 s). A job without Retry is begun again at most 3 times, then fails",
        "ready, running, delayed, retries, abandoned jobs",
        "nothing",
    ),
)

# RQ gives a popped job so long to be registered (IntermediateQueue.should_be_cleaned_up).
POPPED_S = 60.0


def queues_of(target: Any, names: Sequence[str] = ()) -> "list[Queue]":
    """The queues that *target* means: itself, the list, or the Worker's; with *names*, these beside the first."""
    found = list(target) if isinstance(target, list | tuple) else [target]
    queues = [queue for one in found for queue in (one.queues if hasattr(one, "dequeue_timeout") else [one])]
    first = queues[0]
    return [type(first)(name, connection=first.connection, serializer=first.serializer) for name in names] or queues


def backlog(target: "Queue | BaseWorker | Sequence[Queue]", names: Sequence[str] = ()) -> Backlog:
    """Read the queues afresh, in one exchange with Redis. Jobs of a dead worker are ready when RQ says that it is."""
    from rq.scheduler import RQScheduler
    from rq.suspension import WORKERS_SUSPENDED

    queues = queues_of(target, names)
    now = time.time()
    with queues[0].connection.pipeline(transaction=False) as ask:
        ask.pttl(WORKERS_SUSPENDED)
        for queue in queues:
            started, scheduled = queue.started_job_registry.key, queue.scheduled_job_registry.key
            ask.llen(queue.key)
            ask.zrange(started, 0, -1, withscores=True)
            ask.zcount(scheduled, "-inf", now)
            ask.zrangebyscore(scheduled, f"({now}", "+inf", start=0, num=1, withscores=True)
            ask.pttl(RQScheduler.get_locking_key(queue.name))
            ask.lrange(queue.intermediate_queue_key, 0, -1)
        suspended_ms, *answers = ask.execute()
    ready = running = 0
    due: list[float] = []
    for number, queue in enumerate(queues):
        waiting, held, late, later, lock_ms, popped = answers[number * 6 : number * 6 + 6]
        ready += waiting
        # The score of a held job is when it counts as abandoned, in whole seconds.
        ready += sum(score < int(now) for _, score in held)
        running += sum(score >= int(now) for _, score in held)
        due += [score + 1 for _, score in held if int(now) <= score < math.inf]
        due += [score for _, score in later]
        if lock_ms == -2:
            ready += late
        elif late:
            # Somebody is moving them this moment, or died doing so.
            due.append(now + lock_ms / 1000)
        registered = {member.decode().partition(":")[0] for member, _ in held}
        for job_id in {one.decode() for one in popped} - registered:
            # Between two steps of a worker, or left there by one that died: RQ notes when it was seen first.
            queue.intermediate_queue.set_first_seen(job_id)
            seen = queue.intermediate_queue.get_first_seen(job_id)
            until = seen.timestamp() + POPPED_S if seen else now
            if until < now:
                ready += 1
            else:
                running += 1
                due.append(until)
    if suspended_ms != -2:
        # `rq suspend`: no worker takes anything until `rq resume`, or the end of its time.
        return Backlog(0, running, now + suspended_ms / 1000 if suspended_ms > 0 else None)
    return Backlog(ready, running, min(due, default=None))


def nudge_on_enqueue(target: "Queue | BaseWorker | Sequence[Queue]", waker: Nudges | None = None) -> None:
    """From now on, nudge after each enqueue to these queue objects: RQ has no hook of its own, so they get one.

    An enqueue into a pipeline of the caller's nudges when that pipeline has been executed. A job enqueued for later
    nudges nobody: the watch wakes for it.
    """
    nudge = nudge_with(waker)
    for queue in queues_of(target):
        for name in ("enqueue_call", "enqueue_many", "enqueue_job"):
            _wrap(queue, name, nudge)


def _wrap(queue: Any, name: str, nudge: Any) -> None:
    enqueue = getattr(queue, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        pipeline = kwargs.get("pipeline")
        enqueued = enqueue(*args, **kwargs)
        if pipeline is None:
            nudge()
        elif not hasattr(pipeline.execute, "__wrapped__"):
            nudge_after(pipeline, "execute", nudge)
        return enqueued

    wrapped.__wrapped__ = enqueue  # type: ignore[attr-defined]
    setattr(queue, name, wrapped)
