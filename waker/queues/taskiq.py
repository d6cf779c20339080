"""taskiq on Redis streams (taskiq 0.13.0 and taskiq-redis 1.2.4 were read): what the consumer group tells.

Ready is what the group has not been given yet, and what a consumer was given and left: for longer than the broker's
`idle_timeout`, or, where it was a drain of ours, which says every few seconds that it lives, for LOST_S. A task for
later is in a schedule source, of which taskiq's broker knows nothing: a TaskiqScheduler beside it makes it known.
"""

import copy
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..backlog import Backlog
from ..errors import UsageError
from . import Finding, Row
from .hook import Nudges, nudge_with
from .reading import read_now

if TYPE_CHECKING:
    from typing import TypeAlias

    from taskiq import ScheduledTask, TaskiqScheduler
    from taskiq.receiver import Receiver
    from taskiq_redis import RedisStreamBroker

    Target: TypeAlias = RedisStreamBroker | TaskiqScheduler | Receiver

__all__ = ["LOST_S", "OURS", "RELEASED", "ROWS", "Parts", "Pending", "abandoned", "backlog", "findings", "group_of",
           "nudge_on_enqueue", "parts_of", "read", "scheduled", "streams_of"]  # fmt: skip

ROWS = (
    Row(
        "taskiq (Redis streams)",
        "worker up myapp.tasks:broker (or a list of a TaskiqScheduler, for delays, and a Receiver, for its settings)",
        "nudge_on_enqueue(broker)",
        "everything; at once when the same Machine starts again, elsewhere after 30 s (held by a plain taskiq worker: "
        "idle_timeout, 10 minutes). What was abandoned more than 3 times is moved to the stream <queue>:dead",
        "ready, running, dead workers; tasks and retries with a time in a Redis schedule source, if the scheduler is "
        "given; not cron and intervals, which need taskiq's own scheduler process",
        'consumer_id="$", maxlen, acks on receipt',
    ),
    Row(
        "taskiq (Redis lists, pub/sub)",
        "-",
        "-",
        "loses the job: what a worker was given is in no list; use RedisStreamBroker",
        "nothing",
        "-",
    ),
)

# Names of our consumers begin so.
OURS = "wake-"
# Who holds what was given back.
RELEASED = "wake-released"
LOST_S = 30.0
PENDING_MOST = 10_000


class Parts(NamedTuple):
    """What a target consists of."""

    broker: Any
    scheduler: Any = None
    receiver: Any = None


class Pending(NamedTuple):
    """A message that a consumer has been given and not acknowledged."""

    stream: str
    id: str
    consumer: str
    idle_s: float
    deliveries: int


def parts_of(target: "Target | Sequence[Target]") -> Parts:
    """The broker, and the scheduler and the receiver if they are given. Raises UsageError if they do not fit."""
    broker = scheduler = receiver = None
    for one in target if isinstance(target, list | tuple) else [target]:
        if hasattr(one, "sources"):
            scheduler = one
        elif hasattr(one, "sem_prefetch"):
            receiver = one
        found = getattr(one, "broker", one)
        if broker is not None and found is not broker:
            raise UsageError("its objects belong to more than one broker")
        broker = found
    if not hasattr(broker, "consumer_group_name"):
        raise UsageError(f"its broker is a {type(broker).__name__}, from which a killed worker loses the job; use "
                         "RedisStreamBroker")  # fmt: skip
    return Parts(broker, scheduler, receiver)


def streams_of(broker: Any, names: Sequence[str] = ()) -> list[str]:
    """The streams that a worker reads: *names*, or those of the broker."""
    return list(names) or [broker.queue_name, *broker.additional_streams]


def backlog(target: "Target | Sequence[Target]", names: Sequence[str] = ()) -> Backlog:
    """Read the streams afresh, on a connection that lasts for this reading."""
    parts = parts_of(target)
    return read_now(_read_once(parts, names))


async def read(redis: Any, parts: Parts, names: Sequence[str] = (), ours: str = "") -> Backlog:
    """The same on a client that is there; what consumers hold whose names begin with *ours* counts as abandoned."""
    now, broker = time.time(), parts.broker
    ready = running = 0
    due: list[float] = []
    for stream in streams_of(broker, names):
        pending, fresh = await group_of(redis, broker, stream)
        ready += fresh
        for one in pending:
            left_s = _left_s(one, broker, ours)
            ready += left_s <= 0
            running += left_s > 0
            due += [now + left_s] if left_s > 0 else []
    if parts.scheduler is not None:
        for source in parts.scheduler.sources:
            times = [task.time.timestamp() for task in await scheduled(source, redis)]
            ready += sum(at <= now for at in times)
            due += [at for at in times if at > now]
    return Backlog(ready, running, min(due, default=None))


