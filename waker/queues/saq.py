"""SAQ (0.26.4 was read), on Redis and on PostgreSQL.

The queue is read on a connection of its own: SAQ's are bound to the event loop of the app. What is ready is what SAQ's
own `schedule` and `dequeue` would take. A job that is active counts as abandoned when its timeout or its heartbeat is
over (`Job.stuck`); one that has neither, never.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..backlog import Backlog
from ..errors import UsageError
from . import Finding, Row
from .hook import Nudges, nudge_with

if TYPE_CHECKING:
    from saq import Queue, Worker

__all__ = ["ROWS", "Reader", "backlog", "findings", "nudge_on_enqueue", "queue_of", "reader_of"]

ROWS = tuple(
    Row(
        f"SAQ ({broker})",
        "worker up myapp.tasks:settings (or a Worker)",
        "nudge_on_enqueue(queue)",
        "everything; at once when the same Machine starts again, elsewhere after the job's timeout (10 s) or "
        "heartbeat, and with neither only there. A job that is out of retries is begun again at most 3 times, then "
        "aborted",
        "ready, running, scheduled, retries, abandoned jobs; not cron jobs",
        "cron_jobs",
    )
    for broker in ("Redis", "PostgreSQL")
)

SOCKET_TIMEOUT_S = 30
SETTINGS = ("host", "port", "db", "username", "password", "path", "ssl_keyfile", "ssl_certfile", "ssl_cert_reqs",
            "ssl_ca_certs", "ssl_ca_data", "ssl_check_hostname")  # fmt: skip
# On Redis, a job that is seen for so long as taken and not yet active was left so by a worker that died.
TAKEN_S = 10.0
SEEN_S = 60
# Long enough for a job to be put back; the other drainers leave it alone meanwhile.
CLAIM_S = 10


def queue_of(target: Any) -> Any:
    """The Queue itself, the Worker's, or that of a dict with settings."""
    return target["queue"] if isinstance(target, dict) else getattr(target, "queue", target)


class Reader:
    """A connection for reading one queue. `active` are its jobs that some worker holds."""

    errors: tuple[type[BaseException], ...] = ()

    def read(self) -> Backlog:
        raise NotImplementedError

    def active(self) -> list[Any]:
        raise NotImplementedError

    def claim(self, job: Any) -> bool:
        """Whether the caller may put back this one of `active`: one drainer at a time may, if it is as it was."""
        raise NotImplementedError

    def let_go(self) -> None:
        """What was claimed has been put back."""

    def close(self) -> None:
        raise NotImplementedError


def reader_of(target: Any) -> Reader:
    """Raises UsageError for a queue on something else than Redis and PostgreSQL."""
    queue = queue_of(target)
    if hasattr(queue, "redis"):
        return _Redis(queue)
    if hasattr(queue, "pool"):
        return _Postgres(queue)
    raise UsageError(f"a {type(queue).__name__} of SAQ cannot be read: expected a RedisQueue or a PostgresQueue")


def backlog(target: "Queue | Worker[Any] | dict[str, Any]", _names: Sequence[str] = ()) -> Backlog:
    """Read the queue afresh."""
    reader = reader_of(target)
    try:
        return reader.read()
    finally:
        reader.close()


def held_until(job: Any) -> float | None:
    """When a job that is active counts as abandoned; None for never."""
    if not job.started:
        return float(job.touched / 1000 + TAKEN_S)
    limits = ((job.started, job.timeout), (job.touched, job.heartbeat))
    ends: list[float] = [since / 1000 + most for since, most in limits if most]
    return min(ends, default=None)


def _sum(waiting: int, later: float | None, active: Sequence[Any]) -> Backlog:
    now = time.time()
    ends = [held_until(job) for job in active]
    lost = sum(end is not None and end < now for end in ends)
    due = [end for end in (*ends, later) if end is not None and end >= now]
    return Backlog(waiting + lost, len(ends) - lost, min(due, default=None))


