"""Django tasks in the database (django-tasks-db 0.13.0 was read): the worker of `db_worker`, in this process.

What differs from `manage.py db_worker --batch`:

- what a dead worker of ours held is put back, at most LOST_MOST times for one task (the library leaves it RUNNING);
- for that a worker holds an advisory lock on its name, on a session of its own (PostgreSQL; a pooler that gives the
  session to others between two statements hides a death from other Machines, not from the same one);
- signals are the drainer's: the worker stops between two tasks when it is told to, and a task that takes too long is
  put back.
"""

import threading
import uuid
from typing import Any

from ..aside import late
from . import Backlog, Options, Pulse, Refused

__all__ = ["Drain"]

probe = late("waker.queues.django_tasks")

LOST_MOST = 3
# While SQLite is locked by somebody else, it is tried again so often.
LOCKED_S = 0.1
# A server that is told of no end of a session asks after it, so that the lock of a lost host goes within half a minute.
KEEPALIVE = "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"
HOLD = "SELECT pg_advisory_lock(hashtextextended(%s, 0))"


class Drain:
    """Runs the tasks of one backend, one at a time, as one db_worker does."""

    def __init__(self, target: Any, pulse: Pulse, options: Options) -> None:
        errors = late("waker.errors")
        try:
            self._backend = probe.backend_of(target)
        except errors.UsageError as error:
            raise Refused(str(error)) from error
        from django.db import InterfaceError, OperationalError

        self.broker_errors: tuple[type[BaseException], ...] = (OperationalError, InterfaceError)
        self._target = target
        self._pulse = pulse
        self._names = options.queues
        self._machine = options.machine[:20] or uuid.uuid4().hex[:12]
        self._ours = f"{probe.OURS}{self._machine}-"
        self._session: Any = None  # holds the lock on the worker's name
        self._worker_id = ""
        self._running: Any = None

    def backlog(self) -> Backlog:
        reading: Backlog = probe.backlog(self._target, self._names, self._ours)
        return reading

    def work(self, stop: threading.Event) -> int:
        try:
            self._hold_name()
            self._recover()
            self._make(stop).run()
        except self.broker_errors:
            self._let_go()
            raise
        finally:
            self._pulse.running = 0
        return 0

    def release(self) -> None:
        """On this thread, which gets a connection of its own."""
        row = self._running
        if row is not None:
            probe.rows_of(self._backend, ["*"]).running().filter(id=row.id).update(status="READY", started_at=None)

    def _make(self, stop: threading.Event) -> Any:
        from django_tasks_db.compat import DEFAULT_TASK_QUEUE_NAME
        from django_tasks_db.management.commands.db_worker import Worker

        drain, pulse = self, self._pulse

        class Drained(Worker):  # type: ignore[misc]
            @property
            def running(self) -> bool:
                return not stop.is_set()

            @running.setter
            def running(self, _: bool) -> None:
                pass  # it stops when the drainer is told to

            def run_task(self, db_task_result: Any) -> None:
                drain._running = db_task_result
                pulse.running = 1
                try:
                    super().run_task(db_task_result)
                    pulse.failed += db_task_result.status == "FAILED"
                finally:
                    drain._running = None
                    pulse.running = 0
                    pulse.done += 1

        return Drained(
            queue_names=list(self._names) or [DEFAULT_TASK_QUEUE_NAME],
            interval=LOCKED_S,
            batch=True,
            backend_name=self._backend.alias,
            startup_delay=False,
            max_tasks=None,
            worker_id=self._worker_id,
            excluded_queue_names=[],
        )

    def _hold_name(self) -> None:
        """Take a name, and on PostgreSQL a session that lasts as long as we do: Django closes its own between tasks."""
        from django.db import connections

        if self._worker_id:
            return
        name = probe.name_of_process(self._machine, uuid.uuid4().hex)
        connection = connections[probe.database_of()]
        if connection.vendor == "postgresql":
            session = connection.copy()
            with session.cursor() as cursor:
                cursor.execute(KEEPALIVE)
                cursor.execute(HOLD, [name])
            self._session = session
        self._worker_id = name

    def _let_go(self) -> None:
        """The server has gone, and the lock with it: another name, the next time."""
        session, self._session, self._worker_id = self._session, None, ""
        if session is not None:
            try:
                session.close()
            except Exception:  # noqa: S110 - it is gone already
                pass

    def _recover(self) -> None:
        """Put back what nobody holds any more: its worker is dead, or was one of this machine before this run."""
        from django.db import transaction

        rows = probe.rows_of(self._backend, self._names)
        running = list(rows.running().values_list("id", "worker_ids"))
        lost = probe.abandoned([one for one in running if one[1][-1:] != [self._worker_id]], self._ours)
        for row_id in lost:
            with transaction.atomic(using=probe.database_of()):
                row = rows.running().select_for_update().filter(id=row_id).first()
                if row is None or [row.worker_ids] != [workers for one, workers in running if one == row_id]:
                    continue  # another drainer was faster
                if len(row.worker_ids) > LOST_MOST:
                    row.set_failed(WorkerDied("its worker was killed, again and again"))
                else:
                    rows.filter(id=row_id).update(status="READY", started_at=None)


class WorkerDied(Exception):  # noqa: N818 - what happened
    """What a task ends with whose workers die."""
