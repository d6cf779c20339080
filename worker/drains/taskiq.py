"""taskiq on Redis streams (taskiq 0.13.0 and taskiq-redis 1.2.4 were read): its own Receiver, in this process.

A broker alone is worked off as `taskiq worker` would with its defaults; a Receiver has its own settings. What differs:

- what is listened to: a listener that ends when nothing is ready and nothing is running, takes no more than can be
  begun, gives back what it did not begin, and begins with what others left (taskiq's own looks only after a message);
- a consumer says every BEAT_S that it lives, so that its tasks are taken over after half a minute, and not after ten,
  and are not taken over while they run; what was left more than LOST_MOST times is moved to the stream <queue>:dead;
- tasks of a schedule source are sent when they are due, if the scheduler is given: no process of its own is needed for
  them, only for cron and intervals;
- a group is made so that it begins with the first message, not with those after the first worker;
- signals are the drainer's: what is running is finished, or given back when the time for that is up.
"""

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from ..aside import late
from . import Backlog, Options, Pulse, Refused

__all__ = ["Drain"]

probe = late("waker.queues.taskiq")

# Those of `taskiq worker`.
SLOTS = 100
LOST_MOST = 3
BEAT_S = 10.0
BLOCK_MS = 100
SCHEDULE_S = 1.0
RELEASE_S = 1.0
# What is given back counts as left for longer than any broker's idle_timeout.
GIVEN_BACK_IDLE_MS = 2**40
SENT_LOCK_S = 60


