"""The embedded queue's worker: slots that claim, run and settle jobs until there is nothing left for them.

A slot is a thread with one job at a time. Settling that job and claiming the next is one transaction (a `Turn`), so a
job costs one wait for the disk, not two. With a concurrency of one the calling thread is the only slot. Otherwise it
starts a slot for each job it can claim, and a slot goes on claiming by itself until it finds nothing.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from .errors import QueueError, UsageError, WakeError
from .sqlite_queue import JobOverran, SqliteQueue, Task, _log
from .sqlite_store import Claim, Ended, Owner, Store

__all__ = ["EventLoop", "Shift"]

MAX_BACKOFF_S = 3600.0
JITTER = 0.2
MAX_ERROR_CHARS = 8000
# A lease is renewed when a third of it has passed, so two renewals may fail before it ends.
RENEWALS_PER_LEASE = 3
# While a job runs and a slot is free, other processes may enqueue; SQLite cannot tell us, so we look.
LOOK_S = 0.25
SETTLE_PAUSE_S = 0.2


class Shift:
    """One call of `SqliteQueue.work`."""

    def __init__(
        self, queue: SqliteQueue, store: Store, stop: threading.Event, progress: Callable[[int, int], object] | None
    ) -> None:
        self._queue = queue
        self._store = store
        self._stop = stop
        self._progress = progress
        self._me = Owner.current()
        # Under whom our jobs are held; None before the first claim and after a lease was lost. Set by the calling
        # thread alone, unset by any: each compares the id first, which is never used twice.
        self._owner: int | None = None
        # Why no more is claimed: the first thing that went wrong in a slot. Set once, read by all.
        self._trouble: WakeError | None = None
        # Guards the three counts below and the queue's own; held while progress is called, so that its calls are in
        # order.
        self._counting = threading.Lock()
        self._running = 0
        self._done = 0
        self._slots = 0
        # A job whose worker died may be why it died, and shall not take others down that are suspected too: one at a
        # time. Set by the calling thread, unset by the slot that ran it.
        self._is_suspect_running = False
        self._news = threading.Event()
        self._over = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def is_ours(self) -> bool:
        """False in a process that was forked while this shift was running."""
        return self._me.pid == os.getpid()

    def look_again(self) -> None:
        """There may be something to claim."""
        self._news.set()

    def release(self) -> int:
        """Put back what is held here; what still runs is fenced off."""
        owner = self._owner
        if owner is None:
            return 0
        put_back = self._store.resign(owner)
        if self._owner == owner:
            self._owner = None
        return put_back

    def run(self) -> int:
        """Run jobs as `SqliteQueue.work` says."""
        while self._queue._left_over:
            self._store.resign(self._queue._left_over[-1])
            self._queue._left_over.pop()
        try:
            self._recover()
            if self._queue.concurrency == 1:
                self._run_in_one_slot()
            else:
                self._run_in_many_slots()
        finally:
            if self.is_ours():
                self._end()
        if self._trouble is not None:
            raise self._trouble
        return self._done

    def _end(self) -> None:
        self._over.set()
        if self._heartbeat is not None:
            self._heartbeat.join()
        owner = self._owner
        try:
            self.release()
        except QueueError as error:
            # The next call puts it back; if there is none, the end of the lease or of this process does.
            if owner is not None:
                self._queue._left_over.append(owner)
            _log("error", "queue.not_released", error=repr(str(error)))

    # Slots

    def _run_in_one_slot(self) -> None:
        while True:
            claim = self._turn(None, enlist=True, suspects=True)
            if claim is None and (self._is_stopping() or not self._recover()):
                return
            while claim is not None:
                claim = self._turn(self._run_job(claim), enlist=True, suspects=True)

    def _run_in_many_slots(self) -> None:
        while True:
            self._news.clear()
            is_room = self._slots < self._queue.concurrency and not self._is_stopping()
            try:
                claim = self._turn(None, enlist=True, suspects=not self._is_suspect_running) if is_room else None
                if claim is None and is_room and self._recover():
                    continue
            except WakeError as error:
                # Raised when the slots are done: what they run is not to be put back while it runs.
                self._trouble = self._trouble or error
                continue
            if claim is not None:
                is_suspect = self._is_suspect_running = claim.attempts > 1
                with self._counting:
                    self._slots += 1
                thread = threading.Thread(target=self._be_a_slot, args=(claim, is_suspect), daemon=True)
                thread.start()
            elif self._slots:
                # Without room, or told to stop, only the end of a job is news.
                self._news.wait(LOOK_S if is_room else None)
            else:
                return

    def _be_a_slot(self, claim: Claim | None, is_suspect: bool) -> None:
        try:
            while claim is not None:
                ended = self._run_job(claim)
                if is_suspect:
                    is_suspect = self._is_suspect_running = False
                    self._news.set()
                claim = self._turn(ended)
        except WakeError as error:
            self._trouble = self._trouble or error
        finally:
            with self._counting:
                self._slots -= 1
            self._news.set()

    def _turn(self, ended: Ended | None, *, enlist: bool = False, suspects: bool = False) -> Claim | None:
        """Settle what ended, claim the next job, and say so. Only with *enlist* is a lost lease replaced."""
        if not self.is_ours():
            raise UsageError("a job forked, and its child came back from the job: end the child with os._exit()")
        deadline = time.monotonic() + self._queue.lease_s
        while True:
            owner = self._owner
            claiming = not self._is_stopping() and (enlist or owner is not None)
            try:
                if claiming:
                    turn = self._store.turn(self._me, owner, self._queue.lease_s, ended, suspects=suspects)
                    claim, settled = turn.claim, turn.settled
                    if owner is None and claim is not None:
                        self._owner = turn.owner
                        self._keep_lease()
                    elif owner is not None and turn.owner is None:
                        self._lose(owner)
                else:
                    claim, settled = None, ended is None or self._store.settle(ended)
                break
            except QueueError:
                # What has been done should not be done again because a backup held the lock for a moment.
                if ended is None or time.monotonic() > deadline or self._stop.wait(SETTLE_PAUSE_S):
                    raise
        if ended is not None and not settled:
            why = repr("it was put back, or taken back")
            _log("warning", "job.fenced", id=ended.claim.id, task=ended.claim.task, why=why)
        self._count((claim is not None) - (ended is not None), ended is not None)
        if claim is None and claiming and enlist and owner is not None and self._owner is None:
            return self._turn(None, enlist=True, suspects=suspects)
        return claim

    def _count(self, running: int, done: int) -> None:
        if not running and not done:
            return
        with self._counting:
            self._running += running
            self._done += done
            if self._progress is not None:
                self._progress(self._running, self._done)

    def _is_stopping(self) -> bool:
        return self._trouble is not None or self._stop.is_set()

    # Leases

    def _keep_lease(self) -> None:
        if self._heartbeat is None:
            self._heartbeat = threading.Thread(target=self._renew_leases, name="queue-lease", daemon=True)
            self._heartbeat.start()

    def _renew_leases(self) -> None:
        lease_s = self._queue.lease_s
        while not self._over.wait(lease_s / RENEWALS_PER_LEASE):
            owner = self._owner
            try:
                if owner is not None and not self._store.renew(owner, lease_s):
                    self._lose(owner)
                # So that a dead worker's jobs do not wait until we run out of others.
                if self._recover():
                    self._news.set()
            except QueueError as error:
                _log("warning", "queue.lease_not_renewed", error=repr(str(error)))

    def _lose(self, owner: int) -> None:
        if self._owner == owner:
            self._owner = None
            if not self._stop.is_set():
                _log("warning", "queue.lease_lost", lease_s=self._queue.lease_s)

    def _recover(self) -> int:
        taken = self._store.recover(self._me)
        if taken:
            _log("warning", "queue.jobs_taken_back", jobs=taken)
        return taken

    # Jobs

    def _run_job(self, claim: Claim) -> Ended:
        try:
            task = self._find(claim.task)
        except Exception as error:
            return self._failed(claim, error, self._queue.backoff_s)
        try:
            args, kwargs = json.loads(claim.payload)
            self._call(task, args, kwargs)
        except BaseException as error:  # SystemExit and CancelledError too: a job ends itself, not its worker
            if isinstance(error, KeyboardInterrupt) and _ctrl_c_raises():
                raise
            return self._failed(claim, error, task.backoff_s)
        return Ended(claim)

    def _find(self, name: str) -> Task[..., Any]:
        task = self._queue.tasks.get(name)
        if task is None:
            module, colon, _ = name.partition(":")
            if colon:
                import_module(module)  # its decorators register it
            task = self._queue.tasks.get(name)
        if task is None:
            raise LookupError(f"no task is named {name!r}: was it renamed, or is its module for another queue?")
        return task

    def _call(self, task: Task[..., Any], args: list[Any], kwargs: dict[str, Any]) -> None:
        if task.timeout_s is not None and not task.is_async:
            result = self._call_in_thread(task, args, kwargs)
        else:
            result = task.fn(*args, **kwargs)
        # Asked of the result, not of the function: a decorator may have hidden that it is async.
        if result is not None and hasattr(result, "__await__"):
            with self._counting:  # two slots may need the first one
                loop = self._queue._loop
                if loop is None or not loop.is_ours():
                    loop = self._queue._loop = EventLoop()
            loop.run(result, task.timeout_s)

    def _call_in_thread(self, task: Task[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        results: list[Any] = []
        errors: list[BaseException] = []

        def call() -> None:
            try:
                results.append(task.fn(*args, **kwargs))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=call, name=f"job-{task.name}", daemon=True)
        thread.start()
        thread.join(task.timeout_s)
        if errors:
            raise errors[0]
        if results:
            return results[0]
        why = f"ran longer than its timeout_s of {task.timeout_s:g}"
        self._trouble = self._trouble or JobOverran(
            f"{task.name} {why} and still runs; only the end of this process ends it"
        )
        raise TimeoutError(why)

    def _failed(self, claim: Claim, error: BaseException, backoff_s: float) -> Ended:
        import traceback

        with self._counting:
            self._queue.failed += 1
        said = "".join(traceback.format_exception_only(error)).strip()
        # Without our own frames; and its end, where it says what went wrong, if it is too long.
        frames = "".join(traceback.format_tb(_frames_of_the_job(error)))
        text = f"{frames}{said}"[-MAX_ERROR_CHARS:].encode(errors="replace").decode()
        now = self._store.now()
        if claim.attempts >= claim.max_attempts:
            outcome = {"dead": "yes"}
            ended = Ended(claim, text, ended_at=now)
        else:
            wait_s = _backoff_s(backoff_s, claim.attempts)
            outcome = {"retry_in_s": f"{wait_s:.1f}"}
            ended = Ended(claim, text, retry_at=now + wait_s)
        attempt = f"{claim.attempts}/{claim.max_attempts}"
        _log("warning", "job.failed", id=claim.id, task=claim.task, attempt=attempt, **outcome, error=repr(said))
        return ended


class EventLoop:
    """One event loop in a thread, for the async jobs of all slots: what belongs to a loop, like a client's
    connections, is good for every job of the process."""

    def __init__(self) -> None:
        import asyncio

        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="async-jobs", daemon=True)
        self._thread.start()

    def is_ours(self) -> bool:
        """False in a process that was forked from the one that has the thread."""
        return self._pid == os.getpid()

    def run(self, awaitable: Any, timeout_s: float | None) -> None:
        """Await it on the loop, from any thread; raise what it raises, or TimeoutError after cancelling it."""
        import asyncio

        future = asyncio.run_coroutine_threadsafe(_bounded(awaitable, timeout_s), self._loop)
        try:
            future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self) -> None:
        """Stop the loop and its thread. What still runs on it is cancelled."""
        if not self.is_ours():
            return
        import asyncio

        async def cancel_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._loop.shutdown_asyncgens()
            await self._loop.shutdown_default_executor()

        asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class JobExited(Exception):  # noqa: N818 - what happened
    """An async job ended with SystemExit or KeyboardInterrupt, which would end the event loop of all of them."""


def _ctrl_c_raises() -> bool:
    """Whether a KeyboardInterrupt here may be a person's: somebody runs `work` by hand. Otherwise a job raised it."""
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGINT) is signal.default_int_handler


async def _bounded(awaitable: Any, timeout_s: float | None) -> None:
    import asyncio

    try:
        async with asyncio.timeout(timeout_s) as limit:
            await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        raise JobExited(repr(error)) from error
    except TimeoutError:
        if limit.expired():
            raise TimeoutError(f"ran longer than its timeout_s of {timeout_s:g}") from None
        raise


def _backoff_s(base_s: float, attempt: int) -> float:
    """How long to wait after *attempt* (from 1) failed: doubling, bounded, and never the same for all."""
    wait_s = min(base_s * 2.0 ** min(attempt - 1, 30), MAX_BACKOFF_S)
    # random would be one more import at a cold start, for one number.
    spread = int.from_bytes(os.urandom(2)) / 0xFFFF * 2 - 1
    return wait_s * (1 + JITTER * spread)


def _frames_of_the_job(error: BaseException) -> Any:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return frames
