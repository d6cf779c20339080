"""Dramatiq (2.2.1 was read), on Redis and on RabbitMQ.

Dramatiq has no public interface for reading a queue. Its keys in Redis, as documented in its `dispatch.lua`:

- `<namespace>:<queue>` is a list of message ids, `….msgs` a hash of those and of the ones that workers hold;
- `<namespace>:<queue>.DQ`, and its `.msgs`, the same for delayed messages, retries among them;
- `<namespace>:__acks__.<worker>.<queue>` is a set of the ids that a worker holds, until it says that they are done;
- `<namespace>:__heartbeats__` has when each worker was heard of last.

On RabbitMQ, delayed messages are in the queue `<queue>.DQ`. They are read by taking them and putting them back. What a
worker holds cannot be seen there.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..backlog import Backlog
from . import Finding, Row
from .hook import Nudges, nudge_with

if TYPE_CHECKING:
    from dramatiq import Broker, Worker

__all__ = ["ROWS", "Keys", "Rabbit", "backlog", "broker_of", "connected", "due_ids", "findings", "is_redis",
           "nudge_on_enqueue", "queues_of"]  # fmt: skip

ROWS = (
    Row(
        "Dramatiq (Redis)",
        "worker up myapp.tasks:broker (or a Worker, for its threads and queues)",
        "nudge_on_enqueue(broker)",
        "everything; at once when the same Machine starts again, elsewhere after heartbeat_timeout (60 s)",
        "ready, running, delayed, retries, abandoned jobs",
        "a broker without Retries",
    ),
    Row(
        "Dramatiq (RabbitMQ)",
        "worker up myapp.tasks:broker (or a Worker, for its threads and queues)",
        "nudge_on_enqueue(broker)",
        "everything; at once, when RabbitMQ notices that the connection is gone (a job that kills its worker is begun "
        "again for ever)",
        "ready, delayed, retries; not what is running",
        "confirm_delivery=False, a broker without Retries",
    ),
)

# On RabbitMQ: so many delayed messages of a queue are looked at, and not again for a while if their number is the same.
PEEK_MOST = 5_000
PEEK_AGAIN_S = 30.0
PEEK_S = 0.5
NOT_DECLARED = 404

# When each delayed message is due, in ms: it never changes, and reading one costs a message to decode.
_etas: "WeakKeyDictionary[Broker, dict[bytes, float]]" = WeakKeyDictionary()
# On RabbitMQ: for each queue, how many delayed ones there were, what was found, and when.
_peeked: "WeakKeyDictionary[Broker, dict[str, tuple[int, list[float], float]]]" = WeakKeyDictionary()


def broker_of(target: Any) -> Any:
    """The broker itself, or the Worker's."""
    return target.broker if hasattr(target, "worker_threads") else target


def queues_of(target: Any, names: Sequence[str] = ()) -> list[str]:
    """The queues that are named, or those that the Worker was told, or all that the actors have declared."""
    chosen = names or getattr(target, "consumer_whitelist", None) or ()
    return sorted(chosen or broker_of(target).get_declared_queues())


class Keys:
    """The names of a broker's keys in Redis."""

    def __init__(self, broker: Any) -> None:
        self._space = broker.namespace
        self.heartbeats = f"{self._space}:__heartbeats__"

    def queue(self, name: str) -> str:
        return f"{self._space}:{name}"

    def messages(self, name: str) -> str:
        return f"{self._space}:{name}.msgs"

    def held(self, worker: str, name: str) -> str:
        return f"{self._space}:__acks__.{worker}.{name}"


def backlog(target: "Broker | Worker", names: Sequence[str] = ()) -> Backlog:
    """Read the queues afresh. On Redis, what a dead worker holds is ready when the heartbeat's time is up."""
    broker = broker_of(target)
    queues = queues_of(target, names)
    return _redis(broker, queues) if is_redis(broker) else _rabbit(broker, queues)


def is_redis(broker: Any) -> bool:
    return hasattr(broker, "namespace")


# -- Redis -------------------------------------------------------------------------------------------------------------


def _redis(broker: Any, queues: Sequence[str]) -> Backlog:
    keys = Keys(broker)
    with broker.client.pipeline() as ask:
        ask.zrange(keys.heartbeats, 0, -1, withscores=True)
        for name in queues:
            ask.llen(keys.queue(name))
            ask.hlen(keys.messages(name))
            ask.lrange(keys.queue(f"{name}.DQ"), 0, -1)
            ask.hkeys(keys.messages(f"{name}.DQ"))
        heartbeats, *answers = ask.execute()
    now_ms = time.time() * 1000
    ready, due = 0, []
    holding: list[tuple[str, bool]] = []
    etas: dict[bytes, float] = {}
    for number, name in enumerate(queues):
        waiting, all_of_it, delayed, all_delayed = answers[number * 4 : number * 4 + 4]
        ready += waiting
        mine = _when(broker, keys.messages(f"{name}.DQ"), all_delayed)
        etas |= mine
        late = [mine[one] <= now_ms for one in delayed if one in mine]
        ready += sum(late)
        due += [mine[one] for one in delayed if one in mine and mine[one] > now_ms]
        if all_of_it > waiting:
            holding.append((name, False))
        if len(all_delayed) > len(delayed):
            holding.append((f"{name}.DQ", True))
    _etas[broker] = etas
    running = 0
    with broker.client.pipeline(transaction=False) as ask:
        held_by = [(beat + broker.heartbeat_timeout, later) for _, beat in heartbeats for _, later in holding]
        for worker, _ in heartbeats:
            for name, _ in holding:
                ask.smembers(keys.held(worker.decode(), name))
        held = ask.execute() if held_by else []
    for (until_ms, later), ids in zip(held_by, held, strict=True):
        for one in ids:
            # A worker that lives moves its delayed messages itself; a dead one's have to wait for both times.
            at_ms = max(until_ms, etas.get(one, 0)) if later else until_ms
            if at_ms <= now_ms:
                ready += 1
            else:
                running += not later
                due.append(at_ms)
    return Backlog(ready, running, min(due) / 1000 if due else None)


