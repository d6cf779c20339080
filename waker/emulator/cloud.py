"""What exists on the platform: apps, their machines, addresses and volumes; how each comes to be and goes."""

import asyncio
import hashlib
import os
import random
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .events import Event
from .front import Front
from .guest import Boot, Runner
from .history import History
from .machine import Build, Machine, RefusedError
from .private import PrivateAddress, address_of
from .process import LOOPBACK, PORTS, PortClaim, ProcessRunner
from .proxy import Proxy, Service
from .recipe import Image, Recipe, recipe
from .routing import Limits
from .states import State
from .virtual import CallableRunner
from .world import World

__all__ = [
    "VIRTUAL_PORT",
    "App",
    "Cloud",
    "Deployed",
    "NameTakenError",
    "NotThereError",
    "TakenError",
    "UnknownImageError",
    "Volume",
]

MAX_LOG_LINES = 1_000  # per machine
MAX_VERSIONS = 100
VIRTUAL_PORT = 8080
ORG = "personal"
ADJECTIVES = ("autumn", "black", "cold", "divine", "falling", "green", "icy", "late", "misty", "old", "quiet", "wispy")
NOUNS = ("bird", "brook", "cloud", "dawn", "field", "frost", "glade", "moon", "pine", "river", "snow", "sound", "wave")


class NotThereError(Exception):
    """There is nothing of that name."""


class TakenError(Exception):
    """Somebody else has that name, or that volume."""


class NameTakenError(TakenError):
    """Another machine of the app has that name."""


class UnknownImageError(Exception):
    """No image of that name can be found."""


@dataclass(slots=True)
class Volume:
    """A volume; its folder outlives the machine."""

    id: str
    name: str
    region: str
    size_gb: int
    created_at: float
    folder: str
    machine: str | None = None
    encrypted: bool = True
    auto_backup: bool = True
    snapshot_retention: int = 5


@dataclass(slots=True)
class App:
    """An app and its edge. *addresses*: (address, type, created at)."""

    name: str
    number: int
    org: str
    network: str
    proxy: Proxy
    machines: dict[str, Machine]
    url: str
    created_at: float
    front: Front | None = None
    addresses: list[tuple[str, str, float]] = field(default_factory=list)
    volumes: dict[str, Volume] = field(default_factory=dict)


@dataclass(slots=True)
class Deployed:
    """A machine, and what the platform knows of it beside its life."""

    machine: Machine
    app: App
    index: int
    name: str
    config: dict[str, Any]
    recipe: Recipe
    port: int
    private_ip: str
    created_at: float
    history: History
    versions: deque[tuple[str, dict[str, Any]]]  # newest first
    updated_at: float
    claim: PortClaim | None = None
    private: PrivateAddress | None = None
    destroyed_at: float | None = None
    schedule: int = 0  # counts the schedules it has had; a timer of an older one does nothing


