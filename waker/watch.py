"""The watch: reads the backlog itself and wakes for it, so that a ready job is noticed whatever has died.

Level-triggered: what it does follows from what it reads now. What it remembers only keeps it from waking again and
again where that changes nothing, so it may be restarted at any moment, and several copies do no harm.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from .backlog import Backlog
from .client import WakeReport
from .errors import UsageError, WakeError

__all__ = ["INTERVAL_S", "Look", "Watch"]

INTERVAL_S = 30.0
# After a wake that changed nothing, the next one comes this much later, and then ever twice as late.
BACKOFF_S = 60.0
BACKOFF_MAX_S = 3600.0
# A due time is met this much late rather than early, and two looks are at least so far apart.
LEAST_S = 0.2
# Several copies drift apart.
JITTER = 0.1

log = logging.getLogger("waker")


class Stop(Protocol):
    """What ends a watch: a threading.Event, or anything like it."""

    def is_set(self) -> bool: ...

    def wait(self, timeout: float) -> object: ...


class _Wakes(Protocol):
    def wake(self, machines: int, *, busy_counts: bool) -> WakeReport: ...


class _WakesAsync(Protocol):
    def wake(self, machines: int, *, busy_counts: bool) -> Awaitable[WakeReport]: ...


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a queue: what was read, the machines asked for (0: none), what came of it, when to look next.

    *error*: why the reading or the wake failed, in words; None if neither did.
    """

    backlog: Backlog | None
    wanted: int
    report: WakeReport | None
    next_s: float
    error: str | None = None


