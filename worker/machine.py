"""`worker up`: one process that starts both programs at once and ends with the drainer's exit code.

Supervisor as a library does what it is good at: spawning, restarting the listener, stop signals and kill deadlines.
Three things of the stock daemon would cost seconds of a paid machine, and are different here (supervisor 4.3.0):

- it polls for a second before it starts anything; we start everything first;
- a signal does not end its poll (Python restarts it, PEP 475), so a child's end is noticed up to a second late; our
  poller has a wakeup descriptor, and blocks without a tick while nothing is timed;
- it always exits 0; we exit with what the drainer exited with.

The children write to our stdout and stderr themselves: no line of a job's log has to pass through this process.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from supervisor import events, poller
from supervisor.datatypes import RestartUnconditionally
from supervisor.medusa import asyncore_25 as asyncore
from supervisor.options import ProcessConfig, ProcessGroupConfig, ServerOptions
from supervisor.process import Subprocess
from supervisor.states import ProcessStates, SupervisorStates
from supervisor.supervisord import Supervisor

from .baton import EXIT_JOBS_LEFT, EXIT_PASS_IT_ON, pass_on
from .config import CHECKED, Config, to_environ
from .log import log
from .sockets import LIFELINE, STOP_SIGNALS, Signals, bind_doorway, let_signals_in

__all__ = ["up"]

# The listener could not be kept running: EX_SOFTWARE. Non-zero, so that the platform starts the machine again.
EXIT_NO_LISTENER = 70
# No drainer could be started: EX_OSERR.
EXIT_NO_DRAINER = 71
# A listener that ends sooner after its start has failed to start; supervisor tries again after 1, then 2 s.
LISTENER_START_S = 1
LISTENER_RETRIES = 2
# One that does start, but ends so often within so many seconds, is given up, too.
LISTENER_DEATHS = 5
LISTENER_DEATHS_S = 30.0
# Kept of the stop timeout for our own end, when it is us who pass the baton.
LEAVE_MARGIN_S = 0.3

# In EXITED, too: the loop that reaps a program has gone past the step that starts it again.
TIMED_STATES = (ProcessStates.STARTING, ProcessStates.STOPPING, ProcessStates.BACKOFF, ProcessStates.EXITED)

_ENTRY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "_wake_on_request.py")


class _Poller(poller.PollPoller):  # type: ignore[misc]  # supervisor has no types
    """A poll that signals end, and that does not tick while no process is in a timed state."""

    is_timed: Callable[[], bool]

    def initialize(self) -> None:
        super().initialize()
        self.wake_r, wake_w = os.pipe()
        os.set_blocking(self.wake_r, False)
        os.set_blocking(wake_w, False)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        self._poller.register(self.wake_r, self.READ)

    def poll(self, timeout: float) -> tuple[list[int], list[int]]:
        if self.options.signal_receiver.noted:
            timeout = 0
        elif not self.is_timed():
            timeout = 86_400
        readable, writable = super().poll(timeout)
        if self.wake_r in readable:
            readable.remove(self.wake_r)
            os.read(self.wake_r, 4096)
        return readable, writable


class _Logger:
    """Supervisor's logger: what it warns of becomes an event of ours; what we tell ourselves and its chatter is
    dropped.
    """

    def warn(self, message: str, **_: object) -> None:
        if not message.startswith(("exited:", "stopped:", "received ")):
            log("supervisor.warned", message=repr(message))

    error = critical = warn

    def info(self, message: str, **_: object) -> None:
        pass

    debug = blather = trace = info

    def close(self) -> None:
        pass


class _Program(Subprocess):  # type: ignore[misc]
    """A child with our own stdout and stderr."""

    def spawn(self) -> int | None:
        # A stop signal between fork and exec would be taken by our handler in the child, and be lost. The child starts
        # with them blocked, and lets them in when its own handlers stand (sockets.let_signals_in).
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            pid: int | None = super().spawn()
        finally:
            let_signals_in()
        return pid

    def get_execv_args(self) -> tuple[str, list[str]]:
        return self.config.command[0], self.config.command

    def _prepare_child_fds(self) -> None:
        # A pipe from us, whose end tells that we are gone: the listener's stdin, and the drainer's LIFELINE, for its
        # stdin is the user's. The listener's sockets are inherited by number.
        if self.config.inherited:
            os.dup2(self.pipes["child_stdin"], 0)
            for fd in self.config.inherited:
                os.set_inheritable(fd, True)
        else:
            os.dup2(self.pipes["child_stdin"], LIFELINE)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def drainer_ended(self) -> None:
        """Tell the listener, by the end of its stdin: there is nothing to wait for any more."""
        stdin = self.pipes.pop("stdin", None)
        if stdin is not None:
            os.close(stdin)

    def finish(self, pid: int, status: int) -> None:
        self.config.options.ended(self.config.name, pid, status)
        super().finish(pid, status)


class _ProgramConfig(ProcessConfig):  # type: ignore[misc]
    def __init__(self, options: "_Options", name: str, command: list[str], *, stop_s: float, environ: dict[str, str],
                 inherited: tuple[int, ...] = (), start_s: int = 0, restart: object = False) -> None:  # fmt: skip
        settings = dict.fromkeys(ProcessConfig.req_param_names)
        settings.update(
            name=name, command=command, environment=environ, autostart=True, autorestart=restart, startsecs=start_s,
            startretries=LISTENER_RETRIES, stopsignal=signal.SIGTERM, stopwaitsecs=stop_s, stopasgroup=False,
            killasgroup=True, exitcodes=[0], priority=1, redirect_stderr=False,
        )  # fmt: skip
        super().__init__(options, **settings)
        self.inherited = inherited

    def create_autochildlogs(self) -> None:
        pass

    def make_process(self, group: object = None) -> _Program:
        process = _Program(self)
        process.group = group
        return process

    def make_dispatchers(self, _process: object) -> tuple[dict[int, object], dict[str, int]]:
        child_stdin, stdin = os.pipe()
        return {}, {"child_stdin": child_stdin, "stdin": stdin}


class _Options(ServerOptions):  # type: ignore[misc]
    """Supervisor's options without a configuration file, log file, pid file or HTTP server."""

    minfds = 64
    test = False
    serverurl = None

    def __init__(self, signals: Signals, ended: Callable[[str, int, int], None]) -> None:
        super().__init__()
        self.signal_receiver = signals
        self.poller: Any = _Poller(self)
        self.logger = _Logger()
        self.ended = ended


