"""Coalescing: many nudges, one wake in flight and one after it.

A nudge only notes what is owed; a thread of our own pays. Nothing here trusts a flag to say that a wake is in flight: a
flag survives a fork, or the event loop it belonged to, and then every nudge hides behind a wake that does not exist.
What counts is a thread of this process that is alive.
"""

import atexit
import logging
import os
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable

from .errors import NotWoken, Unauthorized, WakeError

__all__ = ["FLUSH_AT_EXIT_S", "NUDGE_INTERVAL_S", "NUDGE_TIMEOUT_S", "Nudger"]

NUDGE_INTERVAL_S = 0.1
# One wake in the background may take this long; after it the debt stays, and the next attempt begins anew.
NUDGE_TIMEOUT_S = 120.0
FLUSH_AT_EXIT_S = 10.0
RETRY_S = 1.0
RETRY_MAX_S = 30.0

log = logging.getLogger("waker")


class Nudger:
    """Owes wakes and pays them: *wake(machines, timeout_s)* blocks, and raises if nobody gave a receipt.

    Without *wake* nothing is ever owed. *name* is for the log.
    """

    def __init__(
        self,
        wake: Callable[[int, float], object] | None,
        *,
        name: str = "",
        interval_s: float = NUDGE_INTERVAL_S,
        flush_at_exit_s: float = FLUSH_AT_EXIT_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wake = wake
        self._name = name
        self._interval_s = interval_s
        self._flush_at_exit_s = flush_at_exit_s
        self._now = now
        self._changed = threading.Condition()  # guards all below; also told when a debt is paid or a flush begins
        self._owed = 0  # machines the next wake asks for; read without the lock by nudge()
        self._payer: threading.Thread | None = None  # the thread that pays; gone when nothing is owed
        # Held by the payer for as long as it lives, however it ends: is_alive(), in a tenth of the time.
        self._life = threading.Lock()
        self._paying = 0  # machines the wake in flight asks for
        self._began_at = float("-inf")  # when the last wake began
        self._failures = 0  # wakes in a row that failed
        self._due_at = float("-inf")  # no attempt before this, after a failure
        _living.add(self)

    def nudge(self, machines: int = 1) -> None:
        """Owe a wake of *machines* that begins after this call. Never blocks, never raises."""
        try:
            # The payer sets _owed to 0 before its wake begins, so what is owed now is asked for after this moment; and
            # it ends only with nothing owed. One that is not alive (a fork, a crash) holds nothing, and pays nothing.
            if 0 < machines <= self._owed and self._life.locked():
                return
            self._owe(machines)
        except Exception as error:
            # An enqueue must not fail because its nudge did.
            log.error("nudge.failed target=%s error=%r", self._name, error)  # noqa: TRY400 - an event

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is owed, *timeout_s* at most; whether that came true."""
        deadline = self._now() + timeout_s
        with self._changed:
            # What waits for its turn after a failure tries now; a failure of that try waits again.
            self._due_at = float("-inf")
            self._changed.notify_all()
            while (self._owed and (self._alive() or self._start())) or (self._paying and self._alive()):
                left_s = deadline - self._now()
                if left_s <= 0:
                    return False
                self._changed.wait(left_s)
        if self._owed:
            self._pay_here(deadline)
        return not self._owed

    def close(self, timeout_s: float) -> None:
        """Flush, then drop what is still owed, with a word in the log."""
        if not self.flush(timeout_s):
            with self._changed:
                dropped = max(self._owed, self._paying)
                self._owed = self._paying = 0
                self._changed.notify_all()
            log.error("nudge.dropped target=%s machines=%d: nobody answered in time", self._name, dropped)

    def _alive(self) -> bool:
        return self._payer is not None and self._payer.is_alive()

    def _owe(self, machines: int) -> None:
        if machines < 1:
            raise ValueError(f"machines={machines!r}: expected a number above 0")
        if self._wake is None:
            return
        _finalize()
        with self._changed:
            self._owed = max(self._owed, machines)
            started = self._alive() or self._start()
        if not started:
            self._pay_here(self._now() + self._flush_at_exit_s)

    def _start(self) -> bool:
        """Start the payer; False where no thread can, or where it would not live to pay. Under the lock."""
        if _ending:
            return False
        payer = threading.Thread(target=self._live, name="waker-nudge", daemon=True)
        self._payer = payer
        try:
            payer.start()
        except RuntimeError:
            self._payer = None
            return False
        return True

    def _live(self) -> None:
        with self._life:
            self._pay()

    def _pay(self) -> None:
        """The payer's life: wait for the turn, wake, until nothing is owed."""
        while True:
            with self._changed:
                while self._owed and (wait_s := max(self._began_at + self._interval_s, self._due_at) - self._now()) > 0:
                    self._changed.wait(wait_s)
                if not self._owed:
                    # In one step with the check: a nudge that comes now finds no payer, and starts one.
                    self._payer = None
                    self._changed.notify_all()
                    return
                machines = self._begin()
            self._settle(self._attempt(machines, NUDGE_TIMEOUT_S))

    def _pay_here(self, deadline: float) -> None:
        """Wake in the caller, where no thread can start; what fails stays owed, and is not tried again here."""
        with self._changed:
            if self._alive():
                return  # somebody else is paying, and takes what is owed now after it
            self._payer = threading.current_thread()
        error = None
        while error is None:
            with self._changed:
                if not self._owed:
                    break
                machines = self._begin()
            error = self._attempt(machines, max(0.0, deadline - self._now()))
            self._settle(error)
        with self._changed:
            self._payer = None

    def _begin(self) -> int:
        """Take over the debt; whatever is nudged from now on is another one. Under the lock."""
        self._paying, self._owed = self._owed, 0
        self._began_at = self._now()
        return self._paying

    def _attempt(self, machines: int, timeout_s: float) -> BaseException | None:
        assert self._wake is not None  # noqa: S101 - nothing is owed without
        try:
            self._wake(machines, timeout_s)
        except BaseException as error:
            return error  # whatever it was, the debt stays
        return None

    def _settle(self, error: BaseException | None) -> None:
        with self._changed:
            machines, self._paying = self._paying, 0
            if machines == 0:
                error = None  # close() let go of it
            if error is None:
                self._failures = 0
            else:
                self._owed = max(self._owed, machines)
                ceiling_s = min(RETRY_MAX_S, RETRY_S * 2.0 ** min(self._failures, 10))
                self._due_at = self._now() + RETRY_S + random.random() * (ceiling_s - RETRY_S)
                self._failures += 1
            self._changed.notify_all()
        if error is not None:
            # Outside the lock: a log handler may nudge. What no retry will mend by itself is an error.
            mends = isinstance(error, NotWoken) and not isinstance(error, Unauthorized)
            text = error if isinstance(error, WakeError) else repr(error)
            log.log(
                logging.WARNING if mends else logging.ERROR,
                "nudge.owed target=%s machines=%d failures=%d error=%s",
                *(self._name, machines, self._failures, text),
            )

    def _forget_in_child(self) -> None:
        """After a fork: the parent's debts are the parent's, and its lock may be held by a thread that is not here."""
        self._changed = threading.Condition()
        self._life = threading.Lock()
        self._owed = self._paying = self._failures = 0
        self._payer = None
        self._began_at = self._due_at = float("-inf")

    def _end(self, began: float) -> None:
        """The process ends: the last chance to pay. All nudgers' time counts from the same moment, *began*."""
        if (self._owed or self._paying) and not self.flush(max(0.0, began + self._flush_at_exit_s - self._now())):
            log.error("nudge.lost target=%s machines=%d: the process ends", self._name, max(self._owed, self._paying))


# Every nudger of this process, for the fork and for the end.
_living: weakref.WeakSet[Nudger] = weakref.WeakSet()
_ending = False  # from the flush at the end on, threads are no longer started: they would not live to pay
_finalizing = False  # the end of this process, a child of multiprocessing, flushes


def _at_exit() -> None:
    global _ending
    _ending = True
    began = time.monotonic()
    for nudger in list(_living):
        nudger._end(began)


def _finalize() -> None:
    """See to it that a child of multiprocessing flushes: it ends without atexit, and begins without finalizers."""
    global _finalizing
    process = sys.modules.get("multiprocessing.process")
    if _finalizing or process is None or process.parent_process() is None:
        return
    from multiprocessing.util import Finalize

    _finalizing = True
    Finalize(None, _at_exit, exitpriority=0)


def _forget_in_child() -> None:
    global _ending, _finalizing
    _ending = _finalizing = False
    for nudger in list(_living):
        nudger._forget_in_child()


# At the import, not with the first debt: what is registered while the process ends is not called.
atexit.register(_at_exit)
os.register_at_fork(after_in_child=_forget_in_child)
