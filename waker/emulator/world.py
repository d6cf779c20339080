"""What all machines and the proxy of one platform share: the clock, the dice, the log, the tasks."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

from .events import Event, EventLog
from .faults import Dice, Faults
from .history import rfc3339
from .knobs import Knobs, Span

__all__ = ["Pulse", "World"]


class Pulse:
    """Wakes everybody who waits at this moment; who comes later waits for the next one."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        """Wake all who wait."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait(self) -> None:
        """Wait for the next pulse. Between looking at the state and waiting here, do not await."""
        await self._event.wait()


class World:
    """Belongs to one event loop."""

    def __init__(self, knobs: Knobs, faults: Faults, seed: int, log: EventLog, epoch: Callable[[], float]) -> None:
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._log = log
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self.failures: list[BaseException] = []  # mistakes of the emulator; the platform raises them when it closes
        self.knobs = knobs
        self.dice = Dice(faults, seed)
        self.rng = random.Random(seed)
        self.changed = Pulse()
        self.epoch = epoch() - self.now()  # Unix time at which now() was 0

    def now(self) -> float:
        """Seconds since the platform began."""
        return self._loop.time() - self._began

    def timestamp(self, at: float) -> str:
        """*at* seconds after the platform began, the way the Machines API writes a time."""
        return rfc3339(self.epoch + at)

    def emit(self, kind: str, machine: str | None = None, **fields: Any) -> None:
        """Put an event into the log."""
        self._log.append(Event(self.now(), kind, machine, fields))

    def strikes(self, fault: str, machine: str | None = None) -> bool:
        """Whether *fault* strikes now; if so, that is an event."""
        if not self.dice.strikes(fault):
            return False
        self.emit("fault.struck", machine, fault=fault)
        return True

    def scaled(self, seconds: float) -> float:
        """One of the platform's own delays, on this platform's scale."""
        return seconds * self.knobs.time_scale

    def unscaled(self, seconds: float) -> float:
        """A span of this platform's time, in the platform's own."""
        return seconds / self.knobs.time_scale

    def draw(self, span: Span) -> float:
        """One of the platform's own delays, drawn from its span."""
        return self.scaled(self.rng.uniform(*span))

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run *work* beside; it ends with the platform."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures.append(error)

    def later(self, delay_s: float, call: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
        """Call *call* after *delay_s*, unless the platform has ended by then."""

        def now() -> None:
            self._timers.discard(timer)
            call(*args)

        timer = self._loop.call_later(delay_s, now)
        self._timers.add(timer)
        return timer

    async def close(self) -> None:
        """Cancel all timers and tasks."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        while tasks := [task for task in self._tasks if not task.done()]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
