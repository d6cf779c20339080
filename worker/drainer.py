"""The drainer: look → work → backlog → leave, and the exit code that the machine ends with.

It runs the user's own queue library in this process. All of our own code is imported before the user's is, and then
steps aside (`worker/aside.py`).
"""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import NamedTuple, NoReturn, TypeVar

from waker.errors import LoadError
from waker.load import load

from . import aside
from .baton import EXIT_JOBS_LEFT, EXIT_PASS_IT_ON, pass_on
from .config import Config
from .door import Token
from .doorway import Left, Line, LineLostError, Wait
from .drains import NAMES, Backlog, Drain, Options, Pulse, UnknownQueue, command, drain_for, install_hint
from .log import log
from .sockets import LIFELINE, let_signals_in

__all__ = ["Drainer", "drain"]

# A crash of the library outside of a job, or of ours: EX_SOFTWARE.
EXIT_CRASHED = 70
BROKER_PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# Of the time that a stop signal leaves, so much is kept for leaving.
LEAVE_MARGIN_S = 0.7
# After what is held was put back, the main thread has so long to come back from the library.
RELEASE_S = 0.2

Answer = TypeVar("Answer")


class Outcome(NamedTuple):
    """How a run ended: the exit code, and why, in the past tense."""

    code: int
    why: str