class Watch:
    """Wakes for a backlog and for due times.

    *probe()* is a fresh reading of the queue. *waker* is a Waker, or an AsyncWaker for run_async. So many machines are
    wanted that each has *jobs_per_machine* of the jobs that are ready or running, but *min_machines* at least and
    *max_machines* at most; machines that are up and busy are among them.
    """

    def __init__(
        self,
        probe: Callable[[], Backlog],
        waker: _Wakes | _WakesAsync,
        *,
        interval_s: float = INTERVAL_S,
        jobs_per_machine: int = 1,
        min_machines: int = 1,
        max_machines: int = 1,
        now: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """*now* is Unix time in seconds, *chance* a number from 0 to 1. Raises UsageError for numbers out of range."""
        errors = [
            f"{name}={value!r}: expected {expected}"
            for name, value, fits, expected in (
                (
                    "interval_s",
                    interval_s,
                    LEAST_S <= interval_s <= 86_400,
                    f"seconds from {LEAST_S} to a day, like 30",
                ),
                ("jobs_per_machine", jobs_per_machine, jobs_per_machine >= 1, "a number above 0"),
                ("min_machines", min_machines, min_machines >= 1, "a number above 0"),
                ("max_machines", max_machines, max_machines >= min_machines, f"min_machines ({min_machines}) or more"),
            )
            if not fits
        ]
        if errors:
            raise UsageError("\n".join(errors))
        self._probe = probe
        self._waker = waker
        self._interval_s = interval_s
        self._jobs_per_machine = jobs_per_machine
        self._min_machines = min_machines
        self._max_machines = max_machines
        self._now = now
        self._chance = chance
        self._woken_at_ready: int | None = None  # what was ready when we woke last; None if that helped
        self._backoff_s = 0.0
        self._not_before = -math.inf  # no wake for the same reading before this
        self._failures = 0  # readings in a row that failed

    def once(self) -> Look:
        """Look once, and wake if it is needed. A failed reading or wake is in the Look; nothing is raised."""
        backlog, failed = self._read()
        if backlog is None:
            return self._blind(failed)
        wanted = self._decide(backlog)
        report, error = None, None
        if wanted:
            try:
                made = self._waker.wake(wanted, busy_counts=True)
                if not isinstance(made, WakeReport):
                    raise UsageError("an AsyncWaker was given: use run_async(), or give a Waker")
                report = made
            except UsageError:
                raise
            except WakeError as failure:
                error = str(failure)
        return self._seen(backlog, wanted, report, error)

    async def once_async(self) -> Look:
        """The same in an event loop: the reading runs in a thread, and the waker may be an AsyncWaker."""
        backlog, failed = await asyncio.to_thread(self._read)
        if backlog is None:
            return self._blind(failed)
        wanted = self._decide(backlog)
        report, error = None, None
        if wanted:
            try:
                if asyncio.iscoroutinefunction(self._waker.wake):
                    report = await self._waker.wake(wanted, busy_counts=True)
                else:
                    report = await asyncio.to_thread(self._wake_blocking, wanted)
            except UsageError:
                raise
            except WakeError as failure:
                error = str(failure)
        return self._seen(backlog, wanted, report, error)

    def run(self, stop: Stop, on_look: Callable[[Look], None] | None = None) -> None:
        """Look again and again until *stop* is set; it ends within one wake."""
        while not stop.is_set():
            look = self.once()
            if on_look is not None:
                on_look(look)
            stop.wait(look.next_s)

    async def run_async(self, stop: asyncio.Event | None = None, on_look: Callable[[Look], None] | None = None) -> None:
        """Look again and again until *stop* is set, or the task is cancelled."""
        stop = asyncio.Event() if stop is None else stop
        while not stop.is_set():
            look = await self.once_async()
            if on_look is not None:
                on_look(look)
            try:
                async with asyncio.timeout(look.next_s):
                    await stop.wait()
            except TimeoutError:
                pass

    def _wake_blocking(self, wanted: int) -> WakeReport:
        made = self._waker.wake(wanted, busy_counts=True)
        assert isinstance(made, WakeReport)  # noqa: S101 - a coroutine function took the other way
        return made

    def _read(self) -> tuple[Backlog | None, str]:
        try:
            backlog = self._probe()
        except Exception as error:
            # Whatever the probe's library raises: the watch outlives a broker that is down.
            self._failures += 1
            return None, f"{type(error).__name__}: {error}"
        self._failures = 0
        return backlog, ""

    def _blind(self, error: str) -> Look:
        log.warning("watch.reading_failed failures=%d error=%s", self._failures, error)
        return Look(None, 0, None, self._jittered(self._interval_s), error)

    def _decide(self, backlog: Backlog) -> int:
        """How many machines to ask for now; 0 if none are needed, or waking has just changed nothing."""
        due = backlog.due_at is not None and backlog.due_at <= self._now()
        if not backlog.ready and not due:
            self._helped()
            return 0
        if self._woken_at_ready is not None and (backlog.running or backlog.ready != self._woken_at_ready):
            self._helped()
        if self._now() < self._not_before:
            return 0
        # A job that is due and not yet counted as ready (some brokers' workers do that) wants a machine as well.
        jobs = max(1, backlog.ready) + backlog.running
        return min(self._max_machines, max(self._min_machines, math.ceil(jobs / self._jobs_per_machine)))

    def _helped(self) -> None:
        self._woken_at_ready = None
        self._backoff_s = 0.0
        self._not_before = -math.inf

    def _seen(self, backlog: Backlog, wanted: int, report: WakeReport | None, error: str | None) -> Look:
        now = self._now()
        if wanted:
            if self._woken_at_ready is not None:
                # The reading is still what it was before our last wake.
                self._backoff_s = min(BACKOFF_MAX_S, self._backoff_s * 2 or BACKOFF_S)
                self._not_before = now + self._backoff_s
                log.warning("watch.wake_changed_nothing ready=%d next_wake_s=%.0f", backlog.ready, self._backoff_s)
            self._woken_at_ready = backlog.ready
            if error is not None:
                log.warning("watch.wake_failed wanted=%d error=%s", wanted, error)
            elif report is not None:
                log.info("watch.woke wanted=%d distinct=%d cold=%d", wanted, report.distinct, report.cold)
        next_s = self._jittered(self._interval_s)
        if backlog.due_at is not None and backlog.due_at > now:
            next_s = min(next_s, max(LEAST_S, backlog.due_at - now))
        return Look(backlog, wanted, report, next_s, error)

    def _jittered(self, seconds: float) -> float:
        """A little sooner, never later: the interval is a promise."""
        return max(LEAST_S, seconds * (1 - JITTER * self._chance()))
