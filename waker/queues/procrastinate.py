"""Procrastinate (3.10.0 was read): what its tables tell.

Its own counts take what is due tomorrow for waiting, and its list of jobs brings every row, so this reads the tables in
one statement: ready is what `procrastinate_fetch_job_v2` would take now, and what a dead worker holds, which the drain
puts back. A worker is dead when its row has gone, or has had no heartbeat for `stalled_worker_timeout`. A periodic task
is ready when its time has come and nobody has deferred it yet: the drain does.

The reading has a connection of its own, in whichever thread, outside of the app's pool and of anybody's transaction.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..backlog import Backlog
from . import Finding, Row
from .hook import Nudges, nudge_after_transaction, nudge_with

if TYPE_CHECKING:
    from procrastinate import App

__all__ = ["ROWS", "Reader", "backlog", "findings", "nudge_on_enqueue", "queues_of", "reader_for", "stalled_s"]

ROWS = (
    Row(
        "Procrastinate (PostgreSQL)",
        "worker up myapp.tasks:app",
        "nudge_on_enqueue(app)",
        "everything; at once when the same Machine starts again, elsewhere after stalled_worker_timeout (30 s). A job "
        "without a retry strategy is begun again at most 3 times, then fails",
        "ready, running, delayed, retries, periodic tasks, dead workers",
        "a stalled_worker_timeout that live workers miss",
    ),
)

# procrastinate.worker.Worker's own defaults.
STALLED_S = 30.0
BEAT_S = 10.0
# procrastinate.periodic.MAX_DELAY: a periodic task that is later than this is left out.
PERIODIC_DELAY_S = 600.0
CONNECT_S = 5

# The lock's condition is that of procrastinate_fetch_job_v2.
READING = """
WITH wanted AS (
  SELECT * FROM procrastinate_jobs
   WHERE status IN ('todo', 'doing') AND (%(queues)s::varchar[] IS NULL OR queue_name = ANY (%(queues)s))
), held AS (
  SELECT coalesce(worker.last_heartbeat + %(stalled_s)s * interval '1 s', '-infinity') AS until
    FROM wanted LEFT JOIN procrastinate_workers worker
      ON worker.id = wanted.worker_id AND worker.id IS DISTINCT FROM %(ours)s::bigint
   WHERE wanted.status = 'doing'
)
SELECT (SELECT count(*) FROM wanted
         WHERE status = 'todo' AND (scheduled_at IS NULL OR scheduled_at <= now())
           AND NOT EXISTS (
             SELECT 1 FROM procrastinate_jobs other
              WHERE wanted.lock IS NOT NULL AND other.lock = wanted.lock
                AND (other.status = 'doing' OR other.status = 'todo' AND (
                       other.priority > wanted.priority OR other.priority = wanted.priority AND other.id < wanted.id)))
       ) AS due,
       (SELECT count(*) FROM held WHERE until < now()) AS abandoned,
       (SELECT count(*) FROM held WHERE until >= now()) AS running,
       extract(epoch FROM least(
         (SELECT min(scheduled_at) FROM wanted WHERE status = 'todo' AND scheduled_at > now()),
         (SELECT min(until) FROM held WHERE until >= now())) - now())::float8 AS due_in_s
"""
DEFERRED = """
SELECT task_name, periodic_id, max(defer_timestamp) AS at FROM procrastinate_periodic_defers GROUP BY 1, 2
"""
QUEUEING_LOCKS = """
SELECT queueing_lock AS name FROM procrastinate_jobs WHERE status = 'todo' AND queueing_lock = ANY (%(locks)s)
"""


class Reader:
    """Asks the database of one app, on a connection that it keeps; from any thread, also after a fork."""

    def __init__(self, app: "App") -> None:
        self._app = app
        self._connection: Any = None
        self._pid = 0

    def ask(self, query: str, **arguments: object) -> list[dict[str, Any]]:
        """The rows of an answer. Raises what psycopg does; a connection that broke is made again the next time."""
        connect = _connect_for(self._app)
        if connect is None:
            # Another connector, like Django's: it has a connection for each thread.
            rows: list[dict[str, Any]] = self._app.connector.get_sync_connector().execute_query_all(query, **arguments)
            return rows
        if self._connection is None or self._connection.closed or self._pid != os.getpid():
            self._connection = connect()
            self._pid = os.getpid()
        found: list[dict[str, Any]] = self._connection.execute(query, arguments).fetchall()
        return found


_readers: dict[int, tuple["App", Reader]] = {}


def reader_for(app: "App") -> Reader:
    """The reader of *app*, which lasts as long as the process."""
    known = _readers.get(id(app))
    if known is None:
        known = _readers.setdefault(id(app), (app, Reader(app)))
    return known[1]


def queues_of(app: "App", names: Sequence[str] = ()) -> list[str] | None:
    """The queues that a worker of *app* takes: *names*, those of its `worker_defaults`, or None for all."""
    chosen = names or app.worker_defaults.get("queues")
    return list(chosen) if chosen else None


def stalled_s(app: "App") -> float:
    """After so long without a heartbeat a worker counts as dead."""
    return float(app.worker_defaults.get("stalled_worker_timeout", STALLED_S))


def backlog(app: "App", names: Sequence[str] = (), ours: int | None = None) -> Backlog:
    """Read the tables afresh; what *ours*, a worker's number, holds counts as abandoned."""
    reader, queues = reader_for(app), queues_of(app, names)
    row = reader.ask(READING, queues=queues, stalled_s=stalled_s(app), ours=ours)[0]
    ready = row["due"] + row["abandoned"]
    due = [] if row["due_in_s"] is None else [time.time() + row["due_in_s"]]
    if app.periodic_registry.periodic_tasks:
        late, next_at = _periodic(app, reader, queues)
        ready += late
        due += next_at
    return Backlog(ready, row["running"], min(due, default=None))


