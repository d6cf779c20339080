"""Dramatiq (2.2.1 was read), on Redis and on RabbitMQ: its own Worker, with its threads, in this process.

A broker is drained by `dramatiq.Worker` with its defaults, a Worker object by one with its settings (threads, queues).
Dramatiq has no mode that ends, so we stop the worker when nothing waits and nothing is held here. What else differs
from the `dramatiq` command:

- delayed messages that are due are moved to their queue, and the others are left where they are (it would hold them in
  memory until they are due);
- on Redis, what dead workers hold is put back before a pass (it does so once in a thousand commands), and what an
  earlier run of this machine held, at once; a message that was lost so LOST_MOST times goes to the dead letters, not
  round for ever;
- a worker whose broker went away is given up when the broker is back, and what it had in hand goes back to the queue
  (a message whose delivery was cut off would never come back while the process lives);
- there is one process, and no forks of middleware.
"""

import threading
import time
import uuid
from typing import Any

from ..aside import late
from . import Backlog, Options, Pulse

__all__ = ["Drain"]

probe = late("waker.queues.dramatiq")

POLL_S = 0.05
PROMOTE_S = 1.0
# On RabbitMQ a message may be in the socket, no longer in the queue and not yet here, at one look.
IDLE_LOOKS = 2
# How long a thread of the worker sleeps when there is nothing to do: the end of a pass waits for it.
IDLE_MS = 50
# A message that was held by so many workers when they died may be what kills them.
LOST_MOST = 5
LOST_OPTION = "wake_on_request_lost"
# Claims a delayed message that nobody else has claimed, as `fetch` in dispatch.lua does.
CLAIM = """
if redis.call("lrem", KEYS[1], 1, ARGV[1]) == 0 then return false end
redis.call("sadd", KEYS[2], ARGV[1])
return redis.call("hget", KEYS[3], ARGV[1])
"""


class Drain:
    """Runs the messages of a broker's queues."""

    def __init__(self, target: Any, pulse: Pulse, options: Options) -> None:
        from dramatiq.errors import BrokerConnectionError

        self._target = target
        self._names = options.queues
        self._pulse = pulse
        self._broker = probe.broker_of(target)
        self._side = (_Redis if probe.is_redis(self._broker) else _Rabbit)(self._broker, self._queues, options.machine)
        self.broker_errors: tuple[type[BaseException], ...] = (BrokerConnectionError, *self._side.errors)
        self._worker: Any = None
        self._booted = self._recovered = False

    def backlog(self) -> Backlog:
        if not self._recovered:
            self._side.recover()
            self._recovered = True
        reading: Backlog = probe.backlog(self._target, self._names)
        return reading

    def work(self, stop: threading.Event) -> int:
        self._boot()
        if self._worker is not None:
            self._side.greet()
            self._finish()
        self._side.prepare()
        self._side.promote()
        self._worker = self._make()
        self._worker.start()
        promoted_at = time.monotonic()
        while not stop.wait(POLL_S) and not self._side.is_idle(self._worker):
            if time.monotonic() - promoted_at > PROMOTE_S:
                self._side.promote()
                promoted_at = time.monotonic()
        self._finish()
        return 0

    def release(self) -> None:
        if self._worker is not None:
            for consumer in list(self._worker.consumers.values()):
                consumer.stop()
            self._side.put_back()

    def _boot(self) -> None:
        """What the `dramatiq` command does once in a process; some middleware starts its threads then."""
        if self._booted:
            return
        self._booted = True
        middleware = self._broker.middleware
        # In front, so that it sees what others skip.
        self._broker.add_middleware(_meter(self._pulse), before=type(middleware[0]) if middleware else None)
        self._broker.emit_after("process_boot")

    def _make(self) -> Any:
        import dramatiq

        given = self._target if self._target is not self._broker else None
        base: Any = dramatiq.Worker if given is None else type(given)

        class Drained(base):  # type: ignore[misc]  # whichever class the user's worker has
            def _add_consumer(self, queue_name: str, *, delay: bool = False) -> None:
                if not delay:
                    super()._add_consumer(queue_name)

        settings = {} if given is None else {"worker_threads": given.worker_threads}
        worker = Drained(self._broker, queues=set(self._queues()), worker_timeout=IDLE_MS, **settings)
        if given is not None:
            worker.queue_prefetch = given.queue_prefetch
        self._pulse.slots = worker.worker_threads
        return worker

    def _queues(self) -> list[str]:
        names: list[str] = probe.queues_of(self._target, self._names)
        return names

    def _finish(self) -> None:
        """Wait for what is running, and put back what is held."""
        self._worker.stop()
        self._side.put_back()
        # `start` adds one for each worker.
        self._broker.middleware[:] = [one for one in self._broker.middleware
                                      if getattr(one, "worker", None) is not self._worker]  # fmt: skip
        self._worker = None
        self._side.rest()