class _Machine(Supervisor):  # type: ignore[misc]
    """Supervisor's loop, and what the end of each program means for the machine."""

    def __init__(self, config: Config, signals: Signals) -> None:
        super().__init__(_Options(signals, self._ended))
        self.options.poller.is_timed = self._is_timed
        self._mark = config.mark
        self.code: int | None = None  # the drainer's
        self.killed = False
        self.stopped_at: float | None = None
        self.gave_up = ""
        self._listener_deaths: list[float] = []
        events.subscribe(events.ProcessStateExitedEvent, self._exited)
        events.subscribe(events.ProcessStateBackoffEvent, self._exited)
        events.subscribe(events.ProcessStateFatalEvent, self._fatal)

    def supervise(self, programs: list[_ProgramConfig]) -> None:
        """Run both programs until both have ended."""
        self.options.process_group_configs = [ProcessGroupConfig(self.options, "machine", 1, programs)]
        for group in self.options.process_group_configs:
            self.add_process_group(group)
        self.options.setsignals()
        for group in self.process_groups.values():
            group.transition()
        try:
            self.runforever()
        except asyncore.ExitNow:
            pass

    def handle_signal(self) -> None:
        if self.stopped_at is None and any(signum in STOP_SIGNALS for signum in self.options.signal_receiver.noted):
            self.stopped_at = time.monotonic()
            log("machine.stopping", signal=signal.Signals(self.options.signal_receiver.noted[0]).name)
        super().handle_signal()

    def _is_timed(self) -> bool:
        stopping = self.options.mood < SupervisorStates.RUNNING
        processes = [process for group in self.process_groups.values() for process in group.processes.values()]
        return stopping or any(process.get_state() in TIMED_STATES for process in processes)

    def _ended(self, name: str, pid: int, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        if name != "drainer":
            return
        self.killed = code < 0
        self.code = 128 - code if code < 0 else code
        if self.killed and _read(self._mark).startswith("wedged"):
            self.code = EXIT_JOBS_LEFT
        # What a killed library leaves behind, like the children of its pool, ends with it.
        try:
            os.killpg(pid, signal.SIGKILL)
        except OSError:
            pass
        for group in self.process_groups.values():
            group.processes["listener"].drainer_ended()

    def _exited(self, event: events.ProcessStateExitedEvent) -> None:
        if event.process.config.name == "drainer":
            self.options.mood = SupervisorStates.SHUTDOWN
            return
        now = time.monotonic()
        self._listener_deaths = [at for at in self._listener_deaths if now - at < LISTENER_DEATHS_S] + [now]
        log("listener.died", code=event.process.exitstatus, times=len(self._listener_deaths))
        if len(self._listener_deaths) >= LISTENER_DEATHS:
            self._give_up(f"the listener died {LISTENER_DEATHS} times within {LISTENER_DEATHS_S:g} s")

    def _fatal(self, event: events.ProcessStateFatalEvent) -> None:
        if self.options.mood == SupervisorStates.RUNNING:
            name = event.process.config.name
            self._give_up(f"the {name} cannot be started: {event.process.spawnerr or 'it ends at once'}")

    def _give_up(self, why: str) -> None:
        self.gave_up = why
        self.options.mood = SupervisorStates.SHUTDOWN


def up(config: Config, target: Sequence[str], public: socket.socket, bound_at: float, signals: Signals) -> NoReturn:
    """Run listener and drainer; end the process with the drainer's exit code.

    *target*: the name of a drain or "", names of queues or "", and then an object, or -- and a command. *public*: the
    listening socket, bound at *bound_at* seconds of CLOCK_MONOTONIC. Raises OSError if the doorway cannot be bound.
    """
    doorway = bind_doorway(config.socket)
    _remove(config.mark)  # it speaks of an earlier run
    machine = _Machine(config, signals)
    environ = to_environ(config)
    fds = (public.fileno(), doorway.fileno())
    python = [sys.executable, _ENTRY]
    machine.supervise([
        _ProgramConfig(
            machine.options, "drainer", [*python, "drain", CHECKED, *target], environ=environ, stop_s=config.kill_s
        ),
        _ProgramConfig(
            machine.options, "listener", [*python, "listen", CHECKED, *map(str, fds), repr(bound_at)],
            # The listener speaks no TLS, and reading the certificates costs a fifth of its start (aiohttp does it at
            # import).
            environ={**environ, "SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": os.devnull}, inherited=fds,
            stop_s=config.stop_timeout_s, start_s=LISTENER_START_S, restart=RestartUnconditionally,
        ),
    ])  # fmt: skip
    # Nobody will accept any more: a connect that is refused at once is better than one that hangs.
    for sock in (public, doorway):
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
    code = _exit_code(config, machine, is_command=target[2] == "--")
    for path in (config.mark, config.socket):
        _remove(path)
    try:
        os.rmdir(os.path.dirname(config.socket))
    except OSError:
        pass  # not empty: a folder that the user named
    log("machine.left", code=code, up_s=round(time.monotonic() - bound_at, 3))
    os._exit(code)


def _exit_code(config: Config, machine: _Machine, *, is_command: bool) -> int:
    """The machine's exit code; passes the baton where the drainer was killed or had a job that did not stop."""
    if machine.gave_up:
        log("machine.gave_up", why=repr(machine.gave_up))
        return machine.code or EXIT_NO_LISTENER
    if machine.code is None:
        return EXIT_NO_DRAINER
    passed_up = machine.code == EXIT_PASS_IT_ON and not is_command
    if machine.stopped_at is None or not (machine.killed or passed_up):
        return machine.code
    depth = _read(config.mark).split()[1:2]
    left_s = config.stop_timeout_s - LEAVE_MARGIN_S - (time.monotonic() - machine.stopped_at)
    taken_by = pass_on(config, int(depth[0]) if depth else 0, left_s)
    why = "a job did not stop in time" if passed_up else "the drainer was killed"
    log("baton.taken" if taken_by else "baton.not_taken", by=taken_by or "nobody", left=repr(why))
    if passed_up:
        return 0 if taken_by else EXIT_JOBS_LEFT
    return machine.code  # what a killed library held may be lost: not 0, whoever took over


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
