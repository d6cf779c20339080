"""One machine's life: what may be asked of it, the VM it runs in, and when the proxy learns of it."""

import asyncio
import signal
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from .guest import Boot, Guest, Runner
from .states import ALIVE, MAX_RESTARTS, STARTABLE, State, Step, restart_granted, step
from .world import World

__all__ = ["Machine", "RefusedError", "StopConfig"]


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


class Machine:
    """A machine of the app. All methods belong to the platform's event loop."""

    def __init__(
        self,
        world: World,
        runner: Runner,
        boot: Boot,
        *,
        region: str,
        distance: int,
        config: StopConfig,
        failure_stops: bool,
    ) -> None:
        self._world = world
        self._runner = runner
        self._boot = boot
        self._config = config
        self._failure_stops = failure_stops
        self._tokens = float(world.knobs.start_burst)
        self._tokens_at = world.now()
        self._settled_at = 0.0
        self._restarts: deque[float] = deque(maxlen=1000)
        self._stop_signal = 0
        self._learned = self._became = 0  # numbers of the steps; a view older than the newest learned is dropped
        self.id = boot.machine
        self.region = region
        self.distance = distance
        self.port = boot.port
        self.state = State.STOPPED
        self.belief = State.STOPPED  # what the proxy thinks; a moment behind
        self.in_flight = 0  # requests that the proxy has given to it and that are not over
        self.stopped_at: float | None = None
        self.exit_code: int | None = None
        self.guest: Guest | None = None

    @property
    def env(self) -> Mapping[str, str]:
        """The environment of its processes."""
        return self._boot.env

    @property
    def recently_stopped(self) -> bool:
        """Whether its last run ended within the window of PM11."""
        return self.stopped_at is not None and (
            self._world.now() - self.stopped_at < self._world.scaled(self._world.knobs.recently_stopped_s)
        )

    def start(self, source: str) -> None:
        """Ask for a start. Nothing happens if it is up already; raise RefusedError if the platform does not want to.

        Refuse or register, in one step: nothing is awaited here.
        """
        if self.state in (State.STARTED, State.STARTING):
            return
        try:
            self._check_start()
        except RefusedError as refused:
            self._world.emit(
                "start.refused", self.id, code=refused.code, status=refused.status, reason=refused.reason, source=source
            )
            raise
        self._become(Step.START, at_once=source == "proxy")
        self._world.emit("machine.starting", self.id, source=source)
        self._world.spawn(self._live())

    def _check_start(self) -> None:
        world = self._world
        if self.state is State.DESTROYED:
            raise RefusedError("PR02", 404, "machine not found")
        if not self._take_token() or world.strikes("start_rate_limited", self.id):
            raise RefusedError("PM01", 429, "rate limit exceeded")
        if world.strikes("start_lease_held", self.id):
            raise RefusedError("PM01", 409, f"machine ID {self.id} lease currently held by emulator")
        if self.state is State.RESTARTING:
            raise RefusedError("PM01", 412, "machine still attempting to start")
        if self.state not in STARTABLE:
            raise RefusedError("PM08", 412, f"unable to start machine from current state: '{self.state}'")
        # The state reads stopped, and the VM is still being taken down.
        after_exit = self.stopped_at is not None
        if world.now() < self._settled_at or (after_exit and world.strikes("start_refused_after_exit", self.id)):
            raise RefusedError("PM07", 412, "failed_precondition: machine still active, refusing to start")

    def _take_token(self) -> bool:
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
        config = self._config
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

    def kill(self) -> None:
        """End the VM at once, as a lost host does: exit code 137, and the restart policy has its say."""
        if self.guest is not None:
            self.guest.kill()

    def destroy(self) -> None:
        """Remove it for good; one that is not stopped is killed first."""
        self._destroy = True
        if self.state in ALIVE:
            self.stop(source="destroy")
            self.kill()
        if self.state in STARTABLE:
            self._become(Step.DESTROY)
            self._world.emit("machine.destroyed", self.id)

    _destroy = False

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
            guest = await self._runner.boot(self._boot)
        except OSError as error:
            return self._not_booted(str(error))
        self.guest = guest
        if self._stopping:
            guest.signal(self._stop_signal)
            world.later(self._config.kill_timeout_s, self._out_of_time, guest, self._config.kill_timeout_s)
        else:
            self._become(Step.BOOTED)
        world.emit("machine.started", self.id)
        if world.strikes("kill_machine", self.id):
            world.later(world.draw(knobs.kill_machine_s), guest.kill)
        return self._ended(await asyncio.shield(guest.exited))

    @property
    def _stopping(self) -> bool:
        return self.state is State.STOPPING

    def _not_booted(self, reason: str) -> bool:
        """Note that a start came to nothing; it is not tried again by itself (the restart policy knows exits only)."""
        requested = self._stopping
        self._become(Step.EXITED if requested else Step.BOOT_FAILED)
        self._world.emit("machine.stopped", self.id, exit_code=None, requested=requested, reason=reason)
        return False

    def _ended(self, code: int) -> bool:
        """Note the end of a run; whether the restart policy starts the machine again."""
        world = self._world
        requested = self._stopping
        self.guest = None
        self.exit_code = code
        self.stopped_at = world.now()
        self._settled_at = self.stopped_at + world.draw(world.knobs.exit_settle_s)
        granted = restart_granted(
            self._config.restart,
            code,
            requested_stop=requested or (self._failure_stops and code != 0),
            restarts=self._restarts,
            now=self.stopped_at,
            max_retries=self._config.max_retries,
        )
        if granted:
            self._restarts.append(self.stopped_at)
            self._become(Step.FAILED)
            world.emit("machine.restarting", self.id, exit_code=code, restart=len(self._restarts))
            return True
        self._become(Step.EXITED)
        world.emit("machine.stopped", self.id, exit_code=code, requested=requested)
        if self._destroy:
            self.destroy()
        return False

    def _become(self, happening: Step, *, at_once: bool = False) -> None:
        """Take a step; the proxy learns of it a moment later, or *at_once* if it was its own doing."""
        world, knobs = self._world, self._world.knobs
        self.state = step(self.state, happening)
        self._became += 1
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
