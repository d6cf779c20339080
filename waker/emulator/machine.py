"""One machine's life: what may be asked of it, the VM it runs in, and when the proxy learns of it."""

import asyncio
import signal
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from .guest import Boot, Guest, Runner
from .leases import Lease
from .routing import Limits
from .states import ALIVE, MAX_RESTARTS, STARTABLE, State, Step, restart_granted, step
from .world import World

__all__ = ["Build", "Exposed", "Machine", "RefusedError", "Stage", "StopConfig"]

MAX_STAGES = 100


class RefusedError(Exception):
    """The platform does not start this machine now. *code*: the proxy's; *status*: the API's."""

    def __init__(self, code: str, status: int, reason: str) -> None:
        super().__init__(f"[{code}] {reason}")
        self.code = code
        self.status = status
        self.reason = reason


@dataclass(frozen=True, slots=True)
class StopConfig:
    """How a machine is stopped, and what follows an exit."""

    kill_signal: signal.Signals
    kill_timeout_s: float = 5.0
    restart: str = "on-failure"
    max_retries: int = MAX_RESTARTS


@dataclass(frozen=True, slots=True)
class Exposed:
    """What the proxy may do with a machine that has a service with a port; None: as the app has it."""

    limits: Limits | None = None
    auto_start: bool | None = None


@dataclass(frozen=True, slots=True)
class Build:
    """One version of a machine: what it runs, and how."""

    version: str
    runner: Runner
    boot: Boot
    config: StopConfig
    exposed: Exposed | None = Exposed()
    failure_stops: bool = False  # a process that fails stops the machine, and that is no reason to restart it
    auto_destroy: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """That a machine became *state*, as the *number*th of its steps, in this *version* of it."""

    number: int
    state: State
    version: str


