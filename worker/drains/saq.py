"""SAQ (0.26.4 was read), on Redis and on PostgreSQL: the `process` of its Worker, as often at once as its concurrency.

A dict with settings is drained by `saq.Worker` with these, a Worker object as it is. SAQ's burst mode stops at the
first wait that was in vain, and loses what its own sweep is about to put back. So we run `Worker.process` ourselves,
until nothing is ready and nothing runs here. What else differs from `saq`:

- what was held by a worker that died is put back before the pass and not beside it: when its time is over, or at once
  if this machine held it. One that is out of retries too, at most LOST_MOST times (SAQ's sweep aborts it);
- a stop signal lets running jobs finish; when the time is up they are cancelled, and SAQ puts them back;
- there are no cron jobs: nobody is up to see their time. `startup` is called once, and `shutdown` never.
"""

import asyncio
import threading
import time
import uuid
from typing import Any

from ..aside import late
from . import Backlog, Options, Pulse, Refused

__all__ = ["Drain"]

probe = late("waker.queues.saq")

POLL_S = 0.05
# How long one attempt to take a job waits: the end of a pass waits for it.
DEQUEUE_S = 0.2
UPKEEP_S = 1.0
# A job that has run while the server went away waits so long for a connection; then the drainer waits for it.
POOL_TIMEOUT_S = 5.0
# A job that was running when its worker died so often may be what kills them.
LOST_MOST = 3
LOST_KEY = "wake_on_request_lost"


class Drain:
    """Runs the jobs of one queue, on one event loop that lasts for all passes."""

    def __init__(self, target: Any, pulse: Pulse, options: Options) -> None:
        if not isinstance(target, dict) and not hasattr(target, "functions"):
            raise Refused("it is a queue, which has no functions; name the settings, or a Worker")
        self._target = target
        self._queue = probe.queue_of(target)
        self._reader = probe.reader_of(target)
        errors = [*self._reader.errors, OSError]
        if hasattr(self._queue, "pool"):
            import psycopg_pool

            errors += [psycopg_pool.PoolTimeout, psycopg_pool.PoolClosed]
            self._queue.pool.timeout = min(self._queue.pool.timeout, POOL_TIMEOUT_S)
        self.broker_errors: tuple[type[BaseException], ...] = tuple(errors)
        self._pulse = pulse
        # Workers of this machine have ids that begin so, those of its earlier runs too.
        self._ours = f"{options.machine or uuid.uuid4()}."
        self._recovered = False
        self._runner = asyncio.Runner()
        self._worker: Any = None
        self._busy: set[Any] = set()  # the tasks that have a job
        self._returned = 0  # jobs that were put back, which SAQ counts as retried

    def backlog(self) -> Backlog:
        if not self._recovered:
            self._runner.run(self._recover())
            self._recovered = True
        reading: Backlog = self._reader.read()
        return reading

    def work(self, stop: threading.Event) -> int:
        self._runner.run(self._work(stop))
        return 0

    def release(self) -> None:
        self._runner.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        for task in self._busy:
            task.cancel()

    async def _work(self, stop: threading.Event) -> None:
        if self._worker is None:
            self._worker = await self._make()
        worker, queue = self._worker, self._queue
        await self._recover()
        # A new id for each pass: what is held under the last one is held by nobody.
        worker.id = f"{self._ours}{uuid.uuid4().hex}"
        await queue.schedule(1)
        over = asyncio.Event()
        slots = [asyncio.create_task(self._run(over)) for _ in range(worker.concurrency)]
        upkeep = asyncio.create_task(self._upkeep())
        try:
            while not stop.is_set() and not any(slot.done() for slot in slots):
                done = self._pulse.done
                await asyncio.sleep(POLL_S)
                if not self._busy and self._pulse.done == done and not self._reader.read().ready:
                    break
        except BaseException:
            # Those without a job wait for a server that is not there.
            for slot in set(slots) - self._busy:
                slot.cancel()
            raise
        finally:
            over.set()
            await asyncio.wait(slots)
            upkeep.cancel()
            await asyncio.wait([upkeep])
        await self._put_back_untouched()
        for slot in slots:
            slot.result()

    async def _run(self, over: asyncio.Event) -> None:
        """One of the places in which jobs run."""
        this = asyncio.current_task()
        while not over.is_set():
            began = time.monotonic()
            try:
                await self._worker.process()
            finally:
                if this not in self._busy:
                    # SAQ logs nothing of a server that is not there, and comes back at once.
                    await asyncio.sleep(POLL_S if time.monotonic() - began < POLL_S else 0)
                else:
                    self._busy.discard(this)
                    self._pulse.running = len(self._busy)
                    self._pulse.done += 1
                    self._pulse.failed = self._queue.failed + self._queue.retried - self._returned

    async def _upkeep(self) -> None:
        """What SAQ's worker does every second, but for its cron jobs."""
        while True:
            await asyncio.sleep(UPKEEP_S)
            try:
                await self._queue.schedule(1)
                await self._worker.abort(UPKEEP_S)
            except self.broker_errors:
                pass  # the pass finds out, too

    async def _make(self) -> Any:
        """The user's worker, or one with the user's settings, as a drainer needs it."""
        from saq import Worker

        worker = Worker(**self._target) if isinstance(self._target, dict) else self._target
        worker.dequeue_timeout = DEQUEUE_S
        self._pulse.slots = worker.concurrency
        dequeue, busy, pulse = self._queue.dequeue, self._busy, self._pulse

        async def noted(*args: Any, **kwargs: Any) -> Any:
            job = await dequeue(*args, **kwargs)
            if job is not None:
                busy.add(asyncio.current_task())
                pulse.running = len(busy)
            return job

        self._queue.dequeue = noted
        await self._queue.connect()
        for startup in worker.startup or ():
            await startup(worker.context)
        return worker

    async def _put_back_untouched(self) -> None:
        """On PostgreSQL, jobs are taken for all that wait, and the one that was meant may have given up."""
        taken = getattr(self._queue, "_job_queue", None)
        while taken is not None and not taken.empty():
            await self._put_back(taken.get_nowait())

    async def _recover(self) -> None:
        """Put back what nobody holds any more: its time is over, or this machine held it before this pass."""
        from saq.job import Status

        now = time.time()
        for job in self._reader.active():
            until = probe.held_until(job)
            ours = (job.worker_id or "").startswith(self._ours) and job.started
            if not (ours or (until is not None and until < now)) or not self._reader.claim(job):
                continue
            await self._queue.connect()
            lost = job.meta.get(LOST_KEY, 0)
            job.scheduled = 0
            if job.retryable:
                await self._queue.retry(job, "its worker died")
            elif lost < LOST_MOST:
                job.meta[LOST_KEY] = lost + 1
                await self._put_back(job)
            else:
                await self._queue.finish(job, Status.ABORTED, error="its worker died")
        self._reader.let_go()

    async def _put_back(self, job: Any) -> None:
        """To the end of the queue, at once."""
        job.next_retry_delay = lambda: 0.0
        await self._queue.retry(job, job.error)
        self._returned += 1
