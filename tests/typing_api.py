"""The public API in every supported way. Never run: mypy reads it, and what it accepts is what we promise."""

import asyncio
import threading
from typing import assert_type

from waker import (
    AsyncWaker,
    Backlog,
    Look,
    NotWoken,
    QueueError,
    SqliteQueue,
    Unauthorized,
    UsageError,
    WakeError,
    Waker,
    WakeReport,
    Watch,
    WokenMachine,
)
from waker.machines import (
    Address,
    App,
    AsyncMachines,
    Event,
    Exit,
    Job,
    JobNotRun,
    JobResult,
    JobUnknown,
    Lease,
    Machine,
    Machines,
    MachinesError,
    NoAnswer,
    Waited,
    run,
    run_async,
    submit,
    submit_async,
)


def wakes() -> None:
    waker = Waker("http://[fdaa:0:6ba9:0:1::2]", token="t", timeout_s=30)
    Waker()
    report = waker.wake(machines=3, timeout_s=10)
    assert_type(report, WakeReport)
    assert_type(report.machines, tuple[WokenMachine, ...])
    assert_type(report.missing, int)
    assert_type(report.cold, int)
    assert_type(report.ok, bool)
    assert_type(report.machines[0].id, str)
    waker.nudge()
    waker.nudge(machines=2)
    assert_type(waker.flush(1.0), bool)
    waker.close()


def wakes_through_the_machines_api() -> None:
    waker = Waker.via_api("my-worker", strategy="oldest", group="app", region="ams", metadata={"team": "a"})
    assert_type(waker, Waker)
    assert_type(waker.wake(machines=2).unconfirmed, tuple[str, ...])
    Waker.via_api(strategy=["e2865641be9d86"])
    Waker("my-worker.flycast", fallback=waker)
    assert_type(AsyncWaker.via_api(), AsyncWaker)


def machines_api() -> None:
    machines = Machines("my-app", token="t", base_url="https://api.machines.dev", timeout_s=10)
    machine = machines.create({"image": "alpine:3"}, name="a", region="ams", skip_launch=True)
    assert_type(machine, Machine)
    assert_type(machines.create_once({"image": "alpine:3"}, name="a"), Machine)
    assert_type(machines.get(machine.id).exit, Exit | None)
    assert_type(machines.list(states=["stopped"], region="ams", metadata={"a": "b"}), list[Machine])
    assert_type(machines.start(machine.id), str)
    machines.stop(machine.id, signal="SIGTERM", kill_after_s=5)
    assert_type(machines.wait(machine.id, "stopped", "destroyed", version=machine.version), Waited | None)
    assert_type(machines.events(machine.id, limit=50), list[Event])
    assert_type(machines.execute(machine.id, ["ls"]).stdout, str)
    lease = machines.acquire_lease(machine.id, 30, description="mine")
    assert_type(lease, Lease)
    machines.update(machine.id, {"image": "alpine:3"}, version=machine.version, nonce=lease.nonce)
    machines.release_lease(machine.id, lease.nonce)
    machines.set_metadata(machine.id, "a", "b")
    assert_type(machines.metadata(machine.id), dict[str, str])
    machines.delete_metadata(machine.id, "a")
    machines.delete(machine.id, force=True)
    assert_type(machines.addresses(), list[Address])
    assert_type(machines.get_app(), App)
    try:
        machines.get("e1")
    except NoAnswer as error:
        assert_type(error.request_id, str | None)
    except MachinesError as error:
        assert_type(error.status, int | None)


def jobs() -> None:
    result = run(["curl", "https://example.com"], app="my-app", image="a:1", region="ams", guest="shared-cpu-2x",
                 env={"A": "b"}, mounts={"/data": "vol_1"}, files={"/etc/a": b""}, timeout_s=60)  # fmt: skip
    assert_type(result, JobResult)
    assert_type(result.exit_code, int | None)
    assert_type(result.ok, bool)
    run(["true"], local=True, keep=False)
    job = submit(["true"], machines=Machines())
    assert_type(job, Job)
    try:
        assert_type(job.wait(10), JobResult)
    except (JobUnknown, JobNotRun, TimeoutError):
        job.cancel()


async def jobs_async() -> None:
    async with AsyncMachines() as machines:
        assert_type(await run_async(["true"], machines=machines), JobResult)
        job = await submit_async(["true"], machines=machines)
        assert_type(await job, JobResult)
        assert_type(await machines.list(), list[Machine])


async def wakes_async() -> None:
    waker = AsyncWaker("my-worker.flycast")
    assert_type(await waker.wake(machines=3), WakeReport)
    waker.nudge()


def errors() -> None:
    try:
        Waker().wake()
    except Unauthorized as error:
        assert_type(error.exit_code, int)
    except (NotWoken, UsageError, QueueError, WakeError):
        pass


queue = SqliteQueue("jobs.db", durability="process", concurrency=2)


@queue.task
def plain(path: str, size: int = 3) -> bool:
    return bool(path) and size > 0


@queue.task(retries=3, timeout_s=60, name="slow", backoff_s=1.5)
async def slow(path: str) -> None:
    await asyncio.sleep(0)


def enqueues() -> None:
    assert_type(plain("a"), bool)
    assert_type(plain.enqueue("a", size=1), int)
    assert_type(plain.enqueue_in(90, "a"), int)
    slow.enqueue("a")
    plain.enqueue(3)  # type: ignore[arg-type]  # a wrong argument is found before it is a dead job
    assert_type(queue.backlog(), Backlog)
    assert_type(queue.backlog().due_at, float | None)
    queue.after_enqueue(Waker().nudge)
    assert_type(queue.retry(every=True), int)


def watches() -> None:
    watch = Watch(queue.backlog, Waker(), interval_s=30)
    assert_type(watch.once(), Look)
    watch.run(threading.Event())
