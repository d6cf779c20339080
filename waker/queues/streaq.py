"""streaq (7.2.0 and coredis 6.9.0 were read): what its streams and its delayed queues tell.

A message is deleted with its acknowledgement, so what is in a stream and held by nobody is waiting. What a worker holds
counts as abandoned after the `idle_timeout` that it renews. What is delayed, repeated or retried is in a sorted set for
each priority, from which a worker moves it when it is due.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..backlog import Backlog
from . import Finding, Row
from .hook import Nudges, nudge_with
from .reading import read_now

if TYPE_CHECKING:
    from streaq import Worker

__all__ = ["GROUP", "ROWS", "abandoned", "backlog", "client_of", "findings", "nudge_on_enqueue", "pending_of", "read"]

ROWS = (
    Row(
        "streaq (Redis)",
        "worker up myapp.tasks:worker",
        "nudge_on_enqueue(worker)",
        "everything; at once when the same Machine starts again, elsewhere after idle_timeout (60 s). A task is begun "
        "at most max_tries times (3), then fails",
        "ready, running, delayed, cron, retries, dead workers",
        "expire",
    ),
)

# streaq.constants.REDIS_GROUP
GROUP = "workers"
PENDING_MOST = 10_000

_nudges: "WeakKeyDictionary[Worker[Any], Callable[[], None]]" = WeakKeyDictionary()


def backlog(worker: "Worker[Any]", names: Sequence[str] = ()) -> Backlog:
    """Read the queues afresh, on a connection that lasts for this reading."""
    return read_now(_read_once(worker))


async def read(redis: Any, worker: "Worker[Any]", ours: str = "") -> Backlog:
    """The same on a client that is there; what workers hold whose ids begin with *ours* counts as abandoned."""
    now = time.time()
    ready = running = 0
    due: list[float] = []
    for priority in worker.priorities:
        stream, delayed = worker.stream_key + priority, worker.queue_key + priority
        held = await pending_of(redis, stream)
        lost = len(abandoned(held, worker, ours))
        ready += max(0, await redis.xlen(stream) - len(held)) + lost
        running += len(held) - lost
        left_ms = [worker.idle_timeout - one.idle for one in held if one.idle < worker.idle_timeout]
        due += [now + min(left_ms) / 1000] if left_ms and len(held) > lost else []
        ready += await redis.zcount(delayed, "-inf", now * 1000)
        later = await redis.zrange(delayed, f"({now * 1000}", "+inf", sortby=_by_score(), offset=0, count=1,
                                   withscores=True)  # fmt: skip
        due += [score / 1000 for _, score in later]
    return Backlog(ready, running, min(due, default=None))


def abandoned(held: Sequence[Any], worker: "Worker[Any]", ours: str = "") -> list[Any]:
    """Of messages that were given and not acknowledged those that nobody holds any more."""
    return [one for one in held if one.idle >= worker.idle_timeout or (ours and str(one.consumer).startswith(ours))]


@asynccontextmanager
async def client_of(worker: "Worker[Any]") -> AsyncIterator[Any]:
    """A client of this event loop, for the same server: the worker's own belongs to the loop that it runs in."""
    from coredis import ConnectionPool, Redis

    pool: Any = worker._redis.connection_pool
    client: Any = worker._redis
    if type(pool) is ConnectionPool:
        options = {name: value for name, value in pool.connection_kwargs.items() if name != "processing_budget"}
        client = Redis(connection_pool=ConnectionPool(connection_class=pool.connection_class, location=pool.location,
                                                      **options), decode_responses=True)  # fmt: skip
    async with client:
        yield client


def nudge_on_enqueue(worker: "Worker[Any]", waker: Nudges | None = None) -> None:
    """From now on, nudge after each task of this worker that is enqueued, in a chain or by enqueue_many, too.

    streaq has no hook: what is awaited to enqueue a task gets one. A task that is delayed nudges nobody.
    """
    from streaq.task import Task

    nudge = nudge_with(waker)
    if not hasattr(Task._chain, "__wrapped__"):
        _wrap_chain(Task)
    _nudges[worker] = nudge
    enqueue_many = worker.enqueue_many

    async def wrapped(tasks: Any) -> None:
        await enqueue_many(tasks)
        if any(_is_due(task) for task in tasks):
            nudge()

    worker.enqueue_many = wrapped


def findings(worker: "Worker[Any]") -> list[Finding]:
    """Tasks that Redis forgets."""
    return [
        Finding(
            f"expire of {name}",
            str(task.expire),
            "loses the job: one that has waited for so long, also for a machine to start, is not run",
            "leave it out, or let it be far longer than the queue may ever be",
        )
        for name, task in worker.registry.items()
        if task.expire
    ]


def _wrap_chain(task_class: Any) -> None:
    chain = task_class._chain

    async def wrapped(self: Any) -> Any:
        enqueued = await chain(self)
        nudge = _nudges.get(self.worker)
        if nudge is not None and _is_due(self):
            nudge()
        return enqueued

    wrapped.__wrapped__ = chain  # type: ignore[attr-defined]  # as functools.wraps does
    task_class._chain = wrapped


def _is_due(task: Any) -> bool:
    return not task.delay and task.schedule is None


async def _read_once(worker: "Worker[Any]") -> Backlog:
    async with client_of(worker) as redis:
        return await read(redis, worker)


async def pending_of(redis: Any, stream: str) -> Sequence[Any]:
    """What workers were given of a stream and have not acknowledged."""
    from coredis.exceptions import StreamConsumerGroupError

    try:
        held: Sequence[Any] = await redis.xpending(stream, GROUP, start="-", end="+", count=PENDING_MOST)
    except StreamConsumerGroupError:  # no worker has made the group yet
        return ()
    return held


def _by_score() -> Any:
    from coredis import PureToken

    return PureToken.BYSCORE