class Machine:
    """A machine of an app. All methods belong to the platform's event loop."""

    def __init__(
        self,
        world: World,
        build: Build,
        *,
        region: str,
        distance: int,
        state: State = State.STOPPED,
    ) -> None:
        self._world = world
        self._build = build
        self._tokens = float(world.knobs.start_burst)
        self._tokens_at = world.now()
        self._settled_at = 0.0
        self._restarts: deque[float] = deque(maxlen=1000)
        self._stop_signal = 0
        self._learned = self._became = 0  # numbers of the steps; a view older than the newest learned is dropped
        self._destroy = False  # it is to be removed as soon as nothing of it runs
        self._again = False  # it is to be started again when it has stopped
        self._out_of_memory = False
        self.id = build.boot.machine
        self.region = region
        self.distance = distance
        self.port = build.boot.port
        self.state = state
        self.belief = state  # what the proxy thinks; a moment behind
        self.launching = False  # created, and not yet ready for a start
        self.due = False  # it will be started for the first time
        self.cordoned = False
        self.lease: Lease | None = None
        self.stages: deque[Stage] = deque([Stage(0, state, build.version)], maxlen=MAX_STAGES)
        self.version = build.version
        self.in_flight = 0  # requests that the proxy has given to it and that are not over
        self.stopped_at: float | None = None
        self.exit_code: int | None = None
        self.guest: Guest | None = None

    @property
    def env(self) -> Mapping[str, str]:
        """The environment of its processes."""
        return self._build.boot.env

    @property
    def exposed(self) -> Exposed | None:
        """What the proxy may do with it; None if it must not know it."""
        return None if self.cordoned else self._build.exposed

    @property
    def steps(self) -> int:
        """How many steps it has taken."""
        return self._became

    @property
    def recently_stopped(self) -> bool:
        """Whether its last run ended within the window of PM11."""
        return self.stopped_at is not None and (
            self._world.now() - self.stopped_at < self._world.scaled(self._world.knobs.recently_stopped_s)
        )

    def start(self, source: str, *, nonce: str | None = None) -> None:
        """Ask for a start. Nothing happens if it is up already; raise RefusedError if the platform does not want to.

        Refuse or register, in one step: nothing is awaited here. *nonce*: of the machine's lease.
        """
        if self.state in (State.STARTED, State.STARTING):
            return
        try:
            self._check_start(source, nonce)
        except RefusedError as refused:
            self._world.emit(
                "start.refused", self.id, code=refused.code, status=refused.status, reason=refused.reason, source=source
            )
            raise
        self._become(Step.START, at_once=source == "proxy")
        self._world.emit("machine.starting", self.id, source=source)
        self._world.spawn(self._live())

    def _check_start(self, source: str, nonce: str | None) -> None:
        world = self._world
        if self.state is State.DESTROYED:
            raise RefusedError("PR02", 404, "machine not found")
        # Budget and lease bind who asks from outside; the platform's own schedule is not asked for either.
        asked = source in ("api", "proxy")
        if asked and (not self.take_start() or world.strikes("start_rate_limited", self.id)):
            raise RefusedError("PM01", 429, "rate limit exceeded")
        if asked and world.strikes("start_lease_held", self.id):
            raise RefusedError("PM01", 409, f"machine ID {self.id} lease currently held by emulator")
        if asked:
            self.check_lease(nonce)
        if self.launching:
            raise RefusedError("PM08", 412, f"unable to start machine from current state: '{self.state}'")
        if self.state is State.REPLACING:
            raise RefusedError("PM07", 412, "machine getting replaced, refusing to start")
        if self.state is State.RESTARTING:
            raise RefusedError("PM01", 412, "machine still attempting to start")
        if self.state not in STARTABLE:
            raise RefusedError("PM08", 412, f"unable to start machine from current state: '{self.state}'")
        # The state reads stopped, and the VM is still being taken down.
        after_exit = self.stopped_at is not None
        if world.now() < self._settled_at or (after_exit and world.strikes("start_refused_after_exit", self.id)):
            raise RefusedError("PM07", 412, "failed_precondition: machine still active, refusing to start")

    def check_lease(self, nonce: str | None) -> None:
        """Raise RefusedError if somebody else holds the machine's lease."""
        world, lease = self._world, self.lease
        if lease is not None and lease.blocks(nonce, world.now()):
            raise RefusedError("PM01", 409, lease.refusal(self.id, world.timestamp(lease.until)))

    def take_start(self) -> bool:
        """One start out of the budget of this machine."""
        now, knobs = self._world.now(), self._world.knobs
        self._tokens = min(
            float(knobs.start_burst),
            self._tokens + self._world.unscaled(now - self._tokens_at) * knobs.start_rate_per_s,
        )
        self._tokens_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def stop(self, number: int | None = None, timeout_s: float | None = None, *, source: str = "api") -> None:
        """Ask for a stop: the signal, then after the timeout the end. Nothing happens to one that is stopped."""
        if self.state not in ALIVE:
            return
        if self.state is State.REPLACING:
            return  # it is being stopped already
        config = self._build.config
        self._again = False
        number = config.kill_signal if number is None else number
        timeout_s = config.kill_timeout_s if timeout_s is None else timeout_s
        self._stop_signal = number
        first = self.state is not State.STOPPING
        if first:
            self._become(Step.STOP)
        if self.state is State.STOPPED:  # it was between two runs: there is nothing to signal
            self._world.emit("machine.stopped", self.id, exit_code=self.exit_code, requested=True)
            return
        self._world.emit("machine.stopping", self.id, signal=signal.Signals(number).name, source=source)
        if self.guest is not None:
            self.guest.signal(number)
            if first:
                self._world.later(timeout_s, self._out_of_time, self.guest, timeout_s)

    def _out_of_time(self, guest: Guest, timeout_s: float) -> None:
        if guest is not self.guest:
            return  # that run is over
        if self._world.knobs.after_kill_timeout == "SIGTERM":
            guest.signal(signal.SIGTERM)
            self._world.later(timeout_s, guest.kill)
        else:
            guest.kill()

    def restart(self, number: int | None = None, timeout_s: float | None = None) -> None:
        """Stop it and start it again, whatever its restart policy says; raise RefusedError unless it is started."""
        if self.state is not State.STARTED:
            raise RefusedError("PM08", 412, f"unable to restart machine from current state: '{self.state}'")
        self.stop(number, timeout_s)
        self._again = True

    def kill(self) -> None:
        """End the VM at once, as a lost host does: exit code 137, and the restart policy has its say."""
        if self.guest is not None:
            self.guest.kill()

    def destroy(self, source: str = "api") -> None:
        """Remove it for good; one that is not stopped is killed first."""
        self._destroy = True
        if self.state in ALIVE:
            self.stop(source="destroy")
            self.kill()
        if self.state in STARTABLE:
            world = self._world
            self.due = False
            self._become(Step.REMOVE)
            world.emit("machine.destroying", self.id, source=source)
            world.later(world.draw(world.knobs.destroy_s), self._destroyed)

    def _destroyed(self) -> None:
        self._become(Step.DESTROY)
        self._world.emit("machine.destroyed", self.id)

    def launch(self, delay_s: float) -> None:
        """Start it for the first time, *delay_s* from now."""
        self.launching = self.due = True
        self._world.spawn(self._launch(delay_s))

    async def _launch(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self.launching = self.due = False
        if self.state is State.CREATED:
            self._become(Step.START)
            self._world.emit("machine.starting", self.id, source="launch")
            await self._live()

    def prepare(self, delay_s: float) -> None:
        """It exists and is not to be launched; a start is refused until *delay_s* from now."""
        self.launching = True

        def ready() -> None:
            self.launching = False
            self._world.changed.fire()

        self._world.later(delay_s, ready)

    def replace(self, build: Build, *, launch: bool, delay_s: float) -> None:
        """Become *build*: stopped first if it is up, then started if *launch*.

        Raise RefusedError in a state that passes by itself.
        """
        self.check_replace()
        guest, config = self.guest, self._build.config
        self.version = build.version
        self._stop_signal = config.kill_signal
        self._become(Step.REPLACE)
        self._world.emit("machine.replacing", self.id, version=build.version)
        if guest is not None:
            guest.signal(config.kill_signal)
            self._world.later(config.kill_timeout_s, self._out_of_time, guest, config.kill_timeout_s)
        self._world.spawn(self._replace(build, launch=launch, delay_s=delay_s))

    def check_replace(self) -> None:
        """Raise RefusedError in a state that passes by itself."""
        if self.launching or self.state not in (State.CREATED, State.STARTED, State.STOPPED):
            raise RefusedError("PM08", 412, f"unable to update machine from current state: '{self.state}'")

    async def _replace(self, build: Build, *, launch: bool, delay_s: float) -> None:
        while self.guest is not None:
            await self._world.changed.wait()
        await asyncio.sleep(max(delay_s, self._settled_at - self._world.now()))
        self._build = build
        if launch and not self._destroy:
            self._become(Step.START)
            self._world.emit("machine.starting", self.id, source="update")
            await self._live()
            return
        self._become(Step.REPLACED)
        self._world.emit("machine.replaced", self.id)
        if self._destroy:
            self.destroy()

    async def _live(self) -> None:
        """Run after run, as long as the restart policy grants another."""
        while await self._run():
            settling = max(0.0, self._settled_at - self._world.now())
            await asyncio.sleep(settling + self._world.scaled(self._world.knobs.restart_delay_s))
            if self.state is not State.RESTARTING:
                return  # a stop was asked for between the runs
            self._become(Step.START)
            self._world.emit("machine.starting", self.id, source="restart-policy")

    async def _run(self) -> bool:
        """One VM from its boot to its exit; whether it is to be started again."""
        world, knobs = self._world, self._world.knobs
        delay_s = world.draw(knobs.boot_s)
        if world.strikes("slow_start", self.id):
            delay_s += world.scaled(knobs.slow_start_s)
        await asyncio.sleep(delay_s)
        if self._stopping:
            return self._ended(128 + self._stop_signal)  # stopped before the program began
        if world.strikes("start_fails", self.id):
            return self._not_booted("the VM did not boot")
        try:
            guest = await self._build.runner.boot(self._build.boot)
        except OSError as error:
            return self._not_booted(str(error))
        self.guest = guest
        if self._stopping:
            guest.signal(self._stop_signal)
            timeout_s = self._build.config.kill_timeout_s
            world.later(timeout_s, self._out_of_time, guest, timeout_s)
        else:
            self._become(Step.BOOTED)
        world.emit("machine.started", self.id)
        if world.strikes("kill_machine", self.id):
            world.later(world.draw(knobs.kill_machine_s), guest.kill)
        if world.strikes("out_of_memory", self.id):
            world.later(world.draw(knobs.kill_machine_s), self._run_out_of_memory, guest)
        return self._ended(await asyncio.shield(guest.exited))

    def _run_out_of_memory(self, guest: Guest) -> None:
        if guest is self.guest:
            self._out_of_memory = True
            guest.kill()

    @property
    def _stopping(self) -> bool:
        return self.state is State.STOPPING

    def _not_booted(self, reason: str) -> bool:
        """Note that a start came to nothing; it is not tried again by itself (the restart policy knows exits only)."""
        requested = self._stopping
        self._become(Step.EXITED if requested else Step.BOOT_FAILED)
        self._world.emit("machine.stopped", self.id, exit_code=None, requested=requested, reason=reason)
        self._finished()
        return False

    def _ended(self, code: int) -> bool:
        """Note the end of a run; whether the restart policy starts the machine again."""
        world, config = self._world, self._build.config
        replacing = self.state is State.REPLACING
        requested = self._stopping or replacing
        guest, self.guest = self.guest, None
        self.exit_code = code
        self.stopped_at = world.now()
        self._settled_at = self.stopped_at + world.draw(world.knobs.exit_settle_s)
        how: dict[str, object] = {"exit_code": code}
        if guest is not None and guest.ended_by:
            how["signal"] = guest.ended_by
        if self._out_of_memory:
            how["oom"] = True
        self._out_of_memory = False
        if replacing:
            world.emit("machine.stopped", self.id, **how, requested=True)
            world.changed.fire()
            return False
        granted = (self._again and not self._destroy) or restart_granted(
            config.restart,
            code,
            requested_stop=requested or (self._build.failure_stops and code != 0),
            restarts=self._restarts,
            now=self.stopped_at,
            max_retries=config.max_retries,
        )
        if granted:
            if not self._again:
                self._restarts.append(self.stopped_at)
            elif requested:
                how["requested"] = True
            self._again = False
            self._become(Step.FAILED)
            world.emit("machine.restarting", self.id, **how, restart=len(self._restarts))
            return True
        self._become(Step.EXITED)
        world.emit("machine.stopped", self.id, **how, requested=requested)
        self._finished()
        return False

    def _finished(self) -> None:
        """Nothing of it runs, and it is not to be started again."""
        # `auto_destroy` works only with the restart policy `no` (flyctl: machine run).
        if self._destroy or (self._build.auto_destroy and self._build.config.restart == "no"):
            self.destroy("api" if self._destroy else "flyd")

    def _become(self, happening: Step, *, at_once: bool = False) -> None:
        """Take a step; the proxy learns of it a moment later, or *at_once* if it was its own doing."""
        world, knobs = self._world, self._world.knobs
        self.state = step(self.state, happening)
        self._became += 1
        self.stages.append(Stage(self._became, self.state, self.version))
        if at_once:
            self._learn(self._became, self.state)
        else:
            delay_s = world.draw(knobs.gossip_s)
            if happening in (Step.EXITED, Step.FAILED) and world.strikes("late_gossip", self.id):
                delay_s += world.scaled(knobs.late_gossip_s)
            world.later(delay_s, self._learn, self._became, self.state)
        world.changed.fire()

    def _learn(self, number: int, state: State) -> None:
        if number <= self._learned:
            return  # overtaken by newer news
        self._learned = number
        self.belief = state
        self._world.changed.fire()