class _Ended(Exception):  # noqa: N818 - what happened, not what went wrong
    """The run ends here, with this code and for this reason."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.outcome = Outcome(code, why)


class Drainer:
    """The loop, for one drain and one line to the door. Clock and baton come in as arguments."""

    def __init__(self, config: Config, drain: Drain, pulse: Pulse, line: Line, stop: threading.Event, *,
                 pass_baton: Callable[[Config, int, float], str],
                 now: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._config = config
        self._drain = drain
        self._pulse = pulse
        self._line = line
        self._stop = stop
        self._pass_baton = pass_baton
        self._now = now
        self._stopped_at: float | None = None
        self._last_job_at: float | None = None
        self._stuck_at = -1  # how many were ready after the last pass that ran nothing
        self._idle = threading.Event()  # cleared while the library works
        self._idle.set()
        self.passes = 0
        self.phase = "starting"

    def stopped(self) -> None:
        """The machine is to stop; the hand-over has to fit into the time from now on."""
        self._stopped_at = self._now()

    def run(self) -> Outcome:
        """Drain until the door closes behind an empty queue, or something forbids to say that it is empty."""
        try:
            return self._run()
        except _Ended as ended:
            return ended.outcome
        except LineLostError as error:
            # Without a listener nobody can close the door for us; what was rung may still be in the queue.
            return Outcome(EXIT_JOBS_LEFT, f"lost the listener: {error}")

    def _run(self) -> Outcome:
        # The listener takes longer to start than we do. What is ready now need not wait for it: a reading without a
        # token is only ever followed by another one. A command cannot be read, so it waits for the first look.
        backlog = self._ask_broker(self._drain.backlog)
        covered: Token | None = None  # what a command's last whole pass had been rung for
        while True:
            if backlog is not None and backlog.ready and not self._stop.is_set():
                self._work(backlog)
            # Token first: a ring may land after we read the backlog, and then the door refuses to close.
            token = self._line.look()
            if backlog is None and not self._stop.is_set():
                self._work(None)
                if self._stop.is_set():
                    # The command was interrupted; what it left, nobody knows. Its exit code is its own, and was 0; but
                    # a wake that was answered is promised a whole pass, or another code.
                    rung = self._line.look() != (covered or Token(token.boot, 0))
                    return self._hand_over("whatever is left", EXIT_JOBS_LEFT if rung else 0)
                covered = token
            elif backlog is None and token != covered:
                return self._hand_over("whatever is left", EXIT_JOBS_LEFT)
            backlog = self._ask_broker(self._drain.backlog)
            if backlog is not None and backlog.ready:
                if self._stop.is_set():
                    return self._hand_over(f"{backlog.ready} ready", EXIT_JOBS_LEFT)
                continue
            if self._linger(backlog is None):
                continue
            verdict = self._line.leave(token)
            while isinstance(verdict, Wait):
                self._phase("lingering")
                if self._line.wait(verdict.seconds) or backlog is not None:
                    break  # news; or nothing new, and a fresh reading costs next to nothing
                verdict = self._line.leave(token)
            if isinstance(verdict, Left):
                return Outcome(0, "the queue is empty")

    def _work(self, backlog: Backlog | None) -> None:
        """One pass of the library's worker."""
        before = self._pulse.done
        self._phase("working")
        self.passes += 1
        self._idle.clear()
        try:
            code = self._ask_broker(lambda: self._drain.work(self._stop))
        finally:
            self._idle.set()
        if code:
            if self._stop.is_set():
                self._hand_over("whatever is left", code)
            raise _Ended(code, f"the worker ended with {code}")
        if self._pulse.done > before:
            self._last_job_at = self._now()
            self._stuck_at = -1
        elif backlog is not None and not self._stop.is_set():
            if self._stuck_at == backlog.ready:
                raise _Ended(EXIT_JOBS_LEFT, f"stuck: {backlog.ready} ready, and two passes in a row ran nothing")
            self._stuck_at = backlog.ready

    def _linger(self, only_for_news: bool) -> bool:
        """Stay a little after the last job; True if it is time for another look."""
        if self._last_job_at is None or self._stop.is_set():
            return False
        left = self._last_job_at + self._config.linger_s - self._now()
        if left <= 0:
            return False
        self._phase("lingering")
        return self._line.wait(left) or not only_for_news

    def _ask_broker(self, ask: Callable[[], Answer]) -> Answer:
        """Ask the queue; while its broker is down, ask again for WORKER_BROKER_RETRY_S, so that the platform's restarts
        are not used up in seconds."""
        down_since: float | None = None
        for attempt in itertools.count():
            try:
                return ask()
            except self._drain.broker_errors as error:
                now = self._now()
                down_since = now if down_since is None else down_since
                if now - down_since >= self._config.broker_retry_s or self._stop.is_set():
                    why = f"the broker is down since {now - down_since:.0f} s: {_sentence(error)}"
                    raise _Ended(EXIT_JOBS_LEFT, why) from error
                log("broker.down", attempt=attempt + 1, error=repr(_sentence(error)))
                self._phase("waiting-for-broker")
                self._stop.wait(BROKER_PAUSES_S[min(attempt, len(BROKER_PAUSES_S) - 1)])
        raise AssertionError("count() does not end")

    def _hand_over(self, left: str, otherwise: int) -> Outcome:
        """Told to stop with jobs left: another machine takes them, or the run ends with *otherwise*."""
        stopped_at = self._stopped_at if self._stopped_at is not None else self._now()
        budget = self._config.stop_timeout_s - LEAVE_MARGIN_S - (self._now() - stopped_at)
        self._phase("handing-over")
        taken_by = self._pass_baton(self._config, self._line.depth, budget)
        log("baton.taken" if taken_by else "baton.not_taken", by=taken_by or "nobody", left=repr(left))
        if taken_by:
            return Outcome(0, f"told to stop with {left}, and machine {taken_by} took over")
        return Outcome(otherwise, f"told to stop with {left}, and nobody took over")

    def time_is_up(self) -> Outcome | None:
        """After a stop, on a thread of its own: wait for the library; if it does not stop in time, put back what it
        holds. Returns how the run ends if the main thread cannot be had back even then.

        Without a parent to pass the baton when the job has ended with us, it is passed while that job still runs.
        """
        if self._idle.wait(self._config.drain_stop_s):
            return None
        log("drainer.out_of_time", after_s=self._config.drain_stop_s, running=self._pulse.running)
        self._drain.release()
        if self._idle.wait(RELEASE_S):
            return None
        if self._config.under_parent:
            return Outcome(EXIT_PASS_IT_ON, "a job did not stop in time, and was put back")
        return self._hand_over("a job that did not stop", EXIT_JOBS_LEFT)

    def _phase(self, phase: str) -> None:
        self.phase = phase
        self._line.report()


