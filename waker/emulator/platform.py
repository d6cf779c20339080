"""The platform on this machine: an app's machines, the proxy before them, one log."""

import asyncio
import os
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from .api import Api
from .clock import VirtualLoop
from .cloud import VIRTUAL_PORT, Cloud
from .events import Event, EventLog, Run
from .faults import Faults
from .front import Front
from .knobs import Knobs
from .machine import Machine
from .message import Answer, Body, Reply, Request
from .process import LOOPBACK
from .proxy import Service
from .recipe import Image
from .routing import Limits
from .shapes import seconds_in
from .states import ALIVE, MAX_RESTARTS, POLICIES, State
from .virtual import Program
from .world import World

__all__ = ["MachineInfo", "Platform"]

Command = Sequence[str]

VIRTUAL_API = "http://_api.internal:4280"
VIRTUAL_TOKEN = "emulated"  # noqa: S105 - nothing listens there


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
    name: str = ""
    app: str = ""


class Platform:
    """An app on the emulated platform: `async with Platform(["worker", "up", "app.tasks:queue"]) as platform`.

    *command*: what each machine runs, or an `async def program(machine: CallableMachine) -> int` that runs in this
    process; *processes* instead of it: several commands in each machine, which stops when one exits without an error.
    All machines exist from the beginning and are stopped; a request to `url` starts what the start rule says.

    *env* is the whole environment of the machines besides what the platform sets, and PATH if absent.
    What stands in for the platform on one host: WORKER_PORT and PORT (each machine's own), TMPDIR (private, wiped at
    each start) and WORKER_BATON (the proxy's address, unless *env* has one).

    With *api* the Machines API listens too, at `api_url`, for whoever has `api_token`; `environment` points clients at
    both. *images* says what an image that a config names would run: its command, or a callable; the app's own is
    `registry.fly.io/APP:emulated`. Without a command all machines come from the API.

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
        api: bool = False,
        api_port: int = 0,
        api_token: str | None = None,
        images: Mapping[str, Command | Program | Image] | None = None,
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
            api=api,
            images=images,
            regions=regions,
            soft_limit=soft_limit,
            hard_limit=hard_limit,
            concurrency=concurrency,
            restart=restart,
            kill_signal=kill_signal,
            kill_timeout_s=kill_timeout_s,
            cwd=cwd,
        )
        self._count = 0 if command is None and processes is None else machines
        self._app = app
        self._image = f"registry.fly.io/{app}:emulated"
        self._images = {name: Image.of(what) for name, what in (images or {}).items()}
        if command is not None or processes is not None:
            self._images.setdefault(self._image, Image() if command is None else Image.of(command))
        self._regions = regions
        self._service = Service(app, regions[0], Limits(soft_limit, hard_limit), auto_start, concurrency)
        self._machine_config = {
            "image": self._image,
            "env": {"FLY_PROCESS_GROUP": "app", "PRIMARY_REGION": regions[0]},
            "metadata": {"fly_process_group": "app"},
            "restart": {"policy": restart, "max_retries": max_retries},
            "stop_config": {
                "signal": kill_signal or self._knobs.default_kill_signal,
                "timeout": seconds_in(kill_timeout_s),
            },
            "processes": [{"exec": [os.fspath(word) for word in words]} for words in processes or ()],
        }
        self._machine_service = {
            "protocol": "tcp",
            "internal_port": VIRTUAL_PORT,
            "autostart": auto_start,
            "autostop": "off",
            "concurrency": {"type": concurrency, "soft_limit": soft_limit}
            | ({} if hard_limit is None else {"hard_limit": hard_limit}),
            "ports": [{"port": 80, "handlers": ["http"]}],
        }
        self._env = dict(env or {})
        self._cwd = cwd
        self._address = (host, port)
        self._api_address = (host, api_port)
        self._seed = seed
        self._log_to = log if log is not None else _to_stderr
        self._log = EventLog()
        self._api_wanted = api
        self._api: Api | None = None
        self._api_front: Front | None = None
        self._given_token = api_token
        self._started = False
        self.url = f"http://{app}.flycast"
        self.api_url = ""
        self.api_token = ""

    # Life

    async def __aenter__(self) -> "Platform":
        virtual = isinstance(asyncio.get_running_loop(), VirtualLoop)
        self._world = World(self._knobs, self._faults, self._seed, self._log, (lambda: 0.0) if virtual else time.time)
        self._cloud = Cloud(
            self._world,
            images=self._images,
            regions=self._regions,
            env=self._env,
            cwd=self._cwd,
            seed=self._seed,
            virtual=virtual,
            log=lambda machine, line: self._told(self._log_to, machine, line),
            listen=self._log.listen,
        )
        try:
            await self._open(virtual)
        except BaseException:
            await self.close()
            raise
        self._started = True
        shown = {"url": self.url, "api_url": self.api_url} if self.api_url else {"url": self.url}
        self._world.emit("platform.started", **shown)
        return self

    async def _open(self, virtual: bool) -> None:
        app = await self._cloud.open_app(self._app, service=self._service, listen=self._address)
        self._proxy = app.proxy
        self.url = app.url
        self._cloud.allocate(app, "private_v6")
        if self._api_wanted:
            # Whoever has the token runs commands here: it must not be guessed, except where nothing listens.
            self.api_token = self._given_token or (VIRTUAL_TOKEN if virtual else secrets.token_hex(16))
            self._api = Api(self._world, self._cloud, self.api_token, self._regions[0], self._seed)
            self.api_url = VIRTUAL_API
            if not virtual:
                self._api_front = Front(self._api.handle, keep=0)
                host, port = self._api_address[0], await self._api_front.start(*self._api_address)
                self.api_url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        for index in range(self._count):
            config = {**self._machine_config, "services": [{**self._machine_service}]}
            region = self._regions[index % len(self._regions)]
            self._cloud.create(app, config, region=region, state=State.STOPPED, own_port=True)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Kill every machine at once and take the platform down. `stop_all` first is the gentle way."""
        if self._api_front is not None:
            await self._api_front.close()
        await self._cloud.close_fronts()
        guests = [machine.guest for machine in self._all() if machine.guest is not None]
        await self._world.close()
        for guest in guests:
            guest.kill()
        for guest in guests:
            await asyncio.shield(guest.exited)
        self._cloud.close()
        if self._started:
            self._world.emit("platform.stopped")
        self._started = False
        if self._world.failures:
            raise self._world.failures.pop(0)

    def _all(self) -> list[Machine]:
        return [deployed.machine for deployed in self._cloud.machines.values()]

    @property
    def environment(self) -> dict[str, str]:
        """What points any client at this platform; the names are those that the platform's own tools read."""
        pointers = {"FLY_APP_NAME": self._app, "WAKER_TARGET": self.url}
        if self.api_url:
            pointers |= {"FLY_FLAPS_BASE_URL": self.api_url, "FLY_API_TOKEN": self.api_token}
        return pointers

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
        return await _read(await self._proxy.handle(request))

    async def fetch(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Reply:
        """Send a request to any address here without a socket: the API, an app's `.flycast`, a private address.

        For clients on the virtual clock. Raise ConnectionError as a socket would.
        """
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        pieces = deque([body] if body else [])

        async def read() -> bytes:
            return pieces.popleft() if pieces else b""

        fields = tuple((headers or {}).items())
        request = Request(method, target, fields, Body(read, keep=self._knobs.replay_max_bytes) if body else Body())
        if self._api is not None and url.startswith(self.api_url):
            return await _read(await self._api.handle(request))
        for app in self._cloud.apps.values():
            if app.addresses and parts.netloc == urlsplit(app.url).netloc:
                return await _read(await app.proxy.handle(request))
        for deployed in self._cloud.machines.values():
            guest = deployed.machine.guest
            if parts.hostname == deployed.private_ip and guest is not None:
                connection = await guest.connect()
                try:
                    return await _read(await connection.send(request))
                finally:
                    connection.close()
        raise ConnectionRefusedError(f"nothing listens at {parts.netloc}")

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
        for machine in self._all():
            machine.stop(None, timeout_s, source="emulator")
        while any(machine.state in ALIVE for machine in self._all()):
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
        return tuple(self.machine(machine_id) for machine_id in self._cloud.machines)

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
            name=self._cloud.machines[machine_id].name,
            app=self._cloud.machines[machine_id].app.name,
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
        return list(self._cloud.tails[machine_id])

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
            requests = any(app.proxy.open_requests for app in self._cloud.apps.values())
            return not requests and not any(each.state in ALIVE or each.due for each in self._all())

        await self.wait_for(quiet, timeout_s)

    def _summary(self) -> str:
        states = ", ".join(f"{machine.id} {machine.state}" for machine in self._all())
        return f"{states}; {self._proxy.open_requests} requests under way"

    def _machine(self, machine_id: str) -> Machine:
        try:
            return self._cloud.machines[machine_id].machine
        except KeyError:
            raise KeyError(f"no machine {machine_id!r}; there are {', '.join(self._cloud.machines)}") from None

    def _told(self, callback: Callable[..., None], *args: Any) -> None:
        """Call somebody else's *callback* in the middle of ours."""
        try:
            callback(*args)
        except Exception as error:
            self._world.failures = self._world.failures or [error]


async def _read(answer: Answer) -> Reply:
    """An answer, to its end."""
    try:
        content = b"".join([chunk async for chunk in answer.body])
    finally:
        await answer.aclose()
    return Reply(answer.status, answer.headers, content)


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
    api: bool,
    images: Any,
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
    if command is not None and processes is not None:
        errors.append("give a command, or processes, and not both")
    elif command is None and processes is None:
        if not (api and images):
            errors.append("give a command, or processes, or the API and images")
    elif isinstance(command, str) or any(isinstance(each, str) for each in processes or ()):
        errors.append("a command is a list of words, like ['worker', 'up', 'app.tasks:queue']")
    elif not callable(command) and not all(processes or (command,)):
        errors.append("a command needs at least one word")
    if machines < (not api):
        errors.append(f"machines={machines}: expected at least {0 if api else 1}")
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
