"""Celery (5.7.0 and kombu 5.7.0 were read): its own worker, with a boot step that stops it when nothing is ready.

The pool, its size and everything else are the user's settings. What differs from `celery worker`:

- it stops when two looks in a row found none waiting, and none here but those with an ETA ahead, which it puts back;
- signals are the drainer's, and a broker that is down ends the pass, so that the drainer decides how long to try;
- tasks are acknowledged when they have run (`task_acks_late`), unless the user set that otherwise;
- on Redis a message is taken and noted as held, and by which machine, in one step, and that is renewed while it lives.
  What a dead machine held is put back after HELD_S instead of the visibility timeout, which is an hour, and what this
  machine itself held before, at once. What plain Celery workers hold is none of our business.
"""

import queue
import threading
import time
import uuid
from typing import Any

from ..aside import late
from . import Backlog, Options, Pulse, Refused

__all__ = ["Drain"]

probe = late("waker.queues.celery")

LOOK_S = 0.1
# A message may be in the socket, no longer in the list and not yet reserved, when one look is taken.
LOOKS = 2
# A task that is due so soon is waited for: the worker's timer is about to run it.
SOON_S = 0.2
HELD_S = 30.0
RENEW_S = 10.0
SOCKET_TIMEOUT_S = 30.0
# KEYS: the lists of messages, the index of what is held, what is held, and who holds it. ARGV: now, and who until when.
# As kombu's QoS.append writes it; kombu does so after BRPOP, and a worker that is killed in between loses the message.
TAKE = """
for i = 1, #KEYS - 3 do
  local message = redis.call('RPOP', KEYS[i])
  if message then
    local known, payload = pcall(cjson.decode, message)
    if known then
      local tag, info = payload.properties.delivery_tag, payload.properties.delivery_info
      local whole = '[' .. message .. ',' .. cjson.encode(info.exchange) .. ',' .. cjson.encode(info.routing_key) .. ']'
      redis.call('ZADD', KEYS[#KEYS - 2], ARGV[1], tag)
      redis.call('HSET', KEYS[#KEYS - 1], tag, whole)
      redis.call('HSET', KEYS[#KEYS], tag, ARGV[2])
    end
    return {KEYS[i], message}
  end
end
return false
"""