class _Redis:
    def __init__(self, broker: Any, queues: Any, machine: str) -> None:
        import redis

        self.errors: tuple[type[BaseException], ...] = (redis.ConnectionError, redis.TimeoutError)
        self._broker = broker
        self._keys = probe.Keys(broker)
        self._queues = queues
        # Workers of this machine have ids that begin so, those of its earlier runs too.
        self._ours = f"{machine}." if machine else ""

    def greet(self) -> None:
        """Raises one of `errors` while the broker is down."""
        self._broker.client.ping()

    def prepare(self) -> None:
        self.recover()
        # A new id for each pass: what is held under the last one is held by nobody.
        self._broker.broker_id = f"{self._ours}{uuid.uuid4()}"

    def recover(self) -> None:
        """Put back what nobody holds any more: its worker is silent, or was an earlier run of this machine."""
        dead_ms = time.time() * 1000 - self._broker.heartbeat_timeout
        for worker, beat in self._broker.client.zrange(self._keys.heartbeats, 0, -1, withscores=True):
            name = worker.decode()
            if beat <= dead_ms or (self._ours and name.startswith(self._ours)):
                self._take_back(name, lost=True)

    def is_idle(self, _worker: Any) -> bool:
        """Whether nothing waits and nothing is held here: a message is taken, and its holder noted, in one step.
        Says that we live, too: a worker with full hands does not."""
        with self._broker.client.pipeline() as ask:
            ask.zadd(self._keys.heartbeats, {self._broker.broker_id: int(time.time() * 1000)})
            for name in self._queues():
                ask.llen(self._keys.queue(name))
                ask.scard(self._keys.held(self._broker.broker_id, name))
            _, *counts = ask.execute()
        return not any(counts)

    def promote(self) -> None:
        """Move the delayed messages that are due to their queues, as a Worker does with those that it holds."""
        from dramatiq import Message

        broker, keys = self._broker, self._keys
        for name in self._queues():
            later = f"{name}.DQ"
            names = (keys.queue(later), keys.held(broker.broker_id, later), keys.messages(later))
            for one in probe.due_ids(broker, name):
                data = broker.client.eval(CLAIM, len(names), *names, one)
                if data is not None:
                    broker.enqueue(_now(Message.decode(data), name))
                    broker.do_ack(later, one)

    def put_back(self) -> None:
        """Put back what this pass holds."""
        self._take_back(self._broker.broker_id, lost=False)

    def rest(self) -> None:
        """This pass is over."""
        self._broker.client.zrem(self._keys.heartbeats, self._broker.broker_id)

    def _take_back(self, worker: str, *, lost: bool) -> None:
        """Put back what *worker* holds; if it is *lost*, that counts."""
        for name in self._queues():
            for queue in (name, f"{name}.DQ"):
                held = self._keys.held(worker, queue)
                self._broker.client.transaction(self._putting_back(held, queue, lost=lost), held)

    def _putting_back(self, held: str, queue: str, *, lost: bool) -> Any:
        from dramatiq import Message

        keys, canonical = self._keys, queue.removesuffix(".DQ")

        def put_back(transaction: Any) -> None:
            ids = sorted(transaction.smembers(held))
            messages = transaction.hmget(keys.messages(queue), ids) if ids else []
            transaction.multi()
            for one, data in zip(ids, messages, strict=True):
                if data is None:
                    continue
                if lost and queue == canonical:
                    message = Message.decode(data)
                    times = message.options.get(LOST_OPTION, 0) + 1
                    if times > LOST_MOST:
                        dead = keys.queue(f"{canonical}.XQ")
                        transaction.zadd(dead, {one: int(time.time() * 1000)})
                        transaction.hset(f"{dead}.msgs", one, data)
                        transaction.hdel(keys.messages(queue), one)
                        continue
                    transaction.hset(keys.messages(queue), one, message.copy(options={LOST_OPTION: times}).encode())
                transaction.rpush(keys.queue(queue), one)
            transaction.delete(held)

        return put_back


class _Rabbit:
    """RabbitMQ puts back by itself what we hold, when it has answered the end of a channel, or finds it broken."""

    def __init__(self, broker: Any, queues: Any, _machine: str) -> None:
        import pika.exceptions

        self.errors: tuple[type[BaseException], ...] = (pika.exceptions.AMQPError,)
        self._broker = broker
        self._queues = queues
        self._idle = 0

    def greet(self) -> None:
        with probe.connected(self._broker):
            pass

    def recover(self) -> None:
        pass

    def prepare(self) -> None:
        self._idle = 0
        # That of this thread; it may have died while nobody used it, and nobody has looked after it.
        del self._broker.connection

    def is_idle(self, worker: Any) -> bool:
        """Whether nothing waits and nothing is held here, at IDLE_LOOKS looks in a row."""
        held = any(thread.consumer is None or thread.consumer.known_tags for thread in list(worker.consumers.values()))
        if held or worker.work_queue.unfinished_tasks or any(self._waiting(name) for name in self._queues()):
            self._idle = 0
        else:
            self._idle += 1
        return self._idle >= IDLE_LOOKS

    def _waiting(self, name: str) -> int:
        return int(self._broker.channel.queue_declare(queue=name, passive=True).method.message_count)

    def promote(self) -> None:
        with probe.connected(self._broker) as rabbit:
            for name in self._queues():
                now_ms = time.time() * 1000

                def move(message: Any, name: str = name, now_ms: float = now_ms) -> bool:
                    if (message.options.get("eta") or 0) > now_ms:
                        return False
                    self._broker.enqueue(_now(message, name))
                    return True

                if count := rabbit.waiting(f"{name}.DQ"):
                    rabbit.sift(f"{name}.DQ", count, move)

    def put_back(self) -> None:
        pass

    def rest(self) -> None:
        del self._broker.connection


def _now(message: Any, queue: str) -> Any:
    """A delayed message, as one for *queue*."""
    moved = message.copy(queue_name=queue)
    moved.options.pop("eta", None)
    return moved


def _meter(pulse: Pulse) -> Any:
    """A middleware that counts what runs."""
    from dramatiq import Middleware

    lock = threading.Lock()

    def change(running: int, failed: int = 0) -> None:
        with lock:
            pulse.running += running
            pulse.done += running < 0
            pulse.failed += failed

    class Meter(Middleware):  # type: ignore[misc]  # of a library that is not always there
        def before_process_message(self, *_: Any) -> None:
            change(1)

        def after_process_message(self, *_: Any, result: Any = None, exception: Any = None) -> None:
            change(-1, exception is not None)

        def after_skip_message(self, *_: Any) -> None:
            change(-1)

    return Meter()
