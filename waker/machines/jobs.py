"""One-off jobs: a command on a machine of its own, from its creation to its exit code.

A job has run (a JobResult), has not run (any other MachinesError), or is unknown (JobUnknown). Its machine is made
once, under a name that nobody else has; it is deleted when the job succeeds, and kept for a look when it fails. What a
caller that died leaves behind has a mark, and reap.py deletes it.
"""

import asyncio
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

from ..client import _run
from ..errors import UsageError
from . import config as settings
from . import shapes
from .client import CREATE_TIMEOUT_S, AsyncMachines, Machines
from .errors import JobNotRun, JobUnknown, MachinesError, NotFound, OutcomeUnknown, RequestError, TokenRefused
from .local import run_here
from .records import Event, Exit, Machine

__all__ = [
    "JOB",
    "OWNER",
    "UNTIL",
    "AsyncJob",
    "Job",
    "JobOptions",
    "JobResult",
    "Progress",
    "image_of",
    "run",
    "run_async",
    "submit",
    "submit_async",
]

# The mark on a job's machine: its name, who made it, and the unix time after which it should have been stopped.
JOB = "wake_job"
OWNER = "wake_owner"
UNTIL = "wake_until"

ENDED = ("stopped", "destroyed", "failed")
NEVER_RAN = ("failed", "launch_failed")
KILL_TIMEOUT_S = 5.0
# From its creation to its start: the image has to come to the host.
BOOT_S = 300.0
# How long the state may be there before the exit event that belongs to it.
EXIT_EVENT_S = 10.0
# How long the platform may be silent about a machine that we know of, before the job is called unknown.
PATIENCE_S = 300.0
# Somebody's lease, or the window after an exit, may stand in the way for a while.
DELETE_S = 120.0
# After a cancellation: for the create's answer, and for the deletion.
ABANDON_S = 15.0
UNTIL_MARGIN_S = 60.0

log = logging.getLogger("waker.jobs")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job is. *machine* is empty before it is made; *elapsed_s* is counted from the call."""

    machine: str
    state: str
    elapsed_s: float


class JobOptions(TypedDict, total=False):
    """What run and submit take besides the command.

    *app*: whose machine it becomes, and whose secrets it sees (FLY_APP_NAME). *image*: the one that the app itself
    runs, unless given. *guest*: a name like shared-cpu-2x, or the API's words. *files*: path in the machine → content.
    *mounts*: path → volume id. *timeout_s*: for its run, from start to end; then it is stopped. *keep*: do not delete
    it on success. *local*: run it here (WAKER_LOCAL). *on_progress* is called with each change. *machines*: the client
    to use.
    """

    app: str | None
    image: str | None
    region: str | None
    guest: Mapping[str, Any] | str | None
    env: Mapping[str, str] | None
    mounts: Mapping[str, str] | None
    files: Mapping[str, str | bytes] | None
    timeout_s: float | None
    keep: bool
    local: bool | None
    on_progress: Callable[[Progress], None] | None
    machines: AsyncMachines | Machines | None


@dataclass(frozen=True, slots=True)
class JobResult:
    """A job that has run. *exit_code* None: its end was seen, and the platform did not tell the code.

    Times are unix times, None where the platform did not tell. *kept*: the machine is still there.
    """

    name: str
    app: str
    machine: str
    region: str
    exit_code: int | None
    signal: int | None
    oom_killed: bool
    timed_out: bool
    kept: bool
    created_at: float | None
    started_at: float | None
    ended_at: float | None
    elapsed_s: float
    events: tuple[Event, ...] = field(repr=False, default=())
    local: bool = False

    @property
    def ok(self) -> bool:
        """Whether it ended with 0, by itself."""
        return self.exit_code == 0 and not self.timed_out and not self.oom_killed

    @property
    def output(self) -> str:
        """Where to read what it printed; the API has no logs."""
        return "printed here" if self.local else f"fly logs --app {self.app} --machine {self.machine}"

    @property
    def next_steps(self) -> tuple[str, ...]:
        """How to look at a machine that was kept, and how to delete it."""
        if not self.kept:
            return ()
        where = f"{self.machine} --app {self.app}"
        return (self.output, f"fly machine status {where}", f"fly machine destroy {where} --force")

    def __str__(self) -> str:
        how = f"exit code {'unknown' if self.exit_code is None else self.exit_code}"
        how += f", signal {self.signal}" if self.signal else ""
        how += ", out of memory" if self.oom_killed else ""
        how += ", stopped after its time" if self.timed_out else ""
        return f"job {self.name} on machine {self.machine}: {how}"

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "events"}
        events = [{"type": e.type, "status": e.status, "source": e.source, "at": e.at} for e in self.events]
        return {**plain, "ok": self.ok, "output": self.output, "next_steps": list(self.next_steps), "events": events}


class _Handle:
    """What is to be seen of a job under way."""

    def __init__(self, run: "_Run") -> None:
        self._run = run

    @property
    def name(self) -> str:
        """Its unique name, which is its machine's too."""
        return self._run.name

    @property
    def machine(self) -> str:
        """Its machine's id; empty until that is made."""
        return self._run.machine_id

    @property
    def state(self) -> str:
        """Its machine's state, as it was last seen; waiting before there is one."""
        return self._run.state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, machine={self.machine!r}, state={self.state!r})"