async def group_of(redis: Any, broker: Any, stream: str) -> tuple[list[Pending], int]:
    """What the consumers of the broker's group hold, and how many messages nobody has been given."""
    from redis.exceptions import ResponseError

    try:
        groups = await redis.xinfo_groups(stream)
    except ResponseError:  # no such stream
        return [], 0
    name = broker.consumer_group_name
    group = next((one for one in groups if _text(one["name"]) == name), None)
    if group is None:
        # Nobody has listened yet; our drain makes the group so that it begins with the first message.
        return [], int(await redis.xlen(stream))
    fresh = group.get("lag")
    if fresh is None:  # after a message was deleted the server cannot tell
        fresh = len(await redis.xrange(stream, f"({_text(group['last-delivered-id'])}", "+", count=PENDING_MOST))
    if not group["pending"]:
        return [], int(fresh)
    rows = await redis.xpending_range(stream, name, "-", "+", PENDING_MOST)
    return [
        Pending(
            stream,
            _text(row["message_id"]),
            _text(row["consumer"]),
            row["time_since_delivered"] / 1000,
            row["times_delivered"],
        )
        for row in rows
    ], int(fresh)


def abandoned(pending: Sequence[Pending], broker: Any, ours: str = "") -> list[Pending]:
    """Of *pending* what nobody holds any more."""
    return [one for one in pending if _left_s(one, broker, ours) <= 0]


async def scheduled(source: Any, redis: Any) -> "list[ScheduledTask]":
    """The tasks with a time of a schedule source in Redis, in no order; of one elsewhere those that it tells."""
    prefix = getattr(source, "_prefix", None)
    if prefix is None or not hasattr(source, "_get_time_key"):
        return [task for task in await source.get_schedules() if task.time is not None]
    from taskiq import ScheduledTask

    # It tells of those only whose minute has come, so this reads its keys: a list of ids for each minute.
    ids = [one async for key in redis.scan_iter(f"{prefix}:time:*", count=1000)
           for one in await redis.lrange(key, 0, -1)]  # fmt: skip
    found = await redis.mget([f"{prefix}:data:{_text(one)}" for one in ids]) if ids else []
    tasks = [ScheduledTask.model_validate(source._serializer.loadb(data)) for data in found if data]
    return [_aware(task) for task in tasks if task.time is not None]


def nudge_on_enqueue(target: "Target | Sequence[Target]", waker: Nudges | None = None) -> None:
    """From now on, nudge after each task that this broker has sent, by a middleware of its own."""
    from taskiq import TaskiqMiddleware

    nudge = nudge_with(waker)

    class Nudging(TaskiqMiddleware):  # type: ignore[misc]
        def post_send(self, message: Any) -> None:
            nudge()

    parts_of(target).broker.add_middlewares(Nudging())


def findings(target: "Target | Sequence[Target]") -> list[Finding]:
    """Settings by which Redis, or the broker, forgets tasks."""
    broker, _, receiver = parts_of(target)
    found = []
    if broker.consumer_id == "$":
        found.append(Finding("consumer_id", "$", "a task that is sent before anything has called broker.startup() is "
                             "never given to a worker, unless worker up was first", 'set it to "0"'))  # fmt: skip
    if broker.maxlen is not None:
        found.append(Finding("maxlen", str(broker.maxlen), "loses the job: of more waiting ones the oldest are cut off",
                             "leave it out, and trim what has been acknowledged"))  # fmt: skip
    if receiver is not None and receiver.ack_time.value == "when_received":
        found.append(Finding("ack_type", "when_received", "loses the job: what runs when its machine is killed is gone",
                             "leave it out, for when_saved"))  # fmt: skip
    return found


def _left_s(one: Pending, broker: Any, ours: str) -> float:
    if one.consumer == RELEASED or (ours and one.consumer.startswith(ours)):
        return 0.0
    limit_s = float(broker.idle_timeout) / 1000
    return max(0.0, (min(limit_s, LOST_S) if one.consumer.startswith(OURS) else limit_s) - one.idle_s)


async def _read_once(parts: Parts, names: Sequence[str]) -> Backlog:
    """With connections of this event loop: those of the broker and its sources belong to others."""
    from redis.asyncio import Redis

    pools = []

    def fresh(pool: Any) -> Any:
        pools.append(type(pool)(connection_class=pool.connection_class, **pool.connection_kwargs))
        return pools[-1]

    try:
        if parts.scheduler is not None:
            sources = [copy.copy(source) for source in parts.scheduler.sources]
            for source in sources:
                for name in ("_connection_pool", "connection_pool"):
                    if (pool := getattr(source, name, None)) is not None:
                        setattr(source, name, fresh(pool))
            scheduler = copy.copy(parts.scheduler)
            scheduler.sources = sources
            parts = parts._replace(scheduler=scheduler)
        return await read(Redis(connection_pool=fresh(parts.broker.connection_pool)), parts, names)
    finally:
        for pool in pools:
            await pool.disconnect()


def _aware(task: Any) -> Any:
    if task.time.tzinfo is None:
        from datetime import UTC

        task.time = task.time.replace(tzinfo=UTC)  # as taskiq reads it
    return task


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