def nudge_on_enqueue(app: "App", waker: Nudges | None = None) -> None:
    """From now on, nudge after each defer of a job that is ready at once.

    Inside a transaction of Django's it nudges on its commit. Where the caller gave its own connection, it nudges
    when the transaction on it has ended. A job deferred for later nudges nobody.
    """
    nudge = nudge_with(waker)
    manager: Any = app.job_manager
    defer, defer_async = manager.batch_defer_jobs, manager.batch_defer_jobs_async

    def wrapped(jobs: Any, connection: Any = None) -> Any:
        deferred = defer(jobs=jobs, connection=connection)
        _nudge_for(app, jobs, connection, nudge)
        return deferred

    async def wrapped_async(jobs: Any, connection: Any = None) -> Any:
        deferred = await defer_async(jobs=jobs, connection=connection)
        _nudge_for(app, jobs, connection, nudge)
        return deferred

    # What defers one job goes through these, too.
    manager.batch_defer_jobs, manager.batch_defer_jobs_async = wrapped, wrapped_async


def findings(app: "App") -> list[Finding]:
    """A time after which live workers count as dead, and their jobs are begun a second time."""
    beat_s = float(app.worker_defaults.get("update_heartbeat_interval", BEAT_S))
    if stalled_s(app) > 2 * beat_s:
        return []
    return [
        Finding(
            "stalled_worker_timeout",
            f"{stalled_s(app):g}",
            f"with a heartbeat each {beat_s:g} s (update_heartbeat_interval), a job that is running is taken for "
            "abandoned, and begun again elsewhere",
            f"set it to {3 * beat_s:g} or more",
        )
    ]


def _connect_for(app: "App") -> Callable[[], Any] | None:
    """What makes a connection to the database of *app*; None if its connector does not say how."""
    connector: Any = app.connector
    pool = getattr(connector, "_async_pool", None) or getattr(connector, "_pool", None)
    # A pool of the user's own knows better than what the connector was made with.
    if pool is not None and hasattr(pool, "conninfo"):
        conninfo, options = pool.conninfo, pool.kwargs or {}
    elif isinstance(given := getattr(connector, "_pool_args", None), dict):
        conninfo, options = given.get("conninfo", ""), given.get("kwargs") or {}
    else:
        return None
    if callable(conninfo) or callable(options):
        return None

    def connect() -> Any:
        import psycopg
        from psycopg.rows import dict_row

        settings = {"connect_timeout": CONNECT_S, "tcp_user_timeout": CONNECT_S * 1000, **options}
        settings.update(autocommit=True, row_factory=dict_row, prepare_threshold=None)
        return psycopg.connect(conninfo, **settings)

    return connect


def _periodic(app: "App", reader: Reader, queues: list[str] | None) -> tuple[int, list[float]]:
    """How many periodic tasks are due and not deferred, and when the next one is due."""
    from croniter import croniter

    now = time.time()
    longest_s = float(app.periodic_defaults.get("max_delay", PERIODIC_DELAY_S))
    deferred = {(row["task_name"], row["periodic_id"]): row["at"] for row in reader.ask(DEFERRED)}
    next_at: list[float] = []
    locks: list[str | None] = []
    for key, periodic in app.periodic_registry.periodic_tasks.items():
        job = periodic.task.configure(**{**periodic.configure_kwargs, "task_kwargs": None}).job
        if queues is not None and job.queue not in queues:
            continue
        next_at.append(croniter(periodic.cron, now).get_next(float))
        last = round(croniter(periodic.cron, now).get_prev(float))
        if now - last <= longest_s and (deferred.get(key) or 0) < last:
            locks.append(job.queueing_lock)
    named = [lock for lock in locks if lock is not None]
    # While a job with that lock waits, another one is not deferred.
    waiting = {row["name"] for row in reader.ask(QUEUEING_LOCKS, locks=named)} if named else set()
    return sum(lock not in waiting for lock in locks), next_at


def _nudge_for(app: "App", jobs: Any, connection: Any, nudge: Callable[[], None]) -> None:
    """Nudge when *jobs*, which have been deferred, can be seen by others. Never raises."""
    try:
        now = time.time()
        if all(job.scheduled_at is not None and job.scheduled_at.timestamp() > now for job in jobs):
            return
        if connection is not None:
            nudge_after_transaction(lambda: _is_in_transaction(connection), nudge)
        elif type(app.connector).__module__.startswith("procrastinate.contrib.django."):
            from django.db import transaction
            from procrastinate.contrib.django import settings

            transaction.on_commit(nudge, using=settings.settings.DATABASE_ALIAS)
        else:
            nudge()
    except Exception:
        nudge()  # rather too early than never: the watch sees to the rest


def _is_in_transaction(connection: Any) -> bool:
    from psycopg.pq import TransactionStatus

    return connection.info.transaction_status in (TransactionStatus.ACTIVE, TransactionStatus.INTRANS)
