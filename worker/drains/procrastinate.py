"""Procrastinate (3.10.0 was read): its own worker, in this process, with the app's `worker_defaults`.

What differs from `procrastinate worker --one-shot`:

- it stops when nothing is ready and nothing is running: one-shot takes no new job while it waits for the last ones;
- what a dead worker held is put back (Procrastinate leaves that to its users), as the task's retry strategy says, and
  without one at most LOST_MOST times for one job;
- a worker on a Machine has the Machine's own number, so that the next one there knows what it held;
- periodic tasks that are due are deferred before the pass, and not beside it;
- signals are the drainer's: the worker finishes what is running when it is told to stop, and what takes too long is put
  back. `shutdown_graceful_timeout`, which gives up jobs, is not used.
"""

import asyncio
import hashlib
import threading
import time
from typing import Any

from ..aside import late
from . import Backlog, Options, Pulse

__all__ = ["Drain"]

probe = late("waker.queues.procrastinate")

LOST_MOST = 3
# A job whose worker is told of no insert, like a retry, is looked for so often.
POLL_S = 1.0
# Two looks in a row that find nothing running end the pass: what the last job deferred is announced meanwhile.
IDLE_S = 0.03
# The pool asks a server that is down for so long.
POOL_S = 5.0
RELEASE_S = 1.0
# Only one drainer at a time puts back. A number for advisory locks that means nothing else.
RECOVERY_LOCK = 0x77616B65_70726F63
# The table's own numbers are positive; a Machine's are not.
REGISTER = """
INSERT INTO procrastinate_workers (id) OVERRIDING SYSTEM VALUE VALUES (%(id)s)
ON CONFLICT (id) DO UPDATE SET last_heartbeat = now() RETURNING id AS worker_id
"""


