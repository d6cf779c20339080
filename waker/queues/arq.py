"""arq (0.28.0 was read), on Redis.

A job stays in arq's queue, a sorted set by the time at which it is due, until it is finished; one that is running has
a key `arq:in-progress:<id>` beside it, which expires. Our drain writes into that key who runs it, and renews it.
The queue is read on a connection of its own: arq's is bound to the event loop of the app.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..backlog import Backlog
from ..errors import UsageError
from . import Finding, Row
from .hook import Nudges, nudge_with

if TYPE_CHECKING:
    from arq import ArqRedis, Worker

__all__ = ["IN_PROGRESS", "ROWS", "backlog", "client_of", "findings", "nudge_on_enqueue", "queue_of", "read"]

ROWS = (
    Row(
        "arq",
        "worker up myapp.tasks:WorkerSettings",
        "nudge_on_enqueue(pool), the pool that create_pool made",
        "everything; at once when the same Machine starts again, elsewhere after 30 s (held by a plain arq worker: "
        "after its longest timeout + 10 s). A job that nobody began within a day: loses the job (expires_extra_ms)",
        "ready, running, deferred, retries; not cron jobs",
        "cron_jobs, max_tries=1, retry_jobs=False",
    ),
)

IN_PROGRESS = "arq:in-progress:"
# So many of the jobs that are due are looked at; the rest counts as ready.
READ_MOST = 5_000
SOCKET_TIMEOUT_S = 30
SSL_SETTINGS = ("ssl_keyfile", "ssl_certfile", "ssl_cert_reqs", "ssl_ca_certs", "ssl_ca_data", "ssl_check_hostname")
POOL_SETTINGS = ("host", "port", "db", "username", "password", "path", *SSL_SETTINGS)
NO_KEY = -2  # as PTTL says it


def queue_of(target: Any) -> str:
    """The name of the queue that a pool writes to, or that a worker reads."""
    from arq.constants import default_queue_name

    name: str | None = getattr(target, "queue_name", None) or getattr(target, "default_queue_name", None)
    return name or default_queue_name


def client_of(target: Any) -> Any:
    """A client that blocks, for the same Redis."""
    import redis
    from arq.connections import ArqRedis, RedisSettings

    pool = target if isinstance(target, ArqRedis) else getattr(target, "redis_pool", getattr(target, "_pool", None))
    if pool is not None:
        kept = {key: value for key, value in pool.connection_pool.connection_kwargs.items() if key in POOL_SETTINGS}
        if "path" in kept:
            kept["unix_socket_path"] = kept.pop("path")
        kept["ssl"] = "SSL" in pool.connection_pool.connection_class.__name__
        return redis.Redis(**kept, socket_timeout=SOCKET_TIMEOUT_S)
    settings = getattr(target, "redis_settings", None) or RedisSettings()
    kept = {name: getattr(settings, name) for name in ("username", "password", *SSL_SETTINGS)}
    kept |= {"db": settings.database, "socket_timeout": SOCKET_TIMEOUT_S, "ssl": settings.ssl}
    if settings.sentinel:
        from redis.sentinel import Sentinel

        return Sentinel(settings.host, socket_timeout=SOCKET_TIMEOUT_S).master_for(settings.sentinel_master, **kept)
    return redis.Redis(host=settings.host, port=settings.port, unix_socket_path=settings.unix_socket_path,
                       socket_connect_timeout=settings.conn_timeout, **kept)  # fmt: skip


def backlog(target: "type | Worker | ArqRedis", _names: Sequence[str] = ()) -> Backlog:
    """Read the queue afresh. What a dead worker ran is ready when its key has expired."""
    client = client_of(target)
    try:
        return read(client, queue_of(target))
    finally:
        client.close()


def read(client: Any, queue: str) -> Backlog:
    """Read the queue named *queue*."""
    now = time.time()
    now_ms = int(now * 1000)
    with client.pipeline() as ask:
        ask.zcount(queue, "-inf", now_ms)
        ask.zrangebyscore(queue, "-inf", now_ms, start=0, num=READ_MOST)
        ask.zrangebyscore(queue, f"({now_ms}", "+inf", start=0, num=1, withscores=True)
        ready, ids, later = ask.execute()
    due = [score / 1000 for _, score in later]
    running = 0
    if ids:
        with client.pipeline(transaction=False) as ask:
            for one in ids:
                ask.pttl(IN_PROGRESS + one.decode())
            left_ms = [left for left in ask.execute() if left != NO_KEY]
        running = len(left_ms)
        due += [now + left / 1000 for left in left_ms if left >= 0]
    return Backlog(ready - running, running, min(due, default=None))


def nudge_on_enqueue(target: "ArqRedis", waker: Nudges | None = None) -> None:
    """From now on, nudge after each job that this pool enqueues. A deferred one nudges nobody: the watch wakes for it.

    Raises UsageError for anything but a pool: arq's settings do not enqueue.
    """
    if not hasattr(target, "enqueue_job"):
        raise UsageError("this cannot be hooked: with arq, a pool enqueues; give it the one that create_pool made")
    nudge, enqueue = nudge_with(waker), target.enqueue_job

    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        job = await enqueue(*args, **kwargs)
        if job is not None and not kwargs.get("_defer_until") and not kwargs.get("_defer_by"):
            nudge()
        return job

    wrapped.__wrapped__ = enqueue  # type: ignore[attr-defined]
    target.enqueue_job = wrapped


def findings(target: "type | Worker") -> list[Finding]:
    """Settings with which jobs are lost or never run."""
    found = []
    if not getattr(target, "retry_jobs", True):
        found.append(
            Finding("retry_jobs", "False", "loses the job: one that is cut off by a stop is not run again", "True")
        )
    if getattr(target, "max_tries", 5) == 1:
        risk = "loses the job: one that was running when its machine was killed is not run again"
        found.append(Finding("max_tries", "1", risk, "2 or more"))
    if cron := getattr(target, "cron_jobs", None):
        names = ", ".join(job.name for job in cron)
        risk = "worker up enqueues no cron job: when its time comes, no machine is up to see it"
        found.append(Finding("cron_jobs", names, risk, "enqueue them from a scheduled Machine"))
    return found
