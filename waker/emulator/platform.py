"""The platform on this machine: an app's machines, the proxy before them, one log."""

import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from .clock import VirtualLoop
from .events import Event, EventLog, Run
from .faults import Faults
from .front import Front
from .guest import Boot, Runner
from .knobs import Knobs
from .machine import Machine, StopConfig
from .message import Body, Reply, Request
from .process import LOOPBACK, PORTS, PortClaim, ProcessRunner
from .proxy import Proxy, Service
from .routing import Limits
from .states import ALIVE, MAX_RESTARTS, POLICIES
from .virtual import CallableRunner, Program
from .world import World

__all__ = ["MachineInfo", "Platform"]

Command = Sequence[str]

MAX_LOG_LINES = 1_000  # per machine
MEMORY_MB = 256


@dataclass(frozen=True, slots=True)
class MachineInfo:
    """A machine at one moment. Times are seconds since the platform began."""

    id: str
    region: str
    state: str
    port: int
    pids: tuple[int, ...]
    exit_code: int | None  # of its last finished run
    runs: tuple[Run, ...]
    billed_s: float
    in_flight: int


class Platform:
    """An app on the emulated platform: `async with Platform(["worker", "up", "app.tasks:queue"]) as platform`.

    *command*: what each machine runs, or an `async def program(machine: CallableMachine) -> int` that runs in this
    process; *processes* instead of it: several commands in each machine, which stops when one exits without an error.
    All machines exist from the beginning and are stopped; a request to `url` starts what the start rule says.

    *env* is the whole environment of the machines besides what the platform sets, and PATH if absent.
    What stands in for the platform on one host: WORKER_PORT and PORT (each machine's own), TMPDIR (private, wiped at
    each start) and WORKER_BATON (the proxy's address, unless *env* has one).

    *knobs* choose among readings of the platform, *faults* switch misbehaviour on, *seed* repeats both.
    """

    def __init__(
        self,
        command: Command | Program | None = None,
        *,
        processes: Sequence[Command] | None = None,
        machines: int = 3,
        app: str = "my-worker",
        region: str | Sequence[str] = "ams",
        soft_limit: int = 1,
        hard_limit: int | None = None,
        concurrency: str = "requests",
        auto_start: bool = True,
        restart: str = "on-failure",
        max_retries: int = MAX_RESTARTS,
        kill_signal: str | None = None,
        kill_timeout_s: float = 5.0,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        host: str = LOOPBACK,
        port: int = 0,
        knobs: Knobs | None = None,
        faults: Faults | None = None,
        seed: int = 0,
        log: Callable[[str, str], None] | None = None,
    ) -> None:
        self._knobs = knobs or Knobs()
        self._faults = faults or Faults()
        regions = (region,) if isinstance(region, str) else tuple(region)
        _check(
            command=command,
            processes=processes,
            machines=machines,
            regions=regions,
            soft_limit=soft_limit,
            hard_limit=hard_limit,
            concurrency=concurrency,
            restart=restart,
            kill_signal=kill_signal,
            kill_timeout_s=kill_timeout_s,
            cwd=cwd,
        )
        self._program: Program | None = command if callable(command) else None
        self._commands: Sequence[Command] = processes or (() if command is None or callable(command) else (command,))
        self._count = machines
        self._app = app
        self._regions = regions
        self._service = Service(app, regions[0], Limits(soft_limit, hard_limit), auto_start, concurrency)
        self._config = StopConfig(
            signal.Signals[kill_signal or self._knobs.default_kill_signal], kill_timeout_s, restart, max_retries
        )
        self._env = dict(env or {})
        self._cwd = cwd
        self._address = (host, port)
        self._seed = seed
        self._log_to = log if log is not None else _to_stderr
        self._log = EventLog()
        self._tails: dict[str, deque[str]] = {}
        self._machines: dict[str, Machine] = {}
        self._claims: list[PortClaim] = []
        self._front: Front | None = None
        self._folder: str | None = None
        self._started = False
        self.url = f"http://{app}.flycast"

    # Life

    async def __aenter__(self) -> "Platform":
        virtual = isinstance(asyncio.get_running_loop(), VirtualLoop)
        self._world = World(self._knobs, self._faults, self._seed, self._log, (lambda: 0.0) if virtual else time.time)
        self._proxy = Proxy(self._world, self._service, self._machines)
        try:
            if not virtual:
                self._front = Front(self._proxy.handle, keep=self._knobs.replay_max_bytes)
                host, port = self._address
                port = await self._front.start(host, port)
                self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            self._create_machines()
        except BaseException:
            await self.close()
            raise
        self._started = True
        self._world.emit("platform.started", url=self.url)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Kill every machine at once and take the platform down. `stop_all` first is the gentle way."""
        if self._front is not None:
            await self._front.close()
        guests = [machine.guest for machine in self._machines.values() if machine.guest is not None]
        await self._world.close()
        for guest in guests:
            guest.kill()
        for guest in guests:
            await asyncio.shield(guest.exited)
        self._proxy.close()
        for claim in self._claims:
            claim.release()
        self._claims.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._started:
            self._world.emit("platform.stopped")
        self._started = False
        if self._world.failures:
            raise self._world.failures.pop(0)

    def _create_machines(self) -> None:
        # Ids look like the platform's, differ between seeds, and say in their last digits which is which.
        rng = random.Random(f"machines:{self._seed}")
        family = f"{rng.randrange(16**9):09x}"
        runner: Runner
        if self._program is not None:
            runner = CallableRunner(self._program, log=self._machine_log)
        else:
            self._folder = tempfile.mkdtemp(prefix="fly-")
            on_failure = self._knobs.process_failure
            runner = ProcessRunner(
                self._commands,
                on_failure=on_failure,
                cwd=self._cwd,
                log=self._machine_log,
                process_exited=self._process_exited,
            )
        first_port = rng.randrange(len(PORTS)) + os.getpid() * 16
        for index in range(self._count):
            region = self._regions[index % len(self._regions)]
            machine_id = f"e{family}{0x8000 + 17 * (index + 1) & 0xFFFF:04x}"
            port = 8080
            if self._program is None:
                self._claims.append(PortClaim(first_port + index))
                port = self._claims[-1].port
            self._tails[machine_id] = deque(maxlen=MAX_LOG_LINES)
            self._machines[machine_id] = Machine(
                self._world,
                runner,
                Boot(machine_id, port, self._machine_env(machine_id, index, region, port)),
                region=region,
                distance=self._regions.index(region),
                config=self._config,
                failure_stops=len(self._commands) > 1 and self._knobs.process_failure == "stop",
            )
            self._world.emit("machine.created", machine_id, region=region, port=port)

    def _machine_env(self, machine_id: str, index: int, region: str, port: int) -> Mapping[str, str]:
        env = {name: value for name, value in self._env.items() if not name.startswith("FLY_")}
        env.setdefault("PATH", os.pathsep.join((os.path.dirname(sys.executable), os.defpath)))
        env |= {
            "FLY_ALLOC_ID": machine_id,
            "FLY_APP_NAME": self._app,
            "FLY_IMAGE_REF": f"registry.fly.io/{self._app}:emulated",
            "FLY_MACHINE_ID": machine_id,
            "FLY_MACHINE_VERSION": f"01EMULATED{self._seed % 10**8:08d}{index:08d}",
            "FLY_PRIVATE_IP": f"fdaa:0:6ba9:a7b:{index + 1:x}::2",
            "FLY_PROCESS_GROUP": "app",
            "FLY_PUBLIC_IP": f"2605:4c40::{index + 1:x}",
            "FLY_REGION": region,
            "FLY_VM_MEMORY_MB": str(MEMORY_MB),
            "PORT": str(port),
            "PRIMARY_REGION": self._regions[0],
            "WORKER_BATON": self._env.get("WORKER_BATON", self.url),
            "WORKER_PORT": str(port),
        }
        if self._folder is not None:
            env["TMPDIR"] = os.path.join(self._folder, machine_id)
        return env

    # What a person or a test may do

    async def request(
        self, method: str = "GET", target: str = "/", *, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Reply:
        """Send a request through the proxy without a socket, and read its answer to the end.

        Raise ConnectionError if the answer is broken off.
        """
        pieces = deque([body]) if body else deque()
        fields = tuple((headers or {}).items())
        if not any(name.lower() == "host" for name, _ in fields):
            fields = (("host", f"{self._app}.flycast"), *fields)
        if body:
            fields = (*fields, ("content-length", str(len(body))))

        async def read() -> bytes:
            return pieces.popleft() if pieces else b""

        request = Request(method, target, fields, Body(read, keep=self._knobs.replay_max_bytes) if body else Body())
        answer = await self._proxy.handle(request)
        try:
            content = b"".join([chunk async for chunk in answer.body])
        finally:
            await answer.aclose()
        return Reply(answer.status, answer.headers, content)

    async def start_machine(self, machine_id: str) -> None:
        """Start one as the Machines API does; raise RefusedError if the platform refuses."""
        self._machine(machine_id).start("api")

    async def stop_machine(
        self, machine_id: str, signal: str | int | None = None, timeout_s: float | None = None
    ) -> None:
        """Ask one to stop: *signal* (or the configured one), and after the kill timeout the end."""
        self._machine(machine_id).stop(_signal_number(signal), timeout_s)

    async def stop_all(self, timeout_s: float | None = None) -> None:
        """Stop every machine as the platform does, and wait until all have stopped."""
        for machine in self._machines.values():
            machine.stop(None, timeout_s, source="emulator")
        while any(machine.state in ALIVE for machine in self._machines.values()):
            await self._world.changed.wait()

    async def kill(self, machine_id: str) -> None:
        """Kill everything in its VM at once, as a lost host does."""
        self._machine(machine_id).kill()

    async def signal(self, machine_id: str, signal: str | int) -> None:
        """Send a signal to its main process, without asking it to stop."""
        guest = self._machine(machine_id).guest
        number = _signal_number(signal)
        if guest is not None and number is not None:
            guest.signal(number)

    async def destroy(self, machine_id: str) -> None:
        """Remove a machine for good; a running one is killed."""
        self._machine(machine_id).destroy()

    def set_faults(self, faults: Faults) -> None:
        """Switch to other faults from now on."""
        self._world.dice.set(faults)

    # What can be seen

    @property
    def epoch(self) -> float:
        """Unix time at which the platform began: add an event's `at` to it."""
        return self._world.epoch

    @property
    def now(self) -> float:
        """Seconds since the platform began."""
        return self._world.now()

    @property
    def machines(self) -> tuple[MachineInfo, ...]:
        """All machines as they are now."""
        return tuple(self.machine(machine_id) for machine_id in self._machines)

    def machine(self, machine_id: str) -> MachineInfo:
        """One machine as it is now."""
        machine = self._machine(machine_id)
        runs = self._log.runs(machine_id)
        guest = machine.guest
        return MachineInfo(
            id=machine_id,
            region=machine.region,
            state=str(machine.state),
            port=machine.port,
            pids=() if guest is None else tuple(guest.pids),
            exit_code=machine.exit_code,
            runs=runs,
            billed_s=sum(run.billed_s(self._world.now()) for run in runs),
            in_flight=machine.in_flight,
        )

    @property
    def events(self) -> list[Event]:
        """Everything that happened, oldest first (the newest 100,000)."""
        return self._log.since(0)

    @property
    def event_log(self) -> EventLog:
        """The log itself: `count` and `since(count)` for what happened after a moment."""
        return self._log

    def on_event(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call *callback* with each event from now on, in the platform's thread; return what ends that.

        What it raises is raised when the platform closes; it does not disturb the machines.
        """
        return self._log.listen(lambda event: self._told(callback, event))

    def logs(self, machine_id: str) -> list[str]:
        """The last lines that a machine printed."""
        return list(self._tails[machine_id])

    async def wait_for(self, condition: Callable[[], Any] | str, timeout_s: float = 30.0, *, since: int = 0) -> Any:
        """Wait until *condition* is true, or, if it is an event type, for such an event after the first *since* ones.

        A condition is asked again after each event. Return what it returned, or the event. Raise TimeoutError.
        """

        def found() -> Any:
            if callable(condition):
                return condition()
            return next((event for event in self._log.since(since) if event.type == condition), None)

        name = getattr(condition, "__name__", condition)
        news = asyncio.Event()
        end = self._log.listen(lambda _: news.set())
        try:
            async with asyncio.timeout(timeout_s):
                while not (result := found()):
                    news.clear()
                    await news.wait()
                return result
        except TimeoutError:
            raise TimeoutError(f"after {timeout_s} s: not {name}; {self._summary()}") from None
        finally:
            end()

    async def wait_all_stopped(self, timeout_s: float = 60.0) -> None:
        """Wait until no machine is up, on its way up, or to be restarted, and no request could start one.

        Raise TimeoutError, which says what each machine's state is.
        """

        def quiet() -> bool:
            return not self._proxy.open_requests and not any(each.state in ALIVE for each in self._machines.values())

        await self.wait_for(quiet, timeout_s)

    def _summary(self) -> str:
        states = ", ".join(f"{machine.id} {machine.state}" for machine in self._machines.values())
        return f"{states}; {self._proxy.open_requests} requests under way"

    def _machine(self, machine_id: str) -> Machine:
        try:
            return self._machines[machine_id]
        except KeyError:
            raise KeyError(f"no machine {machine_id!r}; there are {', '.join(self._machines)}") from None

    def _process_exited(self, machine_id: str, index: int, code: int) -> None:
        self._world.emit("machine.process_exited", machine_id, process=index, exit_code=code)

    def _machine_log(self, machine_id: str, line: str) -> None:
        self._tails[machine_id].append(line)
        self._told(self._log_to, machine_id, line)

    def _told(self, callback: Callable[..., None], *args: Any) -> None:
        """Call somebody else's *callback* in the middle of ours."""
        try:
            callback(*args)
        except Exception as error:
            self._world.failures = self._world.failures or [error]


def _to_stderr(machine_id: str, line: str) -> None:
    print(f"{machine_id} | {line}", file=sys.stderr, flush=True)


def _signal_number(value: str | int | None) -> int | None:
    if isinstance(value, str):
        return signal.Signals[value if value.startswith("SIG") else f"SIG{value}"].value
    return value


def _check(
    *,
    command: Any,
    processes: Any,
    machines: int,
    regions: tuple[str, ...],
    soft_limit: int,
    hard_limit: int | None,
    concurrency: str,
    restart: str,
    kill_signal: str | None,
    kill_timeout_s: float,
    cwd: str | None,
) -> None:
    """Every error at once."""
    errors = []
    if (command is None) == (processes is None):
        errors.append("give a command, or processes, and not both")
    elif isinstance(command, str) or any(isinstance(each, str) for each in processes or ()):
        errors.append("a command is a list of words, like ['worker', 'up', 'app.tasks:queue']")
    elif not callable(command) and not all(processes or (command,)):
        errors.append("a command needs at least one word")
    if machines < 1:
        errors.append(f"machines={machines}: expected at least 1")
    if not regions or not all(regions):
        errors.append("region: expected a name, like 'ams', or several")
    if soft_limit < 1 or (hard_limit is not None and hard_limit < soft_limit):
        errors.append(f"soft_limit={soft_limit}, hard_limit={hard_limit}: expected 1 <= soft_limit <= hard_limit")
    if concurrency not in ("requests", "connections"):
        errors.append(f"concurrency={concurrency!r}: expected requests or connections")
    if restart not in POLICIES:
        errors.append(f"restart={restart!r}: expected one of {', '.join(POLICIES)}")
    if kill_signal is not None and kill_signal not in signal.Signals.__members__:
        errors.append(f"kill_signal={kill_signal!r}: expected a name like SIGINT")
    if cwd is not None and not os.path.isdir(cwd):
        errors.append(f"cwd={cwd!r}: there is no such folder")
    if not 0 <= kill_timeout_s <= 300:
        errors.append(f"kill_timeout_s={kill_timeout_s}: expected 0 to 300 seconds")
    if errors:
        raise ValueError("; ".join(errors))