class _Redis(Reader):
    def __init__(self, queue: Any) -> None:
        import redis

        self.errors = (redis.ConnectionError, redis.TimeoutError)
        self._queue = queue
        pool = queue.redis.connection_pool
        kept = {key: value for key, value in pool.connection_kwargs.items() if key in SETTINGS}
        if "path" in kept:
            kept["unix_socket_path"] = kept.pop("path")
        kept["ssl"] = "SSL" in pool.connection_class.__name__
        self._client = redis.Redis(**kept, socket_timeout=SOCKET_TIMEOUT_S)
        self._waiting, self._later, self._active = map(queue.namespace, ("queued", "incomplete", "active"))

    def read(self) -> Backlog:
        now = time.time()
        with self._client.pipeline() as ask:
            ask.llen(self._waiting)
            # Jobs that are not for later are there, too, with 0.
            ask.zcount(self._later, 1, now)
            ask.zrangebyscore(self._later, f"({now}", "+inf", start=0, num=1, withscores=True)
            waiting, due, later = ask.execute()
        return _sum(waiting + due, later[0][1] if later else None, self.active())

    def active(self) -> list[Any]:
        ids = self._client.lrange(self._active, 0, -1)
        found = self._client.mget(ids) if ids else []
        jobs = [job for job in map(self._queue.deserialize, found) if job is not None]
        for job in jobs:
            if not job.started:
                # Between two steps of a worker, or left there by one that died: note when it was seen first.
                seen = f"wake-on-request:seen:{job.id}:{job.touched}"
                with self._client.pipeline() as ask:
                    ask.set(seen, int(time.time() * 1000), nx=True, ex=SEEN_S)
                    ask.get(seen)
                    job.touched = int(ask.execute()[1])
        return jobs

    def claim(self, job: Any) -> bool:
        return bool(self._client.set(f"wake-on-request:recovers:{job.id}", 1, nx=True, ex=CLAIM_S))

    def close(self) -> None:
        self._client.close()


class _Postgres(Reader):
    def __init__(self, queue: Any) -> None:
        import psycopg

        self.errors = (psycopg.OperationalError, psycopg.InterfaceError)
        self._queue = queue
        self._connection: Any = None

    def _ask(self, question: str, **values: Any) -> list[Any]:
        import psycopg

        queue = self._queue
        if self._connection is None or self._connection.closed:
            given = queue.pool.kwargs if isinstance(queue.pool.kwargs, dict) else queue.pool.kwargs()
            kept = {key: value for key, value in given.items() if key != "autocommit"}
            self._connection = psycopg.connect(queue.pool.conninfo, autocommit=True, **kept)
        low, high = queue._priorities
        values |= {"queue": queue.name, "now": time.time(), "low": low, "high": high}
        try:
            asked = self._connection.execute(psycopg.sql.SQL(question).format(jobs=queue.jobs_table), values)
            rows: list[Any] = asked.fetchall()
        except psycopg.errors.UndefinedTable:
            return []  # nobody has connected this queue yet, so nothing was sent to it
        return rows

    def read(self) -> Backlog:
        found = self._ask(
            """
            select count(*) filter (where scheduled <= %(now)s and group_key not in (
                       select distinct group_key from {jobs}
                       where status = 'active' and queue = %(queue)s and group_key is not null)),
                   min(scheduled) filter (where scheduled > %(now)s)
            from {jobs}
            where status = 'queued' and queue = %(queue)s and priority between %(low)s and %(high)s
            """
        )
        waiting, later = found[0] if found else (0, None)
        return _sum(waiting, later, self.active())

    def active(self) -> list[Any]:
        rows = self._ask("select job, status from {jobs} where status in ('active', 'aborting') and queue = %(queue)s")
        return [self._queue.deserialize(*row) for row in rows]

    def claim(self, job: Any) -> bool:
        lock = "select pg_try_advisory_lock(hashtext('wake-on-request'), hashtext(%(key)s))"
        same = "select job, status from {jobs} where key = %(key)s and status in ('active', 'aborting')"
        if not self._ask(lock, key=job.key)[0][0]:
            return False
        rows = self._ask(same, key=job.key)
        return bool(rows) and self._queue.deserialize(*rows[0]).started == job.started

    def let_go(self) -> None:
        self._ask("select pg_advisory_unlock_all()")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def nudge_on_enqueue(target: "Queue | Worker[Any] | dict[str, Any]", waker: Nudges | None = None) -> None:
    """From now on, nudge after each enqueue to this queue (SAQ's hook comes before the write). A job for later nudges
    nobody: the watch wakes for it."""
    queue = queue_of(target)
    nudge, enqueue = nudge_with(waker), queue.enqueue

    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        job = await enqueue(*args, **kwargs)
        if job is not None and job.scheduled <= time.time():
            nudge()
        return job

    wrapped.__wrapped__ = enqueue  # type: ignore[attr-defined]
    queue.enqueue = wrapped


def findings(target: "Queue | Worker[Any] | dict[str, Any]") -> list[Finding]:
    """Settings with which jobs are never run."""
    cron = target.get("cron_jobs") if isinstance(target, dict) else getattr(target, "cron_jobs", None)
    if not cron:
        return []
    risk = "worker up enqueues no cron job: when its time comes, no machine is up to see it"
    names = ", ".join(job.function.__qualname__ for job in cron)
    return [Finding("cron_jobs", names, risk, "enqueue them from a scheduled Machine")]