class Job(_Handle):
    """A job under way, for code that is not async. The process should outlive it, for it deletes the machine."""

    def __init__(self, run: "_Run", future: "Future[JobResult]") -> None:
        super().__init__(run)
        self._future = future

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self._future.done()

    def wait(self, timeout_s: float | None = None) -> JobResult:
        """Its result, once it is over; TimeoutError if that takes longer. Raises what run raises."""
        try:
            return self._future.result(timeout_s)
        except NotYet:
            if self._future.done():
                raise
            raise TimeoutError(f"job {self.name} is {self.state} after {timeout_s} s") from None

    def cancel(self) -> None:
        """Give it up: its machine is deleted, whatever it does."""
        self._future.cancel()


class AsyncJob(_Handle):
    """A job under way, for async code: `await job` is its result."""

    def __init__(self, run: "_Run", task: "asyncio.Task[JobResult]") -> None:
        super().__init__(run)
        self._task = task

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self._task.done()

    async def wait(self) -> JobResult:
        """Its result. Who waits may be cancelled without ending the job."""
        return await asyncio.shield(self._task)

    def __await__(self) -> Generator[Any, None, JobResult]:
        return self.wait().__await__()

    def cancel(self) -> None:
        """Give it up: its machine is deleted, whatever it does."""
        self._task.cancel()


def run(command: Sequence[str], **options: Unpack[JobOptions]) -> JobResult:
    """Run *command* on a machine of its own and return how it ended; see JobOptions.

    The machine is deleted if the command ended with 0, and kept otherwise. Raises JobUnknown if it may have run; after
    any other MachinesError, and after UsageError, it has not.
    """
    job = _Run(command, options)
    return _run(job.go)


async def run_async(command: Sequence[str], **options: Unpack[JobOptions]) -> JobResult:
    """As run, from async code. A caller that is cancelled takes the machine with it."""
    return await _Run(command, options).go()


def submit(command: Sequence[str], **options: Unpack[JobOptions]) -> Job:
    """Begin a job and return at once; its steps are made by a thread of this process. Raises UsageError alone."""
    job = _Run(command, options)
    return Job(job, asyncio.run_coroutine_threadsafe(job.go(), _loop()))


async def submit_async(command: Sequence[str], **options: Unpack[JobOptions]) -> AsyncJob:
    """Begin a job and return at once; its steps are made by this event loop. Raises UsageError alone."""
    job = _Run(command, options)
    task = asyncio.create_task(job.go())
    # An error that nobody asks for is told in the log, not at the task's end as an accident.
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    return AsyncJob(job, task)