class Drain:
    """Runs the tasks of one Celery app."""

    def __init__(self, target: Any, pulse: Pulse, options: Options) -> None:
        import kombu.exceptions

        self._app = app = target
        self._queues = options.queues
        self._pulse = pulse
        transport = probe.transport_of(app)
        if transport not in ("redis", "amqp"):
            broker = app.connection_for_read().as_uri()
            raise Refused(f"its broker is {broker}, and only Redis, Valkey and RabbitMQ are known. "
                          "A command that drains it can be run with: worker up -- COMMAND")  # fmt: skip
        connection = app.connection_for_read()
        self.broker_errors: tuple[type[BaseException], ...] = (
            *connection.connection_errors,
            *connection.channel_errors,
            kombu.exceptions.OperationalError,
        )
        self._redis = transport == "redis"
        self._owner = options.machine or uuid.uuid4().hex
        self._recovered = False
        self._note: Any = None  # on RabbitMQ, what our last pass put back; None before it: then everything counts
        self._stop = threading.Event()
        self._worker: Any = None
        self._settle()
        app.steps["consumer"].add(_drain_step(self))

    def backlog(self) -> Backlog:
        if self._redis and not self._recovered:
            # What this machine held in an earlier boot is ready, and no reading but ours can know.
            self._recover()
        # The first reading of a run believes no note: a wake means that somebody looks.
        reading: Backlog = probe.backlog(self._app, self._queues, note=self._note or probe.Note())
        return reading

    def work(self, stop: threading.Event) -> int:
        from celery.apps.worker import Worker
        from celery.worker import state

        class Drained(Worker):  # type: ignore[misc]  # celery has no types
            def install_platform_tweaks(self, worker: Any) -> None:
                pass

        self._stop = stop
        if self._redis:
            self._recover()
        self._note = probe.Note()
        state.should_stop = state.should_terminate = None
        self._worker = worker = Drained(
            app=self._app, hostname=f"celery@{self._owner}", queues=self._queues or None, quiet=True,
            redirect_stdouts=False, without_gossip=True, without_mingle=True, without_heartbeat=True,
        )  # fmt: skip
        try:
            worker.start()
        finally:
            self._worker = None
            self._pulse.running = 0
            self._pulse.done = state.all_total_count[0]
        if not self._redis:
            probe.leave_note(self._app, self._queues, self._note)
        if worker.exitcode:
            # It has said why. If that was the broker, this raises what the drainer knows how to wait for.
            probe.backlog(self._app, self._queues)
        return 0

    def release(self) -> None:
        worker = self._worker
        if worker is None or not self._redis:
            return  # RabbitMQ puts back what we hold when the connection ends with us
        qos = worker.consumer.task_consumer.channel.qos
        for tag in list(qos._delivered):
            qos.restore_by_tag(tag, leftmost=True)

    def look(self, consumer: Any, queues: list[str]) -> bool:
        """Whether nothing is left to do but what is due later; from the worker's timer."""
        from celery.worker import state

        active, pulse = len(state.active_requests), self._pulse
        pulse.running, pulse.done = active, state.all_total_count[0] - active
        later = [
            request for request in list(state.scheduled_requests) if request.eta.timestamp() > time.time() + SOON_S
        ]
        if (state.reserved_requests | state.active_requests | state.scheduled_requests) - set(later):
            return False
        channel = consumer.connection.default_channel
        for name in queues:
            # The worker has declared it; on Redis an empty one is not there, and cannot be asked for by name.
            if channel._size(name) if self._redis else channel.queue_declare(name, passive=True).message_count:
                return False
        self._note = probe.Note(len(later), min((request.eta.timestamp() for request in later), default=None))
        return True

    def _settle(self) -> None:
        """Settings that a drainer needs; what changes a task's fate, acks_late, only where it was not set."""
        from celery.worker.request import Request

        conf = self._app.conf
        if not probe.is_set(self._app, "task_acks_late"):
            conf.task_acks_late = True
        # A broker that is down ends the worker; the drainer tries again.
        conf.broker_connection_retry = conf.broker_connection_retry_on_startup = False
        if self._redis:
            conf.broker_transport_options = {
                "polling_interval": LOOK_S,  # how long a blocking read keeps a worker from stopping
                "socket_timeout": SOCKET_TIMEOUT_S,
                "socket_connect_timeout": SOCKET_TIMEOUT_S,
                **(conf.broker_transport_options or {}),
            }
            self._keep_who_holds()
        pulse, on_failure = self._pulse, Request.on_failure

        def counted(request: Any, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
            if type(exc_info.exception).__name__ not in ("Retry", "Ignore", "Reject", "RetryTaskError"):
                pulse.failed += 1
            return on_failure(request, exc_info, *args, **kwargs)

        Request.on_failure = counted

    # -- Redis: who holds what -----------------------------------------------------------------------------------------

    def _keep_who_holds(self) -> None:
        from kombu.transport import redis as transport

        held_key, lease, pause_s = probe.HELD_KEY, self._lease, LOOK_S / 2
        read = transport.Channel._brpop_read

        class Held(transport.QoS):  # type: ignore[misc]  # kombu has no types
            def append(self, message: Any, delivery_tag: str) -> None:
                if self.channel.taking:
                    super(transport.QoS, self).append(message, delivery_tag)  # Redis has it already
                else:
                    super().append(message, delivery_tag)

            def _remove_from_indices(self, delivery_tag: str, pipe: Any = None) -> Any:
                return super()._remove_from_indices(delivery_tag, pipe).hdel(held_key, delivery_tag)

        def take(channel: Any, timeout: Any = None) -> None:
            """In place of BRPOP, which gives a message away before anybody has noted who has it."""
            queues = channel._queue_cycle.consume(len(channel.active_queues))
            if not queues or time.monotonic() < channel.empty_until:
                return
            lists = [channel._q_for_pri(queue, step) for step in channel.priority_steps for queue in queues]
            names = [*lists, channel.unacked_index_key, channel.unacked_key, held_key]
            keys = [f"{channel.global_keyprefix}{name}" for name in names]
            channel._in_poll = channel.client.connection
            channel._brpop_sent_at = time.monotonic()
            channel.client.connection.send_command("EVAL", TAKE, len(keys), *keys, time.time(), lease())

        def taken(channel: Any, **options: Any) -> Any:
            channel.taking = True
            try:
                return read(channel, **options)
            except queue.Empty:
                # It did not wait for one, as BRPOP does: the next look comes with the worker's timer.
                channel.empty_until = time.monotonic() + pause_s
                raise
            finally:
                channel.taking = False

        kind = transport.Channel
        kind.QoS, kind._brpop_start, kind._brpop_read, kind.taking, kind.empty_until = Held, take, taken, False, 0.0

    def _lease(self) -> str:
        return f"{time.time() + HELD_S:.3f} {self._owner}"

    def renew(self, consumer: Any) -> None:
        """Say again that what we hold is held; from the worker's timer."""
        channel = consumer.task_consumer.channel
        tags = list(channel.qos._delivered)
        if tags:
            client, named = probe.raw(channel)
            client.hset(named(probe.HELD_KEY), mapping=dict.fromkeys(tags, self._lease()))

    def _recover(self) -> None:
        """Put back what a dead machine held, and what this one held before this pass."""
        with self._app.connection_for_read() as connection:
            connection.connect()
            channel = connection.channel()
            client, named = probe.raw(channel)
            now = time.time()
            unacked, gone = set(client.zrange(named(channel.unacked_index_key), 0, -1)), []
            for tag, lease in client.hgetall(named(probe.HELD_KEY)).items():
                until, _, owner = lease.decode().partition(" ")
                if tag not in unacked:
                    gone.append(tag)  # somebody else's clean-up put it back
                elif float(until) <= now or owner == self._owner:
                    channel.qos.restore_by_tag(tag.decode(), leftmost=True)
            if gone:
                client.hdel(named(probe.HELD_KEY), *gone)
            # Those of plain workers: Celery does it too, but not in a worker that lives for a second.
            channel.qos.restore_visible(num=None, interval=1)
        self._recovered = True


def _drain_step(drain: Drain) -> Any:
    """A boot step of the consumer that looks, and stops the worker."""
    from celery import bootsteps
    from celery.worker import state

    class DrainStep(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, consumer: Any) -> None:
            drain._pulse.slots = consumer.pool.num_processes
            queues = [queue.name for queue in consumer.task_consumer.queues]
            idle = 0

            def look() -> None:
                nonlocal idle
                try:
                    idle = idle + 1 if drain.look(consumer, queues) else 0
                except Exception:
                    # The worker's timer logs it, and would go on for ever.
                    state.should_stop = 1
                    raise
                if idle >= LOOKS or drain._stop.is_set():
                    state.should_stop = 0

            self.timers = [consumer.timer.call_repeatedly(LOOK_S, look)]
            if drain._redis:
                self.timers.append(consumer.timer.call_repeatedly(RENEW_S, drain.renew, (consumer,)))

        def stop(self, consumer: Any) -> None:
            for timer in self.timers:
                timer.cancel()

    return DrainStep