def drain(
    config: Config,
    target: str | Sequence[str],
    drain_name: str | None,
    environ: MutableMapping[str, str],
    *,
    queues: tuple[str, ...] = (),
) -> NoReturn:
    """Be the drainer of this machine: *target* is "module:object", or a command. Ends the process."""
    pulse = Pulse()
    stop = threading.Event()
    drainer: Drainer | None = None

    def report() -> tuple[int, int, int, int, str]:
        phase = drainer.phase if drainer is not None else "starting"
        return pulse.running, pulse.slots, pulse.done, pulse.failed, phase

    def stopped() -> None:
        stop.set()
        if drainer is not None:
            drainer.stopped()
            threading.Thread(target=guard, daemon=True).start()

    def guard() -> None:
        if drainer is not None and (outcome := drainer.time_is_up()) is not None:
            end(outcome)

    def end(outcome: Outcome) -> NoReturn:
        passes = drainer.passes if drainer is not None else 0
        log(
            "drainer.left",
            code=outcome.code,
            why=repr(outcome.why),
            jobs=pulse.done,
            failed=pulse.failed,
            passes=passes,
        )
        _leave(outcome.code)

    line = Line(config.socket, report, stopped, first_s=config.boot_s)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: line.signalled())
    let_signals_in()
    if config.under_parent:
        os.set_inheritable(LIFELINE, False)
        threading.Thread(target=_end_with_parent, name="lifeline", daemon=True).start()
    line.start()
    # Nudges from inside a drainer to the queue that it drains do nothing: its next reading sees the job.
    own = [config.app, f"http://{config.app}.flycast"] if config.app else []
    environ["WORKER_DRAINS"] = " ".join([*own, *([config.baton] if config.baton else [])])
    try:
        queue_drain = _make(target, drain_name, pulse, Options(queues, config.platform_id))
    except LoadError as error:
        log("drainer.not_started", why=repr(str(error)))
        _leave(error.exit_code)
    drainer = Drainer(config, queue_drain, pulse, line, stop, pass_baton=pass_on)
    if stop.is_set():
        drainer.stopped()
    line.attach()
    try:
        outcome = drainer.run()
    except Exception:
        import traceback

        traceback.print_exc()
        outcome = Outcome(EXIT_CRASHED, "the drain crashed")
    end(outcome)


def _make(target: str | Sequence[str], drain_name: str | None, pulse: Pulse, options: Options) -> Drain:
    """Import the user's object and the drain for it. Raises LoadError."""
    if not isinstance(target, str):
        return command.Drain(target, pulse)
    if drain_name and drain_name not in NAMES:
        raise LoadError(f"--drain {drain_name!r}: expected one of {', '.join(NAMES)}")
    aside.step_aside(os.getcwd())
    try:
        loaded = load(target)
    except LoadError as error:
        raise LoadError(f"{error}{install_hint(error.__cause__)}") from error
    name = drain_name or drain_for(loaded, options.queues)
    if isinstance(name, UnknownQueue):
        raise LoadError(f"{target!r}: no drain is known for it: {name.why}. "
                        "A drain can be named with --drain, and a command run with: worker up -- COMMAND")  # fmt: skip
    # Of the drain's own package, as it is by now: the class of the same name above is another one.
    refused: type[Exception] = aside.late("worker.drains").Refused
    try:
        made: Drain = aside.late(f"worker.drains.{name}").Drain(loaded, pulse, options)
    except ModuleNotFoundError as error:
        raise LoadError(f"{target!r} cannot be drained by {name}: {error}{install_hint(error)}") from error
    except refused as error:
        raise LoadError(f"{target!r} cannot be drained: {error}") from error
    return made


def _end_with_parent() -> None:
    """The VM ends with the machine's main process; elsewhere this does, and no job runs on beside the next machine."""
    os.read(LIFELINE, 1)
    log("drainer.orphaned", parent="gone")
    os.killpg(0, signal.SIGKILL)


def _leave(code: int) -> NoReturn:
    """End now: tearing the interpreter down costs 50 ms in which the machine is paid for and does nothing."""
    if "logging" in sys.modules:
        sys.modules["logging"].shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
