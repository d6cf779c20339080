"""PgQueuer (1.6.0 was read): what its tables tell.

Its own counts either take what is due tomorrow for waiting, or say no more than "some", so this reads the table in one
statement. Ready is what is due, in an entrypoint that this worker has and whose `concurrency_limit` leaves room, and
what a worker holds whose heartbeat is older than its `heartbeat_timeout`. A schedule whose time has come is ready, too.

A PgQueuer belongs to the event loop of its connection, so a worker and a watch are given the factory that `pgq run`
takes: an asynccontextmanager which says that it makes a PgQueuer. Its Queries, too, can be watched from another thread
than that of their loop; they know of no limits and schedules.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..backlog import Backlog
from ..errors import UsageError
from . import Finding, Row
from .hook import Nudges, nudge_after_transaction, nudge_with
from .reading import read_now

if TYPE_CHECKING:
    from pgqueuer import PgQueuer, Queries

__all__ = ["ROWS", "Reading", "backlog", "findings", "heartbeat_s", "nudge_on_enqueue", "read"]

ROWS = (
    Row(
        "PgQueuer (PostgreSQL)",
        "worker up myapp.tasks:main (the factory that `pgq run` takes, annotated: `-> AsyncGenerator[PgQueuer, None]`)",
        "nudge_on_enqueue(queries)",
        "everything; at once when the same Machine starts again, elsewhere after heartbeat_timeout (30 s). A job that "
        "was abandoned more than 3 times is held as failed",
        "ready, running, deferred, retries, schedules, dead workers",
        "UNLOGGED tables (durability=volatile)",
    ),
)

# PgQueuer.run's own default.
HEARTBEAT_S = 30.0
READ_S = 10.0


class Reading(NamedTuple):
    """One statement, and what makes a Backlog of its rows."""

    query: str
    arguments: tuple[object, ...]
    backlog_of: Callable[[Sequence[Mapping[str, Any]]], Backlog]


def read(manager: Any, ours: object = None) -> Reading:
    """How the backlog of a PgQueuer, a QueueManager or its Queries is read.

    What *ours*, a queue_manager_id, holds counts as abandoned.
    """
    from datetime import timedelta

    queries = getattr(manager, "queries", manager)
    registry = getattr(getattr(manager, "qm", manager), "entrypoint_registry", None)
    schedules = getattr(getattr(manager, "sm", None), "registry", {})
    names = queries.qbq.settings.qualified
    limits = {} if registry is None else {name: one.parameters.concurrency_limit for name, one in registry.items()}

    def backlog_of(rows: Sequence[Mapping[str, Any]]) -> Backlog:
        ready = running = 0
        due: list[float] = []
        for row in rows:
            waiting = row["due"] + row["stale"]
            limit = limits.get(row["entrypoint"], 0)
            # One after the other, all of them are; but none while others hold all there is.
            ready += waiting if limit <= 0 or row["taken"] < limit else 0
            running += row["held"]
            due += [] if row["due_in_s"] is None else [time.time() + row["due_in_s"]]
        return Backlog(ready, running, min(due, default=None))

    # A picked job has a heartbeat from the start. The schedules' own time for a dead worker is fixed.
    stale = "status = 'picked' AND (heartbeat < now() - $1::interval OR queue_manager_id IS NOT DISTINCT FROM $5::uuid)"
    held = f"status = 'picked' AND NOT ({stale})"
    return Reading(
        f"""
        SELECT entrypoint,
               count(*) FILTER (WHERE status = 'queued' AND execute_after < now()) AS due,
               count(*) FILTER (WHERE {stale}) AS stale,
               count(*) FILTER (WHERE {held}) AS held,
               count(*) FILTER (WHERE queue_manager_id IS NOT NULL AND NOT ({stale})) AS taken,
               extract(epoch FROM min(CASE
                 WHEN status = 'queued' AND execute_after >= now() THEN execute_after
                 WHEN {held} THEN heartbeat + $1::interval
               END) - now())::float8 AS due_in_s
          FROM {names.queue_table}
         WHERE status IN ('queued', 'picked') AND ($2::text[] IS NULL OR entrypoint = ANY ($2::text[]))
         GROUP BY entrypoint
         UNION ALL
        SELECT '',
               count(*) FILTER (WHERE status = 'queued' AND next_run <= now()
                                   OR status = 'picked' AND heartbeat < now() - interval '30 s'),
               0,
               count(*) FILTER (WHERE status = 'picked' AND heartbeat >= now() - interval '30 s'),
               0,
               extract(epoch FROM min(CASE
                 WHEN status = 'queued' AND next_run > now() THEN next_run
                 WHEN status = 'picked' AND heartbeat >= now() - interval '30 s' THEN heartbeat + interval '30 s'
               END) - now())::float8
          FROM {names.schedules_table}
         WHERE (entrypoint, expression) IN (SELECT unnest($3::text[]), unnest($4::text[]))
        """,  # noqa: S608 - the names are checked by PgQueuer's settings
        (
            timedelta(seconds=heartbeat_s(manager)),
            None if registry is None else list(registry),
            [key.entrypoint for key in schedules],
            [key.expression for key in schedules],
            ours,
        ),
        backlog_of,
    )


def heartbeat_s(manager: Any) -> float:
    """After so long without a heartbeat a job counts as abandoned: what the manager's own `run` has as a default."""
    import inspect

    run = getattr(manager, "run", None)
    default = inspect.signature(run).parameters.get("heartbeat_timeout") if run is not None else None
    return float(default.default.total_seconds()) if default is not None else HEARTBEAT_S


