"""arq (0.28.0 was read): its own Worker, in this process, with the settings of the class that its users give to `arq`.

arq's burst mode waits for jobs that are due tomorrow, and for those that run elsewhere. So its worker runs as it does
without, and is stopped when nothing that is due waits and nothing runs here. What else differs from `arq`:

- it looks for jobs more often (a worker that leaves need not spare Redis), and only for as many as it may begin;
- the key that says that a job is running lives for HELD_S, is renewed, and says who runs it. So what a dead machine ran
  comes back after that time, and what this machine ran before, at once. arq sets it for the longest timeout;
- a stop signal lets running jobs finish; when the time is up they are cancelled, and arq puts them back;
- there are no cron jobs: nobody is up to see their time.
"""

import asyncio
import threading
import time
import uuid
from typing import Any

from ..aside import late
from . import Backlog, Options, Pulse, Refused

__all__ = ["Drain"]

probe = late("waker.queues.arq")

POLL_S = 0.02
HELD_S = 30.0
RENEW_S = 5.0
# So many of the jobs that are due are looked at, to see whether all of them run elsewhere.
LOOK_AT = 200


class Drain:
    """Runs the jobs of one worker, on one event loop that lasts for all passes."""

    def __init__(self, target: Any, pulse: Pulse, options: Options) -> None:
        import redis
        from arq.connections import ArqRedis

        if isinstance(target, ArqRedis):
            raise Refused("it is a pool, which has no functions; name the class with the settings of the worker")
        if getattr(target, "_handle_signals", False):
            raise Refused(
                "it has set signal handlers; make it with handle_signals=False, or name a class with settings"
            )
        # A connection that is lost while it watches a key is a WatchError.
        self.broker_errors: tuple[type[BaseException], ...] = (
            redis.ConnectionError,
            redis.TimeoutError,
            redis.WatchError,
            OSError,
        )
        self._target = target
        self._queue = probe.queue_of(target)
        self._client = probe.client_of(target)
        self._pulse = pulse
        # Owners of this machine have names that begin so, those of its earlier runs too.
        self._ours = f"{options.machine or uuid.uuid4()}."
        self._owner = ""
        self._recovered = False
        self._runner = asyncio.Runner()
        self._worker: Any = None
        self._starting = False  # whether the worker is between two steps of taking a job

    def backlog(self) -> Backlog:
        if not self._recovered:
            self._recover()
            self._recovered = True
        reading: Backlog = probe.read(self._client, self._queue)
        return reading

    def work(self, stop: threading.Event) -> int:
        self._recover()
        # A new name for each pass: what is held under the last one is held by nobody.
        self._owner = f"{self._ours}{uuid.uuid4().hex}"
        over = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(over,), daemon=True)
        renewing.start()
        try:
            self._runner.run(self._work(stop))
        finally:
            over.set()
            renewing.join()
        return 0

    def release(self) -> None:
        self._runner.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        for task in self._worker.tasks.values():
            task.cancel()

    async def _work(self, stop: threading.Event) -> None:
        if self._worker is None:
            self._worker = await self._make()
        worker, pulse = self._worker, self._pulse
        # None runs now. After an error, arq would raise it again, and would have lost count.
        worker.tasks.clear()
        worker.job_counter, worker.sem = 0, asyncio.BoundedSemaphore(worker.max_jobs + 1)
        worker.allow_pick_jobs = True
        main = asyncio.ensure_future(worker.async_run())
        try:
            while not (stop.is_set() or main.done() or await self._is_idle()):
                self._count()
                await asyncio.sleep(POLL_S)
        finally:
            # Nothing more is taken; what was taken runs to its end.
            worker.allow_pick_jobs = False
            while self._starting or self._running():
                self._count()
                await asyncio.sleep(POLL_S)
            self._count()
            pulse.running = 0
            worker.on_startup = None  # once is enough
            worker.main_task.cancel()
            await asyncio.wait([main])
            await asyncio.sleep(0)  # for what is called back when a task is done
        if not main.cancelled():
            main.result()

    def _running(self) -> int:
        return sum(not task.done() for task in self._worker.tasks.values())

    def _count(self) -> None:
        worker, pulse = self._worker, self._pulse
        pulse.running = self._running()
        pulse.failed = worker.jobs_failed + worker.jobs_retried
        pulse.done = worker.jobs_complete + pulse.failed

    async def _is_idle(self) -> bool:
        """Whether nothing runs here, and nothing is due but what runs elsewhere."""
        worker = self._worker
        if self._starting or self._running() or worker._pool is None:
            return False
        ids = await worker.pool.zrangebyscore(self._queue, "-inf", int(time.time() * 1000), start=0, num=LOOK_AT)
        if not ids:
            return True
        held: int = await worker.pool.exists(*(probe.IN_PROGRESS + one.decode() for one in ids))
        return held == len(ids) < LOOK_AT

    async def _make(self) -> Any:
        """The user's worker, or one with the user's settings, as a drainer needs it."""
        from arq.connections import create_pool
        from arq.worker import Worker, create_worker

        worker = self._target
        if not isinstance(worker, Worker):
            worker = create_worker(worker, handle_signals=False)
        worker.loop = asyncio.get_running_loop()
        worker.burst = False
        worker.cron_jobs = []
        worker.poll_delay_s = min(worker.poll_delay_s, POLL_S)
        worker.in_progress_timeout_s = HELD_S
        self._pulse.slots = worker.max_jobs
        if worker._pool is None:
            worker._pool = await create_pool(
                worker.redis_settings,
                job_deserializer=worker.job_deserializer,
                job_serializer=worker.job_serializer,
                default_queue_name=worker.queue_name,
                expires_extra_ms=worker.expires_extra_ms,
            )
        self._sign(worker._pool)
        begin = worker.start_jobs

        async def start_jobs(job_ids: list[bytes]) -> None:
            self._starting = True
            try:
                for job_id in job_ids:
                    if not worker.allow_pick_jobs:
                        return
                    await begin([job_id])
            finally:
                self._starting = False

        worker.start_jobs = start_jobs
        return worker

    def _sign(self, pool: Any) -> None:
        """Let the keys of running jobs say who runs them."""
        from redis.asyncio.client import Pipeline

        drain = self
        base: Any = type(pool)

        class Signing(Pipeline):  # type: ignore[misc]  # of a library that is not always there
            def psetex(self, name: Any, time_ms: Any, value: Any) -> Any:
                signed = name.startswith(probe.IN_PROGRESS)
                return super().psetex(name, time_ms, drain._owner if signed else value)

        class Signed(base):  # type: ignore[misc]  # whichever class the user's pool has
            def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Any:
                return Signing(self.connection_pool, self.response_callbacks, transaction, shard_hint)

        pool.__class__ = Signed

    def _renew(self, over: threading.Event) -> None:
        """Say again that what runs here runs; on a thread, since a job may keep the event loop busy."""
        while not over.wait(RENEW_S):
            worker = self._worker
            ids = [job_id for job_id, task in list(worker.tasks.items()) if not task.done()] if worker else []
            try:
                with self._client.pipeline(transaction=False) as ask:
                    for job_id in ids:
                        ask.pexpire(probe.IN_PROGRESS + job_id, int(HELD_S * 1000))
                    ask.execute()
            except self.broker_errors:
                pass  # the pass finds out, too

    def _recover(self) -> None:
        """Forget that what this machine ran before is running."""
        now_ms = int(time.time() * 1000)
        ids = self._client.zrangebyscore(self._queue, "-inf", now_ms, start=0, num=probe.READ_MOST)
        keys = [probe.IN_PROGRESS + one.decode() for one in ids]
        owners = self._client.mget(keys) if keys else []
        if gone := [
            key for key, owner in zip(keys, owners, strict=True) if owner and owner.decode().startswith(self._ours)
        ]:
            self._client.delete(*gone)
