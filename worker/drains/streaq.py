"""streaq (7.2.0 and coredis 6.9.0 were read): its own worker in burst mode, in this process, with its own settings.

What differs from `streaq run --burst`:

- what is due is moved to its queue before the pass, and not beside it;
- the worker on a Machine has an id that begins with the Machine's, so that the next one there knows what it held;
- what was given to it and not begun is given back when it leaves (streaq's burst leaves it to idle_timeout);
- signals are the drainer's: what is running is finished; when the time for that is up it is cancelled and given back,
  as streaq does at once. `grace_period` is not used.
"""

import asyncio
import threading
import time
import uuid
from typing import Any

from ..aside import late
from . import Backlog, Options, Pulse

__all__ = ["Drain"]

probe = late("waker.queues.streaq")

# Who holds what was given back.
RELEASED = "wake-released"
POLL_S = 0.1


class Drain:
    """Runs the tasks of one worker. One event loop lasts for all passes; streaq connects for each."""

    def __init__(self, target: Any, pulse: Pulse, options: Options) -> None:
        from coredis.exceptions import ConnectionError as Lost

        self.broker_errors: tuple[type[BaseException], ...] = (Lost, OSError)
        self._worker = target
        self._pulse = pulse
        self._ours = f"wake-{options.machine or uuid.uuid4().hex}-"
        self._stop = threading.Event()
        self._runner = asyncio.Runner()
        self._lifespan = target.lifespan
        target.id = f"{self._ours}{uuid.uuid4().hex[:12]}"
        target.burst = True
        self._listen_in()
        pulse.slots = target.concurrency

    def backlog(self) -> Backlog:
        reading: Backlog = self._ask(self._read())
        return reading

    def work(self, stop: threading.Event) -> int:
        self._stop = stop
        counters = self._worker.counters
        before = counters["failed"] + counters["retried"]
        try:
            self._ask(self._work())
        finally:
            self._pulse.running = 0
            self._pulse.failed += counters["failed"] + counters["retried"] - before
        return 0

    def release(self) -> None:
        self._runner.get_loop().call_soon_threadsafe(self._cut_short)

    def _ask(self, work: Any) -> Any:
        """Run *work*; of a group of errors, which a task group makes, the one that tells of a lost server."""
        try:
            return self._runner.run(work)
        except BaseExceptionGroup as group:
            lost: BaseException | None = group.subgroup(self.broker_errors)
            while isinstance(lost, BaseExceptionGroup):
                lost = lost.exceptions[0]
            raise lost or group from group

    async def _read(self) -> Backlog:
        async with probe.client_of(self._worker) as redis:
            backlog: Backlog = await probe.read(redis, self._worker, self._ours)
            return backlog

    async def _work(self) -> None:
        worker = self._worker
        async with probe.client_of(worker) as redis:
            await self._give_back(redis)
            # An asynccontextmanager can be entered once; streaq makes it with the worker.
            again = getattr(self._lifespan, "_recreate_cm", None)
            worker.lifespan = again() if again is not None else self._lifespan
            worker._stream_empty, worker._count = False, 0
            try:
                await worker.run_async()
            finally:
                await self._give_back(redis)

    def _listen_in(self) -> None:
        """A worker runs each task, reads its streams and waits for signals by these methods of its own."""
        worker, pulse = self._worker, self._pulse
        run_task, producer = worker.run_task, worker.producer

        async def counted(message: Any) -> None:
            pulse.running += 1
            try:
                await run_task(message)
            finally:
                pulse.running -= 1
                pulse.done += 1

        async def produced(queue: Any, limiter: Any, scope: Any) -> None:
            from streaq.types import Streaq

            now_ms = int(time.time() * 1000)
            async with worker.redis.pipeline(transaction=False) as pipe:
                library = Streaq(pipe)
                for priority in worker.priorities:
                    library.publish_delayed_tasks(worker.queue_key + priority, worker.stream_key + priority, now_ms)
            await producer(queue, limiter, scope)

        async def stopped(scope: Any) -> None:
            while not self._stop.is_set():  # noqa: ASYNC110 - another thread sets it
                await asyncio.sleep(POLL_S)
            scope.cancel("told to stop")

        worker.run_task, worker.producer, worker.signal_handler = counted, produced, stopped

    def _cut_short(self) -> None:
        """As streaq's own handler does when the time for what is running is up."""
        from anyio import current_time

        for scope in self._worker._cancel_scopes.values():
            scope.deadline = current_time()

    async def _give_back(self, redis: Any) -> None:
        """What this machine holds counts as left from now on, for every worker, without another try in its count."""
        worker = self._worker
        for priority in worker.priorities:
            stream = worker.stream_key + priority
            held = [one.identifier for one in await probe.pending_of(redis, stream)
                    if str(one.consumer).startswith(self._ours)]  # fmt: skip
            if held:
                await redis.xclaim(stream, probe.GROUP, RELEASED, 0, held, idle=worker.idle_timeout, justid=True)