class Drain:
    """Runs the jobs of one app with its own concurrency. One event loop and one pool last for all passes."""

    def __init__(self, target: Any, pulse: Pulse, options: Options) -> None:
        import psycopg
        from procrastinate import exceptions

        self.broker_errors: tuple[type[BaseException], ...] = (psycopg.OperationalError, exceptions.ConnectorException)
        self._app = target
        self._pulse = pulse
        self._names = options.queues
        self._worker_id = _number(options.machine) if options.machine else None
        self._reader = probe.reader_for(target)
        self._runner: asyncio.Runner | None = None
        self._held: set[int] = set()
        self._found_nothing = False
        pulse.slots = int(target.worker_defaults.get("concurrency", 1))

    def backlog(self) -> Backlog:
        reading: Backlog = probe.backlog(self._app, self._names, self._worker_id)
        return reading

    def work(self, stop: threading.Event) -> int:
        if self._runner is None:
            self._app.perform_import_paths()
            self._listen_in()
            self._runner = asyncio.Runner()
        try:
            self._runner.run(self._work(stop))
        finally:
            self._held.clear()
            self._pulse.running = 0
        return 0

    def release(self) -> None:
        if self._runner is None or not self._held:
            return
        put_back = asyncio.run_coroutine_threadsafe(self._put_back(), self._runner.get_loop())
        try:
            put_back.result(RELEASE_S)
        except Exception:
            put_back.cancel()  # a job that holds the loop; it comes back as after a kill

    async def _work(self, stop: threading.Event) -> None:
        from procrastinate.periodic import PeriodicDeferrer
        from procrastinate.worker import Worker

        app = self._app
        if (made := getattr(app.connector, "get_worker_connector", None)) is not None:
            # Django's connector is for requests; manage.py procrastinate changes it for this one, too.
            app.connector = app.job_manager.connector = made()
        await app.open_async()
        pool = getattr(app.connector, "pool", None)
        if pool is not None:
            pool.timeout = min(pool.timeout, POOL_S)
        await self._recover()
        deferrer = PeriodicDeferrer(app.periodic_registry, **app.periodic_defaults)
        await deferrer.defer_jobs(deferrer.get_previous_tasks(at=time.time()))
        self._found_nothing = False
        worker: Any = Worker(app, **{
            **app.worker_defaults,
            "queues": probe.queues_of(app, self._names),
            "wait": True,
            "install_signal_handlers": False,
            "shutdown_graceful_timeout": None,
            "fetch_job_polling_interval": min(POLL_S, app.worker_defaults.get("fetch_job_polling_interval", POLL_S)),
            "stalled_worker_timeout": probe.stalled_s(app),
        })  # fmt: skip
        watching = asyncio.ensure_future(self._stop_when_idle(worker, stop))
        try:
            await worker.run()
        finally:
            watching.cancel()

    async def _stop_when_idle(self, worker: Any, stop: threading.Event) -> None:
        looks = 0
        while not stop.is_set() and looks < 2:
            await asyncio.sleep(IDLE_S)
            looks = looks + 1 if self._found_nothing and not self._held else 0
        worker.stop()

    def _listen_in(self) -> None:
        """Every job that the worker takes and ends goes through these methods of the app's manager."""
        manager, pulse, held = self._app.job_manager, self._pulse, self._held
        fetch, finish, retry, register = (manager.fetch_job, manager.finish_job, manager.retry_job,
                                          manager.register_worker)  # fmt: skip

        async def fetch_job(*args: Any, **kwargs: Any) -> Any:
            job = await fetch(*args, **kwargs)
            self._found_nothing = job is None
            if job is not None:
                held.add(job.id)
                pulse.running = len(held)
            return job

        def ended(job: Any, failed: bool) -> None:
            if job.id in held:
                held.discard(job.id)
                pulse.done += 1
                pulse.failed += failed
            pulse.running = len(held)

        async def finish_job(job: Any, status: Any, *args: Any, **kwargs: Any) -> None:
            try:
                await finish(job, status, *args, **kwargs)
            finally:
                ended(job, status.value != "succeeded")

        async def retry_job(job: Any, *args: Any, **kwargs: Any) -> None:
            try:
                await retry(job, *args, **kwargs)
            finally:
                ended(job, True)

        async def register_worker() -> int:
            if self._worker_id is None:
                number: int = await register()
            else:
                row = await self._app.connector.execute_query_one_async(REGISTER, id=self._worker_id)
                number = row["worker_id"]
            return number

        manager.fetch_job, manager.finish_job, manager.retry_job = fetch_job, finish_job, retry_job
        manager.register_worker = register_worker

    async def _recover(self) -> None:
        """Put back what nobody holds any more: no heartbeat for too long, or held by this machine before this pass."""
        manager = self._app.job_manager
        stalled = list(await manager.get_stalled_jobs(seconds_since_heartbeat=probe.stalled_s(self._app)))
        if self._worker_id is not None:
            stalled += await manager.list_jobs_async(status="doing", worker_id=self._worker_id)
        if not stalled:
            return
        queues = probe.queues_of(self._app, self._names)
        # Once more behind the lock: another drainer may just have put them back, and a third may run them by now.
        self._reader.ask("SELECT pg_advisory_lock(%(lock)s)", lock=RECOVERY_LOCK)
        try:
            jobs = {job.id: job for job in await manager.get_stalled_jobs(
                seconds_since_heartbeat=probe.stalled_s(self._app))}  # fmt: skip
            if self._worker_id is not None:
                ours = await manager.list_jobs_async(status="doing", worker_id=self._worker_id)
                jobs.update({job.id: job for job in ours})
            for job in jobs.values():
                if queues is None or job.queue in queues:
                    await self._revive(job)
        finally:
            self._reader.ask("SELECT pg_advisory_unlock(%(lock)s)", lock=RECOVERY_LOCK)

    async def _revive(self, job: Any) -> None:
        """A worker died with this job: again, as its task's retry strategy says; without one at once, not for ever."""
        from procrastinate import utils
        from procrastinate.jobs import Status

        manager = self._app.job_manager
        task = self._app.tasks.get(job.task_name)
        retry = task.get_retry_exception(WorkerDied(), job) if task is not None else None
        decision = retry.retry_decision if retry is not None else None
        if decision is not None:
            await manager.retry_job_by_id_async(job.id, decision.retry_at or utils.utcnow(), decision.priority,
                                                decision.queue, decision.lock)  # fmt: skip
        elif job.attempts < LOST_MOST:
            await manager.retry_job_by_id_async(job.id, utils.utcnow())
        else:
            await manager.finish_job_by_id_async(job.id, Status.FAILED, delete_job=False)

    async def _put_back(self) -> None:
        from procrastinate import utils

        for job_id in list(self._held):
            self._held.discard(job_id)
            await self._app.job_manager.retry_job_by_id_async(job_id, utils.utcnow())


class WorkerDied(Exception):  # noqa: N818 - what happened
    """What a retry strategy is asked about when a worker died with a job."""


def _number(machine: str) -> int:
    """A number below zero that is this machine's."""
    return -1 - (int.from_bytes(hashlib.sha256(machine.encode()).digest()[:8], "big") >> 2)