class _Run:
    """One job, from its plan to its result."""

    def __init__(self, command: Sequence[str], options: JobOptions) -> None:
        self.name = f"job-{secrets.token_hex(6)}"
        self.machine_id = ""
        self.state = "waiting"
        self._region = options.get("region")
        self._timeout_s = options.get("timeout_s")
        if self._timeout_s is not None and not 0 < self._timeout_s < float("inf"):
            raise UsageError(f"timeout_s={self._timeout_s!r}: expected seconds above 0, like 600")
        self._keep = options.get("keep", False)
        self._tell = options.get("on_progress")
        self._command = shapes.command(command)
        self._env = shapes.environment(options.get("env"))
        files, mounts = shapes.files(options.get("files")), shapes.mounts(options.get("mounts"))
        guest = shapes.guest(options.get("guest"))
        self._image = options.get("image")
        self._local = settings.runs_locally(options.get("local"))
        self._began = 0.0
        self._api: AsyncMachines | None = None
        self._owns_api = False
        if self._local:
            if files:
                raise UsageError(f"files ({files[0]['guest_path']}): a job that runs here cannot have files put at /")
            return
        given, app = options.get("machines"), options.get("app")
        if given is not None and app is not None and app != given.app:
            raise UsageError(f"app={app!r}: the client given as machines= is for app {given.app!r}")
        if isinstance(given, AsyncMachines):
            self._api = given
        else:
            # Read and checked here, so that wrong settings are an error of the call, before anything is made.
            machines = Machines(app) if given is None else given
            self._api, self._owns_api = machines.asynchronous(), True
        self._config: dict[str, Any] = {
            "image": "",
            "init": {"exec": self._command},
            "restart": {"policy": "no"},  # a job that fails has run once
            "stop_config": {"signal": "SIGTERM", "timeout": f"{KILL_TIMEOUT_S:.0f}s"},
            "dns": {"skip_registration": True},
            **({"env": self._env} if self._env else {}),
            **({"guest": guest} if guest else {}),
            **({"files": files} if files else {}),
            **({"mounts": mounts} if mounts else {}),
        }

    async def go(self) -> JobResult:
        """Make the steps, one after the other."""
        self._began = _now()
        try:
            if self._local:
                return await self._run_here()
            assert self._api is not None  # noqa: S101 - made in __init__
            try:
                return await self._run_there(self._api)
            finally:
                if self._owns_api:
                    await self._api.aclose()
        except MachinesError as error:
            self._see("unknown" if isinstance(error, JobUnknown) else "not run")
            log.warning("run.failed name=%s machine=%s error=%s", self.name, self.machine_id or "-", error)
            raise

    # Here

    async def _run_here(self) -> JobResult:
        self.machine_id = "local"
        env = {**settings.environment(), **self._env}
        here = await run_here(self._command, env, self._timeout_s, lambda: self._see("started"))
        self._see("stopped")
        return JobResult(
            name=self.name,
            app="",
            machine="local",
            region="local",
            exit_code=here.exit.exit_code,
            signal=here.exit.signal,
            oom_killed=False,
            timed_out=here.timed_out,
            kept=False,
            created_at=here.started_at,
            started_at=here.started_at,
            ended_at=here.exit.at,
            elapsed_s=_now() - self._began,
            local=True,
        )

    # There

    async def _run_there(self, api: AsyncMachines) -> JobResult:
        self._config["image"] = self._image or settings.own_image(api.app) or await image_of(api)
        self._config["metadata"] = shapes.metadata({JOB: self.name, OWNER: settings.owner(), UNTIL: self._until()})
        self._see("creating")
        creating = asyncio.ensure_future(api.create_once(self._config, name=self.name, region=self._region))
        try:
            # Shielded: a create that is given up in the middle may make a machine that nobody knows of.
            try:
                made = await asyncio.shield(creating)
            except OutcomeUnknown as error:
                raise JobUnknown(f"job {self.name} is unknown: {error}") from error
            self.machine_id = made.id
            self._see(made.state)
            return await self._follow(api, made)
        except asyncio.CancelledError:
            await self._abandon(api, creating)
            raise

    def _until(self) -> str:
        if self._timeout_s is None:
            return ""
        return f"{time.time() + CREATE_TIMEOUT_S + BOOT_S + self._timeout_s + UNTIL_MARGIN_S:.0f}"

    async def _follow(self, api: AsyncMachines, made: Machine) -> JobResult:
        """Wait for the end of the run, and read how it ended."""
        boot_deadline, run_deadline = _now() + BOOT_S, float("inf")
        machine, heard_at, polling = made, _now(), False
        while not _has_ended(machine):
            started = machine.started_at is not None or machine.state == "started"
            if started and run_deadline == float("inf") and self._timeout_s is not None:
                run_deadline = _now() + self._timeout_s
            left_s = (run_deadline if started else boot_deadline) - _now()
            if left_s <= 0 and not started:
                await self._give_up_boot(api, machine)
            if left_s <= 0:
                return await self._time_out(api, machine)
            try:
                if polling:
                    await asyncio.sleep(min(2.0, left_s))
                else:
                    goals = ENDED if started else ("started", *ENDED)
                    await api.wait(machine.id, *goals, version=made.version, timeout_s=min(60.0, max(0.5, left_s)))
                machine = await api.get(machine.id)
                heard_at = _now()
                self._see(machine.state)
            except NotFound as error:
                raise self._unknown(machine, f"it is gone, and so is its exit code: {error}") from error
            except TokenRefused as error:
                raise self._unknown(machine, str(error)) from error
            except RequestError:
                # This platform does not know such a wait: look now and then instead.
                polling = True
            except MachinesError as error:
                if _now() - heard_at > PATIENCE_S:
                    raise self._unknown(machine, f"the platform tells nothing any more: {error}") from error
                await asyncio.sleep(min(2.0, max(0.1, left_s)))
        return await self._conclude(api, machine, timed_out=False)

    async def _give_up_boot(self, api: AsyncMachines, machine: Machine) -> None:
        await self._remove(api, machine, f"it did not start within {BOOT_S:.0f} s (state {machine.state})")

    async def _remove(self, api: AsyncMachines, machine: Machine, why: str) -> None:
        """Delete a machine that never ran. Raises JobNotRun, or JobUnknown if it did run after all."""
        left = ""
        try:
            await api.delete(machine.id, force=True)
            machine = await api.get(machine.id)
        except NotFound:
            pass
        except MachinesError as error:
            left = f"; machine {machine.id} of app {api.app} is left: {error}"
        if machine.started_at is not None:
            raise self._unknown(machine, f"it was deleted, because {why}, and started in that moment")
        raise JobNotRun(f"job {self.name} has not run: {why}{left}")

    async def _time_out(self, api: AsyncMachines, machine: Machine) -> JobResult:
        """Stop it, say so, keep it."""
        log.warning("run.timed_out name=%s machine=%s timeout_s=%s", self.name, machine.id, self._timeout_s)
        self._see("stopping")
        try:
            await api.stop(machine.id, timeout_s=PATIENCE_S)
            deadline = _now() + PATIENCE_S
            while not _has_ended(machine) and _now() < deadline:
                await api.wait(machine.id, *ENDED, version=machine.version, timeout_s=min(60.0, deadline - _now()))
                machine = await api.get(machine.id)
        except MachinesError as error:
            raise self._unknown(machine, f"its time was over, and it could not be stopped: {error}") from error
        if not _has_ended(machine):
            raise self._unknown(machine, "its time was over, and it does not stop")
        return await self._conclude(api, machine, timed_out=True)

    async def _conclude(self, api: AsyncMachines, machine: Machine, *, timed_out: bool) -> JobResult:
        deadline = _now() + EXIT_EVENT_S
        try:
            while machine.last_exit is None and _now() < deadline:
                if machine.state in NEVER_RAN and machine.started_at is None:
                    break
                await asyncio.sleep(0.5)
                machine = await api.get(machine.id)
        except MachinesError as error:
            raise self._unknown(machine, f"it has ended, and its exit code could not be read: {error}") from error
        if machine.last_exit is None and machine.started_at is None:
            await self._remove(api, machine, f"its machine never started (state {machine.state})")
        how = machine.last_exit or Exit(None)
        # What ended by itself in the moment in which its time was over has not been stopped.
        timed_out = timed_out and (how.requested_stop or how.exit_code != 0)
        success = how.exit_code == 0 and not how.oom_killed and not timed_out
        kept = machine.state != "destroyed"
        if success and kept and not self._keep:
            try:
                await api.delete(machine.id, force=True, timeout_s=DELETE_S)
                kept = False
            except MachinesError as error:
                log.warning("run.machine_left name=%s machine=%s error=%s", self.name, machine.id, error)
        self._see(machine.state if kept else "deleted")
        launched = [event.at for event in machine.events if event.type == "launch" and event.at is not None]
        return JobResult(
            name=self.name,
            app=api.app,
            machine=machine.id,
            region=machine.region,
            exit_code=how.exit_code,
            signal=how.signal,
            oom_killed=how.oom_killed,
            timed_out=timed_out,
            kept=kept,
            created_at=min(launched, default=None),
            started_at=machine.started_at,
            ended_at=how.at,
            elapsed_s=_now() - self._began,
            events=machine.events,
        )

    async def _abandon(self, api: AsyncMachines, creating: "asyncio.Future[Machine]") -> None:
        """The caller has left: so does the machine, if that can be done in a moment."""
        try:
            async with asyncio.timeout(ABANDON_S):
                machine = await creating
                await api.delete(machine.id, force=True)
                self._see("deleted")
        except TimeoutError:
            log.warning("run.abandoned name=%s machine=%s: `waker jobs reap` deletes it", self.name, self.machine_id)
        except MachinesError as error:
            if self.machine_id or not creating.done() or creating.exception() is None:
                log.warning("run.abandoned name=%s machine=%s error=%s", self.name, self.machine_id, error)

    def _unknown(self, machine: Machine, why: str) -> JobUnknown:
        where = f"fly machine status {machine.id} --app {self._api.app}" if self._api else machine.id
        return JobUnknown(f"job {self.name} on machine {machine.id} is unknown: {why}; look at it with `{where}`")

    def _see(self, state: str) -> None:
        if state == self.state and state != "creating":
            return
        self.state = state
        elapsed_s = _now() - self._began
        log.info("run.%s name=%s machine=%s elapsed_s=%.2f", state.replace(" ", "_"), self.name,
                 self.machine_id or "-", elapsed_s)  # fmt: skip
        if self._tell is not None:
            self._tell(Progress(self.machine_id, state, elapsed_s))


