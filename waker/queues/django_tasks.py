"""Django tasks in the database: what the table tells.

django-tasks-db 0.13.0 was read, with django-tasks 0.12.0 on Django 5.2, and tried with Django 6.1's own `django.tasks`.
Ready is what `DBTaskResult.objects.ready()` says, in the queues of one backend, and what a dead worker of ours holds.
The library has no heartbeat: a row of a worker that was killed says RUNNING for ever. So a worker of ours has a name
that tells whether it lives: on PostgreSQL it holds an advisory lock on that name for as long as its session lasts, on
SQLite its process is on this host. Of a plain `db_worker` nobody can tell.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..backlog import Backlog
from ..errors import UsageError
from . import Finding, Row
from .hook import Nudges, nudge_with

if TYPE_CHECKING:
    from django_tasks_db.backend import DatabaseBackend

__all__ = ["ROWS", "abandoned", "backend_of", "backlog", "database_of", "findings", "name_of_process",
           "nudge_on_enqueue", "rows_of"]  # fmt: skip

ROWS = tuple(
    Row(
        f"Django tasks ({database})",
        "worker up mysite.asgi:application (--queues high,low as with db_worker --queue-name)",
        "nudge_on_enqueue(application), or of task_backends[…] in AppConfig.ready",
        f"everything; at once when the same Machine starts again, elsewhere {elsewhere}. A job is begun again at most "
        "3 times, then fails. What a plain db_worker held when it was killed: loses the job (it says RUNNING for ever)",
        "ready, running, run_after, dead workers of ours",
        warns,
    )
    for database, elsewhere, warns in (
        ("PostgreSQL", "when the server has noticed that the session is gone (half a minute)", "nothing"),
        ("SQLite", "never: the file belongs to one Machine", "a file, which has to be on a volume"),
    )
)

# Names of our workers begin so.
OURS = "wake-"
HELD_NAMES = """
SELECT name FROM unnest(%s::text[]) AS name WHERE EXISTS (
  SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND granted
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
     AND (classid::bigint << 32 | objid::bigint) = hashtextextended(name, 0))
"""


def backend_of(target: Any) -> "DatabaseBackend":
    """The backend that *target* means: itself, or the default one of a Django application.

    Raises UsageError if that does not keep its tasks in the database.
    """
    import django
    from django.apps import apps

    if not apps.models_ready:  # they are in AppConfig.ready
        django.setup()
    from django_tasks_db.backend import DatabaseBackend
    from django_tasks_db.compat import DEFAULT_TASK_BACKEND_ALIAS, task_backends

    backend: Any = target
    if hasattr(target, "_connections") and hasattr(target, "_alias"):
        backend = target._connections[target._alias]  # default_task_backend is a proxy
    elif hasattr(target, "load_middleware"):
        backend = task_backends[DEFAULT_TASK_BACKEND_ALIAS]
    if not isinstance(backend, DatabaseBackend):
        kind = f"{type(backend).__module__}.{type(backend).__qualname__}"
        raise UsageError(f"it is a {kind}; its tasks must be in the database, with TASKS = {{'default': {{'BACKEND': "
                         "'django_tasks_db.DatabaseBackend'}}}}, or name another one of task_backends")  # fmt: skip
    return backend


def database_of() -> str:
    """The database that the table is in, by Django's name for it: where it is written, never a replica."""
    from django.db import router
    from django_tasks_db.models import DBTaskResult

    return str(router.db_for_write(DBTaskResult))


def rows_of(backend: "DatabaseBackend", names: Sequence[str] = ()) -> Any:
    """The rows of the queues that a worker takes: *names*, "*" for all, or the default one."""
    from django_tasks_db.compat import DEFAULT_TASK_QUEUE_NAME
    from django_tasks_db.models import DBTaskResult

    rows = DBTaskResult.objects.using(database_of()).filter(backend_name=backend.alias)
    return rows if "*" in names else rows.filter(queue_name__in=list(names) or [DEFAULT_TASK_QUEUE_NAME])


def backlog(target: Any, names: Sequence[str] = (), ours: str = "") -> Backlog:
    """Read the table afresh; what a worker holds whose name begins with *ours* counts as abandoned."""
    from django.db import close_old_connections
    from django.db.models import Min, Q
    from django.utils import timezone
    from django_tasks_db.models import get_date_max

    rows = rows_of(backend_of(target), names)
    # Of a thread whose connection has broken, or is older than CONN_MAX_AGE.
    close_old_connections()
    ready = rows.ready().count()
    running = list(rows.running().values_list("id", "worker_ids"))
    later = Q(status="READY", run_after__gt=timezone.now()) & ~Q(run_after=get_date_max())
    due = rows.filter(later).aggregate(at=Min("run_after"))["at"]
    lost = len(abandoned(running, ours))
    return Backlog(ready + lost, len(running) - lost, due.timestamp() if due is not None else None)


def abandoned(running: Sequence[tuple[Any, Sequence[str]]], ours: str = "") -> list[Any]:
    """Of (id, worker_ids) of running rows the ids of those whose worker is known to be dead."""
    last = {row: workers[-1] for row, workers in running if workers and workers[-1].startswith(OURS)}
    alive = _alive({name for name in last.values() if not (ours and name.startswith(ours))})
    return [row for row, name in last.items() if name not in alive]


def name_of_process(machine: str, run: str) -> str:
    """What a worker of ours is called: its machine, its run, and its process, which SQLite's other users look for."""
    return f"{OURS}{machine[:20]}-{run[:8]}-{os.getpid()}-{_started(os.getpid())}"


def nudge_on_enqueue(target: Any, waker: Nudges | None = None) -> None:
    """From now on, nudge after each enqueue of a task that is ready at once, on the commit that brings it."""
    from django.db import transaction
    from django.utils import timezone
    from django_tasks_db.compat import task_enqueued

    backend, nudge = backend_of(target), nudge_with(waker)

    def enqueued(task_result: Any, **_: object) -> None:
        later = task_result.task.run_after
        if task_result.backend == backend.alias and (later is None or later <= timezone.now()):
            transaction.on_commit(nudge, using=database_of(), robust=True)

    task_enqueued.connect(enqueued, weak=False)


def findings(target: Any) -> list[Finding]:
    """A database that goes with the machine."""
    from django.db import connections

    backend_of(target)
    alias = database_of()
    settings = connections[alias].settings_dict
    if connections[alias].vendor != "sqlite":
        return []
    return [
        Finding(
            f"DATABASES[{alias!r}]['NAME']",
            str(settings["NAME"]),
            "on the file system of a Machine itself, which is wiped at each stop, it loses every job",
            "put the file on a volume (then one Machine sees it), or use PostgreSQL",
        )
    ]


def _alive(names: set[str]) -> set[str]:
    """Of names of our workers those that may live."""
    from django.db import connections

    if not names:
        return set()
    connection = connections[database_of()]
    if connection.vendor == "sqlite":
        return {name for name in names if name.split("-")[-1] == str(_started(int(name.split("-")[-2])))}
    if connection.vendor != "postgresql":
        return names
    with connection.cursor() as cursor:
        cursor.execute(HELD_NAMES, [list(names)])
        return {row[0] for row in cursor.fetchall()}


def _started(pid: int) -> int:
    """When the process *pid* was started, in ticks since the boot, with something of the boot; 0 if there is none."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
            salt = int(boot.read(8), 16)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return int(stat.read().rpartition(")")[2].split()[19]) ^ salt
    except (OSError, ValueError, IndexError):
        return 0