class Cloud:
    """Belongs to the platform's event loop."""

    def __init__(
        self,
        world: World,
        *,
        images: Mapping[str, Image],
        regions: tuple[str, ...],
        env: Mapping[str, str],
        cwd: str | None,
        seed: int,
        virtual: bool,
        log: Callable[[str, str], None],
        listen: Callable[[Callable[[Event], None]], object],
    ) -> None:
        self._world = world
        self._images = images
        self._regions = regions
        self._env = env
        self._cwd = cwd
        self._seed = seed
        self._virtual = virtual
        self._log = log
        self._rng = random.Random(f"machines:{seed}")
        self._family = f"{self._rng.randrange(16**9):09x}"
        self._first_port = self._rng.randrange(len(PORTS)) + os.getpid() * 16
        self._names = random.Random(f"names:{seed}")
        self._versions = 0
        self._made = 0
        self._folder: str | None = None
        self.apps: dict[str, App] = {}
        self.machines: dict[str, Deployed] = {}
        self.tails: dict[str, deque[str]] = {}
        listen(self._heard)

    @property
    def virtual(self) -> bool:
        """Whether everything here is on a virtual clock, without sockets."""
        return self._virtual

    # Apps

    async def open_app(
        self,
        name: str,
        *,
        service: Service | None = None,
        org: str = ORG,
        network: str = "default",
        listen: tuple[str, int] = (LOOPBACK, 0),
    ) -> App:
        """Make an app; raise TakenError. Its proxy listens at `url`, which stands for its private address."""
        if name in self.apps:
            raise TakenError(f"name {name} has already been taken")
        world = self._world
        machines: dict[str, Machine] = {}
        proxy = Proxy(world, service or Service(name, self._regions[0], Limits()), machines)
        url = f"http://{name}.flycast"
        # Registered before anything is awaited: two requests for one name make one app.
        app = self.apps[name] = App(name, len(self.apps) + 1, org, network, proxy, machines, url, world.now())
        if not self._virtual:
            app.front = Front(proxy.handle, keep=world.knobs.replay_max_bytes)
            try:
                host, port = listen[0], await app.front.start(*listen)
            except BaseException:
                del self.apps[name]
                raise
            app.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        return app

    async def close_app(self, app: App) -> None:
        """Remove an app and everything in it."""
        del self.apps[app.name]
        for machine in tuple(app.machines.values()):
            machine.destroy()
        for volume in app.volumes.values():
            shutil.rmtree(volume.folder, ignore_errors=True)
        if app.front is not None:
            await app.front.close()
        app.proxy.close()

    def allocate(self, app: App, kind: str) -> str:
        """Give *app* an address of *kind*: private_v6, v6, v4 or shared_v4."""
        number = len(app.addresses) + 1
        address = {
            "private_v6": f"fdaa:0:6ba9:0:{app.number:x}::{number + 1:x}",
            "v6": f"2a09:8280:1::{app.number:x}:{number:x}",
            "v4": f"137.66.{app.number % 256}.{number % 256}",
            "shared_v4": "66.241.124.1",
        }[kind]
        app.addresses.append((address, kind, self._world.now()))
        return address

    # Machines

    def image(self, name: str) -> Image:
        """The image of that name, with or without `:latest`; raise UnknownImageError."""
        for spelling in (name, name.removesuffix(":latest"), f"{name}:latest", "*"):
            if spelling in self._images:
                return self._images[spelling]
        raise UnknownImageError(name)

    def understand(self, config: Mapping[str, Any]) -> Recipe:
        """What *config* comes to here."""
        return recipe(config, self.image(config["image"]), self._world.knobs)

    def create(
        self,
        app: App,
        config: dict[str, Any],
        *,
        region: str,
        name: str | None = None,
        state: State = State.CREATED,
        launch: bool = False,
        own_port: bool = False,
    ) -> Deployed:
        """Make a machine, in one step; raise what is wrong with *config*, TakenError or NotThereError.

        *own_port*: the config's service has the real port, filled in here.
        """
        world = self._world
        if name is not None and (twin := self._named(app, name)) is not None:
            raise NameTakenError(f'unique machine name violation, machine ID {twin} already exists with name "{name}"')
        understood = self.understand(config)  # refuse before anything is registered
        index = self._made
        machine_id = f"e{self._family}{0x8000 + 17 * (index + 1) & 0xFFFF:04x}"
        if machine_id in self.machines:
            raise TakenError("this platform has had as many machines as it has names for")
        volumes = self._attach(app, understood, region, machine_id)
        claim, port = None, VIRTUAL_PORT
        if not self._virtual:
            claim = PortClaim(self._first_port + index)
            port = claim.port
        if own_port:
            for service in config["services"]:
                service["internal_port"] = port
            understood = self.understand(config)
        self._made += 1
        private_ip = f"fdaa:0:6ba9:a7b:{index + 1:x}::2" if self._virtual else address_of(index)
        version = self._version()
        build = self._build(app, machine_id, index, region, config, understood, version, port, private_ip, volumes)
        distance = self._regions.index(region) if region in self._regions else len(self._regions)
        machine = Machine(world, build, region=region, distance=distance, state=state)
        deployed = Deployed(
            machine=machine,
            app=app,
            index=index,
            name=name or self._name(app),
            config=config,
            recipe=understood,
            port=port,
            private_ip=private_ip,
            created_at=world.now(),
            history=History(machine_id, world.epoch, world.knobs),
            versions=deque([(version, config)], maxlen=MAX_VERSIONS),
            updated_at=world.now(),
            claim=claim,
        )
        self.tails[machine_id] = deque(maxlen=MAX_LOG_LINES)
        self.machines[machine_id] = deployed
        app.machines[machine_id] = machine
        world.emit("machine.created", machine_id, region=region, port=port)
        if state is State.CREATED:
            delay_s = world.draw(world.knobs.prepare_s)
            machine.launch(delay_s) if launch else machine.prepare(delay_s)
        self._schedule(deployed)
        return deployed

    def update(self, deployed: Deployed, config: dict[str, Any], *, launch: bool) -> None:
        """Replace a machine's config, and start it if *launch*; raise what `create` raises, or RefusedError."""
        world, machine = self._world, deployed.machine
        understood = self.understand(config)
        machine.check_replace()
        volumes = self._attach(deployed.app, understood, machine.region, machine.id)
        version = self._version()
        build = self._build(
            deployed.app,
            machine.id,
            deployed.index,
            machine.region,
            config,
            understood,
            version,
            deployed.port,
            deployed.private_ip,
            volumes,
        )
        machine.replace(build, launch=launch, delay_s=world.draw(world.knobs.boot_s))
        deployed.config = config
        deployed.recipe = understood
        deployed.versions.appendleft((version, config))
        self._schedule(deployed)

    def _build(
        self,
        app: App,
        machine_id: str,
        index: int,
        region: str,
        config: Mapping[str, Any],
        understood: Recipe,
        version: str,
        port: int,
        private_ip: str,
        volumes: tuple[tuple[str, str], ...],
    ) -> Build:
        env = {name: value for name, value in self._env.items() if not name.startswith("FLY_")}
        env.setdefault("PATH", os.pathsep.join((os.path.dirname(sys.executable), os.defpath)))
        env |= understood.env
        env |= {
            "FLY_ALLOC_ID": machine_id,
            "FLY_APP_NAME": app.name,
            "FLY_IMAGE_REF": config["image"],
            "FLY_MACHINE_ID": machine_id,
            "FLY_MACHINE_VERSION": version,
            "FLY_PRIVATE_IP": private_ip,
            "FLY_PUBLIC_IP": f"2605:4c40::{index + 1:x}",
            "FLY_REGION": region,
            "FLY_VM_MEMORY_MB": str(understood.memory_mb),
            "PORT": str(port),
            "WORKER_BATON": env.get("WORKER_BATON", app.url),
            "WORKER_PORT": str(port),
        }
        image = self.image(config["image"])
        runner: Runner
        if image.program is not None:
            runner = CallableRunner(image.program, log=self._machine_log)
        else:
            env["TMPDIR"] = os.path.join(self._place(), machine_id)
            runner = ProcessRunner(
                understood.commands,
                on_failure=self._world.knobs.process_failure,
                cwd=self._cwd,
                log=self._machine_log,
                process_exited=self._process_exited,
            )
        boot = Boot(machine_id, port, env, understood.commands[0], understood.files, volumes)
        several = len(understood.commands) > 1
        return Build(
            version,
            runner,
            boot,
            understood.config,
            understood.exposed,
            failure_stops=several and self._world.knobs.process_failure == "stop",
            auto_destroy=understood.auto_destroy,
        )

    def _attach(self, app: App, understood: Recipe, region: str, machine_id: str) -> tuple[tuple[str, str], ...]:
        """The folders to mount, by volume id or by the name of a free volume in the region."""
        mounts = []
        for path, wanted in understood.volumes:
            free = [each for each in app.volumes.values() if each.name == wanted and each.region == region]
            volume = app.volumes.get(wanted) or next(
                (each for each in free if each.machine in (None, machine_id)), None
            )
            if volume is None or volume.region != region:
                raise NotThereError(f"volume {wanted} not found in region {region}")
            if volume.machine not in (None, machine_id):
                raise TakenError(f"volume {volume.id} is attached to machine {volume.machine}")
            mounts.append((path, volume))
        for volume in app.volumes.values():
            if volume.machine == machine_id:
                volume.machine = None
        for _, volume in mounts:
            volume.machine = machine_id
        return tuple((path, volume.folder) for path, volume in mounts)

    def _named(self, app: App, name: str) -> str | None:
        return next(
            (
                machine_id
                for machine_id, each in self.machines.items()
                if each.app is app and each.name == name and each.machine.state is not State.DESTROYED
            ),
            None,
        )

    def _name(self, app: App) -> str:
        while True:
            words = (self._names.choice(ADJECTIVES), self._names.choice(NOUNS), self._names.randrange(10_000))
            name = f"{words[0]}-{words[1]}-{words[2]}"
            if self._named(app, name) is None:
                return name

    def _version(self) -> str:
        self._versions += 1
        return f"01EMULATED{self._seed % 10**8:08d}{self._versions:08d}"

    # Volumes

    def create_volume(self, app: App, name: str, region: str, size_gb: int) -> Volume:
        """An empty volume."""
        token = hashlib.sha256(f"{self._seed}:{app.name}:{len(app.volumes)}:{self._world.now()}".encode()).hexdigest()
        volume_id = f"vol_{token[:16]}"
        folder = "" if self._virtual else os.path.join(self._place(), "volumes", volume_id)
        if folder:
            os.makedirs(folder)
        volume = app.volumes[volume_id] = Volume(volume_id, name, region, size_gb, self._world.now(), folder)
        return volume

    def delete_volume(self, app: App, volume: Volume) -> None:
        """Remove one for good."""
        del app.volumes[volume.id]
        if volume.folder:
            shutil.rmtree(volume.folder, ignore_errors=True)

    # What goes on

    def _schedule(self, deployed: Deployed) -> None:
        """From now on, start it at each end of its interval (Fly docs: fly-machine-run; approximate, by design)."""
        deployed.schedule += 1
        interval_s = deployed.recipe.interval_s
        if interval_s is not None:
            self._tick(deployed, deployed.schedule, self._world.now(), self._world.scaled(interval_s), 1)

    def _tick(self, deployed: Deployed, schedule: int, began: float, interval_s: float, turn: int) -> None:
        world = self._world
        off = world.knobs.schedule_jitter * interval_s * world.rng.uniform(-0.5, 0.5)

        def due() -> None:
            if deployed.schedule != schedule or deployed.machine.state in (State.DESTROYING, State.DESTROYED):
                return
            with suppress(RefusedError):  # it is lost then: nothing tries again before the next turn
                deployed.machine.start("schedule")
            self._tick(deployed, schedule, began, interval_s, turn + 1)

        world.later(max(0.0, began + turn * interval_s + off - world.now()), due)

    def _heard(self, event: Event) -> None:
        deployed = self.machines.get(event.machine or "")
        if deployed is None or not event.type.startswith("machine."):
            return
        deployed.history.note(event, deployed.machine.steps)
        deployed.updated_at = event.at
        if event.type == "machine.started":
            self._open_private(deployed)
        elif event.type in ("machine.stopped", "machine.restarting") and deployed.private is not None:
            deployed.private.close()
            deployed.private = None
        elif event.type == "machine.destroyed":
            deployed.destroyed_at = event.at
            if deployed.claim is not None:
                deployed.claim.release()
            for volume in deployed.app.volumes.values():
                if volume.machine == deployed.machine.id:
                    volume.machine = None

    def _open_private(self, deployed: Deployed) -> None:
        """Let its private address and internal port lead to it, where they are not its real ones."""
        internal = deployed.recipe.internal_port
        if self._virtual or internal in (None, deployed.port):
            return
        private = deployed.private = PrivateAddress(deployed.private_ip, internal, (LOOPBACK, deployed.port))

        async def opened() -> None:
            try:
                await private.open()
            except OSError as error:
                self._world.emit("machine.unreachable", deployed.machine.id, reason=error.strerror)
            if deployed.private is not private:
                private.close()

        self._world.spawn(opened())

    def _process_exited(self, machine_id: str, index: int, code: int) -> None:
        self._world.emit("machine.process_exited", machine_id, process=index, exit_code=code)

    def _machine_log(self, machine_id: str, line: str) -> None:
        self.tails[machine_id].append(line)
        self._log(machine_id, line)

    def _place(self) -> str:
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="fly-")
        return self._folder

    # The end

    async def close_fronts(self) -> None:
        """Listen no more."""
        await asyncio.gather(*(app.front.close() for app in self.apps.values() if app.front is not None))

    def close(self) -> None:
        """Give everything back; nothing runs any more."""
        for deployed in self.machines.values():
            if deployed.private is not None:
                deployed.private.close()
            if deployed.claim is not None:
                deployed.claim.release()
        for app in self.apps.values():
            app.proxy.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