async def image_of(api: AsyncMachines) -> str:
    """The image that the app itself runs: that of its youngest machine that is no job's."""
    own = [machine for machine in await api.list() if machine.image and JOB not in machine.metadata]
    if not own:
        raise UsageError(f"no image: app {api.app} has no machine to take it from; name one (--image, image=)")
    return max(own, key=lambda machine: machine.created_at).image


def _has_ended(machine: Machine) -> bool:
    """Whether its run is over. A machine that was just made is not, and one that is being stopped is not yet."""
    return machine.state in (*ENDED, *NEVER_RAN)


def _now() -> float:
    return asyncio.get_running_loop().time()


# The loop that makes the steps of submitted jobs: one thread of this process, begun with the first one.
_loops: list[tuple[int, asyncio.AbstractEventLoop]] = []  # (process id, loop); guarded by the lock
_loops_lock = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    with _loops_lock:
        if not _loops or _loops[0][0] != os.getpid():
            loop = asyncio.SelectorEventLoop()
            threading.Thread(target=loop.run_forever, name="waker-jobs", daemon=True).start()
            _loops[:] = [(os.getpid(), loop)]
        return _loops[0][1]


def _forget_in_child() -> None:
    global _loops_lock
    _loops_lock = threading.Lock()
    _loops.clear()


os.register_at_fork(after_in_child=_forget_in_child)