def _when(broker: Any, messages: str, ids: Sequence[bytes]) -> dict[bytes, float]:
    """When each of the delayed messages *ids* is due, in ms."""
    from dramatiq import Message

    known = _etas.get(broker, {})
    unknown = [one for one in ids if one not in known]
    found = {one: known[one] for one in ids if one in known}
    if unknown:
        for one, data in zip(unknown, broker.client.hmget(messages, unknown), strict=True):
            if data is not None:  # it was moved meanwhile
                found[one] = Message.decode(data).options.get("eta") or 0
    return found


def due_ids(broker: Any, name: str) -> list[bytes]:
    """The delayed messages of the queue *name* that nobody holds, and whose time has come; the earliest first."""
    keys = Keys(broker)
    ids = broker.client.lrange(keys.queue(f"{name}.DQ"), 0, -1)
    etas = _when(broker, keys.messages(f"{name}.DQ"), ids) if ids else {}
    now_ms = time.time() * 1000
    return sorted((one for one in ids if etas.get(one, now_ms) <= now_ms), key=lambda one: etas.get(one, 0))


# -- RabbitMQ ----------------------------------------------------------------------------------------------------------


@contextmanager
def connected(broker: Any) -> "Iterator[Rabbit]":
    """A connection of its own, for a few questions."""
    import pika

    connection = pika.BlockingConnection(parameters=broker.parameters)
    try:
        yield Rabbit(connection)
    finally:
        if connection.is_open:
            connection.close()


class Rabbit:
    """What can be asked on one connection, and on a channel for each question that may cost it."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._channel: Any = None

    def waiting(self, queue: str) -> int:
        """How many messages wait in *queue*; 0 if nobody has declared it yet."""
        import pika.exceptions

        if self._channel is None:
            self._channel = self._connection.channel()
        try:
            return int(self._channel.queue_declare(queue=queue, passive=True).method.message_count)
        except pika.exceptions.ChannelClosedByBroker as error:
            self._channel = None
            if error.reply_code != NOT_DECLARED:
                raise
            return 0

    def sift(self, queue: str, count: int, wanted: Callable[[Any], bool]) -> None:
        """Take up to *count* messages that wait in *queue*; those that are *wanted* are gone then, the rest is back."""
        channel = self._connection.channel()
        count = min(count, PEEK_MOST)
        channel.basic_qos(prefetch_count=count)
        for method, _, body in channel.consume(queue, inactivity_timeout=PEEK_S):
            if method is None:
                break  # somebody else took some meanwhile
            message = _decoded(body)
            if message is not None and wanted(message):
                channel.basic_ack(method.delivery_tag)
            count -= 1
            if not count:
                break
        channel.close()  # RabbitMQ has put back the rest when it answers


def _decoded(body: bytes) -> Any:
    from dramatiq import DecodeError, Message

    try:
        return Message.decode(body)
    except DecodeError:
        return None


def _rabbit(broker: Any, queues: Sequence[str]) -> Backlog:
    ready, due = 0, []
    now_ms = time.time() * 1000
    with connected(broker) as rabbit:
        for name in queues:
            ready += rabbit.waiting(name)
            for eta in _peek(broker, rabbit, f"{name}.DQ"):
                if eta <= now_ms:
                    ready += 1
                else:
                    due.append(eta)
    return Backlog(ready, 0, min(due) / 1000 if due else None)


def _peek(broker: Any, rabbit: Rabbit, queue: str) -> list[float]:
    """When the delayed messages in *queue* are due, in ms; those that a worker holds are not seen."""
    count = rabbit.waiting(queue)
    seen = _peeked.setdefault(broker, {})
    before, etas, at = seen.get(queue, (0, [], 0.0))
    known = count == before and time.monotonic() - at < PEEK_AGAIN_S and min(etas, default=0) > time.time() * 1000
    if count and not known:
        etas = []

        def look(message: Any) -> bool:
            etas.append(message.options.get("eta") or 0)
            return False

        rabbit.sift(queue, count, look)
        seen[queue] = (count, etas, time.monotonic())
    return etas if count else []


# -- the app -----------------------------------------------------------------------------------------------------------


def nudge_on_enqueue(target: "Broker | Worker", waker: Nudges | None = None) -> None:
    """From now on, nudge after each message to this broker. A delayed one nudges nobody: the watch wakes for it."""
    from dramatiq import Middleware

    nudge = nudge_with(waker)

    class Nudge(Middleware):  # type: ignore[misc]  # of a library that is not always there
        def after_enqueue(self, _broker: Any, _message: Any, delay: int | None) -> None:
            if delay is None:
                nudge()

    broker_of(target).add_middleware(Nudge())


def findings(target: "Broker | Worker") -> list[Finding]:
    """Settings that lose jobs."""
    from dramatiq.middleware import Retries

    broker, found = broker_of(target), []
    if not any(isinstance(one, Retries) for one in broker.middleware):
        risk = "a job that fails is acknowledged and gone, and so is every retry"
        remedy = "add dramatiq.middleware.Retries (max_retries=0 for none)"
        found.append(Finding("middleware", "without Retries", risk, remedy))
    if not is_redis(broker) and not broker.confirm_delivery:
        risk = "loses the job: send() returns, and wakes, before RabbitMQ has it"
        found.append(Finding("confirm_delivery", "False", risk, "RabbitmqBroker(..., confirm_delivery=True)"))
    return found
