"""Huey (3.5.4 was read), on Redis and on SQLite.

A task for later is among the ordinary ones until a consumer has seen it, and in the schedule after that: both are read.
Huey itself keeps no note of what a consumer has taken. Our drain does, beside the queue: in two hashes in Redis, in a
table in SQLite.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..backlog import Backlog
from . import Finding, Row
from .hook import Nudges, nudge_with

if TYPE_CHECKING:
    from huey import Huey
    from huey.consumer import Consumer

__all__ = ["ROWS", "alive_key", "backlog", "eta_of", "findings", "held_key", "huey_of", "nudge_on_enqueue",
           "storage_kind"]  # fmt: skip

ROWS = tuple(
    Row(
        f"Huey ({storage})",
        "worker up myapp.tasks:huey (or a Consumer, for its number of threads)",
        "nudge_on_enqueue(huey)",
        f"everything that worker up runs; at once when the same Machine starts again, {elsewhere} (a job that kills "
        "its worker is begun again for ever; a lock_task without ttl stays locked). huey_consumer: loses the job",
        "ready, running under worker up, delayed, retries; not periodic tasks",
        "periodic tasks" + file,
    )
    for storage, elsewhere, file in (
        ("Redis", "elsewhere after 30 s", ""),
        ("SQLite", "another process after 30 s", ", fsync=False"),
    )
)

# So many waiting tasks are looked at; the rest counts as ready.
READ_MOST = 2_000


def huey_of(target: Any) -> Any:
    """The Huey itself, or the Consumer's."""
    return target.huey if hasattr(target, "worker_threads") else target


def storage_kind(huey: Any) -> str:
    """ "redis", "sqlite", or "" for one whose tasks are lost with the worker that took them."""
    from huey.storage import RedisStorage, SqliteStorage

    kinds = ((RedisStorage, "redis"), (SqliteStorage, "sqlite"))
    return next((name for kind, name in kinds if isinstance(huey.storage, kind)), "")


def held_key(storage: Any) -> str:
    """A hash of what is held, by "OWNER NUMBER RANK"."""
    return f"wake-on-request.held.{storage.queue_key}"


def alive_key(storage: Any) -> str:
    """A hash of how long each owner is sure to live."""
    return f"wake-on-request.alive.{storage.queue_key}"


def eta_of(huey: Any, data: bytes) -> float | None:
    """When the task in *data* may run, Unix time; None for at once."""
    import datetime as dt

    eta = huey.serializer.deserialize(data).eta
    if eta is None:
        return None
    aware = eta.replace(tzinfo=dt.UTC) if huey.utc and eta.tzinfo is None else eta
    at: float = aware.timestamp()
    return at


def backlog(target: "Huey | Consumer", _names: Sequence[str] = ()) -> Backlog:
    """Read the queue afresh."""
    huey = huey_of(target)
    now = time.time()
    ready = huey.pending_count()
    due: list[float] = []
    if ready:
        ahead = [at for at in _etas(huey, huey.storage.enqueued_items(READ_MOST)) if at > now]
        ready, due = max(0, ready - len(ahead)), ahead
    first = _etas(huey, huey.storage.scheduled_items(1))
    if first and first[0] <= now:
        first = _etas(huey, huey.storage.scheduled_items(READ_MOST))
        ready += sum(at <= now for at in first)
    due += [at for at in first if at > now][:1]
    running = 0
    for until in _held(huey):
        if until > now:
            running += 1
            due.append(until)
        else:
            ready += 1
    return Backlog(ready, running, min(due, default=None))


def _etas(huey: Any, items: Sequence[bytes]) -> list[float]:
    return [at for at in (eta_of(huey, data) for data in items) if at is not None]


def _held(huey: Any) -> list[float]:
    """Until when each task that was taken is sure to have somebody who runs it."""
    storage, kind = huey.storage, storage_kind(huey)
    if kind == "redis":
        with storage.conn.pipeline() as ask:
            ask.hkeys(held_key(storage))
            ask.hgetall(alive_key(storage))
            fields, alive = ask.execute()
        return [float(alive.get(field.split(b" ")[0], 0)) for field in fields]
    if kind == "sqlite":
        known = "select 1 from sqlite_master where type = 'table' and name = ?"
        if storage.sql(known, ("wake_on_request_held",), results=True):
            rows = storage.sql("select until from wake_on_request_held where queue = ?", (storage.name,), results=True)
            return [until for (until,) in rows]
    return []


def nudge_on_enqueue(target: "Huey | Consumer", waker: Nudges | None = None) -> None:
    """From now on, nudge after each enqueue (Huey's signal comes before the write). A task for later nudges nobody."""
    huey = huey_of(target)
    nudge, enqueue = nudge_with(waker), huey.enqueue

    def wrapped(task: Any) -> Any:
        result = enqueue(task)
        # A group or a chord has no eta; its tasks come through here one by one.
        if not huey.immediate and (getattr(task, "eta", None) is None or huey.ready_to_run(task)):
            nudge()
        return result

    wrapped.__wrapped__ = enqueue  # type: ignore[attr-defined]
    huey.enqueue = wrapped


def findings(target: "Huey | Consumer") -> list[Finding]:
    """Settings with which tasks are lost or never run."""
    huey = huey_of(target)
    found = []
    kind = storage_kind(huey)
    if not kind:
        risk = "loses the job: what runs when its machine is killed is gone"
        found.append(Finding("storage_class", type(huey.storage).__name__, risk, "RedisHuey or SqliteHuey"))
    if kind == "sqlite" and huey.storage_kwargs.get("fsync") is False:
        found.append(Finding("fsync", "False", "jobs of the last moments are lost with the host", "leave it out"))
    if huey.immediate:
        found.append(Finding("immediate", "True", "tasks run in the app, and nothing is ever enqueued", "False"))
    if periodic := [task.name for task in huey._registry.periodic_tasks]:
        risk = "worker up enqueues no periodic task: when its time comes, no machine is up to see it"
        found.append(Finding("periodic_task", ", ".join(periodic), risk, "enqueue them from a scheduled Machine"))
    return found
