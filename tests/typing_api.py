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