class Drain:
    """Runs the tasks of one broker. One event loop and its connections last for all passes."""

    def __init__(self, target: Any, pulse: Pulse, options: Options) -> None:
        import redis
        from taskiq.receiver import Receiver

        errors = late("waker.errors")
        try:
            self._parts = probe.parts_of(target)
        except errors.UsageError as error:
            raise Refused(str(error)) from error
        self.broker_errors: tuple[type[BaseException], ...] = (redis.ConnectionError, redis.TimeoutError)
        self._broker = self._parts.broker
        self._broker.is_worker_process = True
        self._receiver = self._parts.receiver or Receiver(self._broker, max_async_tasks=SLOTS)
        self._receiver.run_startup = False
        self._pulse = pulse
        self._names = options.queues
        self._streams = probe.streams_of(self._broker, options.queues)
        self._ours = f"{probe.OURS}{options.machine or uuid.uuid4().hex}-"
        self._consumer = f"{self._ours}{uuid.uuid4().hex[:12]}"
        self._runner = asyncio.Runner()
        self._redis: Any = None
        self._started = False
        self._held: dict[str, str] = {}  # message → its stream: given to the receiver, and not yet done
        self._taken: dict[str, str] = {}  # given to us, and not yet to the receiver
        self._sent_at = 0.0
        self._capacity = _value(self._receiver.sem_prefetch)
        pulse.slots = _value(self._receiver.sem) if self._receiver.sem is not None else SLOTS

    def backlog(self) -> Backlog:
        reading: Backlog = self._runner.run(self._read())
        return reading

    def work(self, stop: threading.Event) -> int:
        try:
            self._runner.run(self._work(stop))
        except BaseExceptionGroup as group:
            # The receiver's task group wraps what the listener raises.
            lost: BaseException | None = group.subgroup(self.broker_errors)
            while isinstance(lost, BaseExceptionGroup):
                lost = lost.exceptions[0]
            raise lost or group from group
        finally:
            self._pulse.running = 0
        return 0

    def release(self) -> None:
        if not self._held:
            return
        given_back = asyncio.run_coroutine_threadsafe(self._give_back(self._held), self._runner.get_loop())
        try:
            given_back.result(RELEASE_S)
        except Exception:
            given_back.cancel()  # a task that holds the loop; it comes back as after a kill

    async def _read(self) -> Backlog:
        backlog: Backlog = await probe.read(self._client(), self._parts, self._names, self._ours)
        return backlog

    def _client(self) -> Any:
        if self._redis is None:
            from redis.asyncio import Redis

            self._redis = Redis(connection_pool=self._broker.connection_pool)
        return self._redis

    async def _work(self, stop: threading.Event) -> None:
        redis, finish = self._client(), asyncio.Event()
        for stream in self._streams:
            with contextlib.suppress(_response_error()):  # it is there already
                await redis.xgroup_create(stream, self._broker.consumer_group_name, id="0", mkstream=True)
        if not self._started:
            self._listen_in()
            await self._broker.startup()
            for source in self._parts.scheduler.sources if self._parts.scheduler is not None else ():
                await source.startup()
            self._started = True
        self._broker.listen = lambda: self._listen(stop)
        watching = [asyncio.ensure_future(self._beat()), asyncio.ensure_future(_pass_on(stop, finish))]
        try:
            await self._receiver.listen(finish)
        finally:
            for task in watching:
                task.cancel()

    def _listen_in(self) -> None:
        """Every message that the receiver is given goes through its callback."""
        from taskiq import TaskiqMiddleware

        callback, pulse, held = self._receiver.callback, self._pulse, self._held

        async def called(message: Any, raise_err: bool = False) -> None:
            try:
                await callback(message=message, raise_err=raise_err)
            finally:
                held.pop(message.ack.message, None)
                pulse.running = len(held)
                pulse.done += 1

        class Counting(TaskiqMiddleware):  # type: ignore[misc]
            def post_execute(self, message: Any, result: Any) -> None:
                pulse.failed += result.is_err

        self._receiver.callback = called
        self._broker.add_middlewares(Counting())

    async def _listen(self, stop: threading.Event) -> AsyncGenerator[Any, None]:
        """What the receiver listens to; ends when nothing is ready and nothing is running, or *stop* is set."""
        from taskiq import AckableMessage

        try:
            messages = await self._take_over()
            while not stop.is_set():
                for stream, message, fields in messages:
                    self._taken.pop(message, None)
                    self._held[message] = stream
                    self._pulse.running = len(self._held)
                    yield AckableMessage(
                        data=fields[b"data"], ack=Acknowledge(self._client(), self._broker, stream, message)
                    )
                    if stop.is_set():
                        return
                await self._send_due()
                idle = not self._held
                reading = asyncio.ensure_future(self._next())
                try:
                    # A read that is cut off may have been given messages all the same.
                    messages = await asyncio.shield(reading)
                except asyncio.CancelledError:
                    await reading
                    raise
                if not messages and idle:
                    messages = await self._take_over()
                    if not messages and not (await self._read()).ready:
                        return
        finally:
            await self._give_back(self._taken)

    async def _next(self) -> list[tuple[str, str, Any]]:
        """New messages, as many as can be begun."""
        room = max(1, self._capacity - len(self._held))
        answer = await self._client().xreadgroup(
            self._broker.consumer_group_name,
            self._consumer,
            dict.fromkeys(self._streams, ">"),
            count=room,
            block=BLOCK_MS,
        )
        found = [
            (stream.decode(), message.decode(), fields) for stream, batch in answer or () for message, fields in batch
        ]
        self._taken.update({message: stream for stream, message, _ in found})
        return found

    async def _take_over(self) -> list[tuple[str, str, Any]]:
        """What others left, and this machine before this run; what was left too often is put aside."""
        redis, group, found = self._client(), self._broker.consumer_group_name, []
        for stream in self._streams:
            pending, _ = await probe.group_of(redis, self._broker, stream)
            for one in probe.abandoned(pending, self._broker, self._ours):
                if one.id in self._held or one.id in self._taken:
                    continue
                # Whoever is first resets the time that the others ask for.
                claimed = await redis.xclaim(stream, group, self._consumer, int(one.idle_s * 1000), [one.id])
                for message, fields in claimed:
                    if one.deliveries > LOST_MOST and one.consumer != probe.RELEASED:
                        await redis.xadd(f"{stream}:dead", fields)
                        await redis.xack(stream, group, message)
                        self._pulse.done += 1
                        self._pulse.failed += 1
                    else:
                        self._taken[message.decode()] = stream
                        found.append((stream, message.decode(), fields))
        return found

    async def _give_back(self, messages: dict[str, str]) -> None:
        """To whoever looks next; without another delivery in its count."""
        for message, stream in list(messages.items()):
            messages.pop(message, None)
            await self._client().xclaim(stream, self._broker.consumer_group_name, probe.RELEASED, 0, [message],
                                        idle=GIVEN_BACK_IDLE_MS, justid=True)  # fmt: skip

    async def _beat(self) -> None:
        """Say that what is running is held."""
        while True:
            await asyncio.sleep(BEAT_S)
            for stream in self._streams:
                held = [message for message, at in self._held.items() if at == stream]
                if held:
                    with contextlib.suppress(*self.broker_errors):
                        await self._client().xclaim(stream, self._broker.consumer_group_name, self._consumer, 0, held,
                                                    justid=True)  # fmt: skip

    async def _send_due(self) -> None:
        """Send the scheduled tasks whose time has come, as taskiq's scheduler does; one drainer does it for each."""
        scheduler, now = self._parts.scheduler, time.time()
        if scheduler is None or time.monotonic() - self._sent_at < SCHEDULE_S:
            return
        self._sent_at = time.monotonic()
        for source in scheduler.sources:
            for task in await probe.scheduled(source, self._client()):
                lock = f"wake-on-request:sends:{task.schedule_id}"
                if task.time.timestamp() <= now and await self._client().set(lock, 1, nx=True, ex=SENT_LOCK_S):
                    await scheduler.on_ready(source, task)


class Acknowledge:
    """What the receiver calls when a message is done with."""

    def __init__(self, redis: Any, broker: Any, stream: str, message: str) -> None:
        self._redis = redis
        self._group = broker.consumer_group_name
        self._stream = stream
        self.message = message

    async def __call__(self) -> None:
        await self._redis.xack(self._stream, self._group, self.message)


async def _pass_on(stop: threading.Event, finish: asyncio.Event) -> None:
    while not stop.is_set():  # noqa: ASYNC110 - another thread sets it
        await asyncio.sleep(BLOCK_MS / 1000)
    finish.set()


def _value(semaphore: Any) -> int:
    return int(semaphore._value)  # it is not held by anybody yet, and has no other way to tell


def _response_error() -> type[Exception]:
    from redis.exceptions import ResponseError

    error: type[Exception] = ResponseError
    return error