def backlog(target: "Callable[[], Any] | PgQueuer | Queries", names: Sequence[str] = ()) -> Backlog:
    """Read the table afresh; of a factory, what it makes, on a connection that lasts for this reading."""
    if not hasattr(target, "queries") and not hasattr(target, "driver"):
        return read_now(_read_once(target))
    reading = read(target)
    driver: Any = getattr(getattr(target, "queries", target), "driver", None)
    if not asyncio.iscoroutinefunction(driver.fetch):
        return reading.backlog_of(driver.fetch(reading.query, *reading.arguments))
    place = getattr(driver, "_pool", None) or getattr(driver, "_connection", None)
    loop: asyncio.AbstractEventLoop | None = getattr(place, "_loop", None)
    if loop is None or not loop.is_running() or loop is asyncio._get_running_loop():
        raise UsageError("this PgQueuer can only be read from another thread than its event loop's, while that runs, "
                         "and through asyncpg; give the factory that `pgq run` takes")  # fmt: skip
    rows = asyncio.run_coroutine_threadsafe(driver.fetch(reading.query, *reading.arguments), loop).result(READ_S)
    return reading.backlog_of(rows)


def nudge_on_enqueue(target: "PgQueuer | Queries", waker: Nudges | None = None) -> None:
    """From now on, nudge after each enqueue through these Queries (or SyncQueries, or those of this PgQueuer).

    On a connection with an open transaction it nudges when that has ended. A job that is deferred nudges nobody.
    """
    if not hasattr(target, "queries") and not hasattr(target, "driver"):
        raise UsageError("this cannot be hooked: it is a factory; give the Queries that the app enqueues with")
    queries: Any = getattr(target, "queries", target)
    nudge, enqueue = nudge_with(waker), queries.enqueue

    if asyncio.iscoroutinefunction(enqueue):

        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            enqueued = await enqueue(*args, **kwargs)
            _nudge_for(queries, args, kwargs, nudge)
            return enqueued

        queries.enqueue = wrapped
    else:

        def wrapped_sync(*args: Any, **kwargs: Any) -> Any:
            enqueued = enqueue(*args, **kwargs)
            _nudge_for(queries, args, kwargs, nudge)
            return enqueued

        queries.enqueue = wrapped_sync


def findings(_target: object) -> list[Finding]:
    """Tables that PostgreSQL empties after a crash."""
    from pgqueuer.domain.settings import db_settings

    durability = db_settings().durability
    if not durability.config.queue_table:
        return []
    return [
        Finding(
            "PGQUEUER_DURABILITY",
            str(durability.value),
            "after a crash of the server every job is gone",
            "set it to durable, and run `pgq durability durable`",
        )
    ]


def _nudge_for(queries: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], nudge: Callable[[], None]) -> None:
    """Nudge if one of the jobs is due, when others can see it. Never raises."""
    try:
        later = kwargs.get("execute_after", args[3] if len(args) > 3 else None)
        delays = later if isinstance(later, list) else [later]
        if delays and all(delay is not None and delay.total_seconds() > 0 for delay in delays):
            return
    except Exception:
        nudge()
        return
    connection = getattr(queries.driver, "_connection", None)  # none of a pool is the caller's
    nudge_after_transaction(lambda: _is_in_transaction(connection), nudge)


def _is_in_transaction(connection: Any) -> bool:
    if hasattr(connection, "is_in_transaction"):
        return bool(connection.is_in_transaction())
    if hasattr(connection, "info"):
        from psycopg.pq import TransactionStatus

        return connection.info.transaction_status in (TransactionStatus.ACTIVE, TransactionStatus.INTRANS)
    return False


async def _read_once(factory: Any) -> Backlog:
    async with factory() as manager:
        reading = read(manager)
        queries = manager.queries
        return reading.backlog_of(await queries.driver.fetch(reading.query, *reading.arguments))
