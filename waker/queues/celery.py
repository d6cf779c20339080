"""Celery (5.7.0 and kombu 5.7.0 were read), on Redis and on RabbitMQ.

A worker takes a task whose ETA is still ahead into its memory and puts it back when it stops, among the ordinary ones.
On Redis the messages are read to tell them apart. RabbitMQ cannot be read without disturbing the order and the count of
deliveries: there the drain leaves a note behind it, in a queue of its own, with how many it put back and when the first
is due. The note is doubted where it does not fit the numbers: a job that is looked for in vain costs one start of a
machine, one that is not looked for waits.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from ..backlog import Backlog
from . import Finding, Row
from .hook import Nudges, nudge_with

if TYPE_CHECKING:
    from celery import Celery

__all__ = [
    "HELD_KEY",
    "ROWS",
    "Note",
    "backlog",
    "findings",
    "leave_note",
    "nudge_on_enqueue",
    "queues_of",
    "transport_of",
]

ROWS = (
    Row(
        "Celery on Redis",
        "worker up myapp.tasks:app (--queues high,low as with celery worker -Q)",
        "nudge_on_enqueue(app)",
        "everything, unless task_acks_late is switched off; at once when the same Machine starts again, elsewhere "
        "after 30 s (held by a plain Celery worker: visibility_timeout, and it loses the job that Redis hands it in "
        "that very moment)",
        "ready, running, ETA and countdown, retries, held tasks",
        "task_acks_late=False, task_reject_on_worker_lost, visibility_timeout",
    ),
    Row(
        "Celery on RabbitMQ",
        "worker up myapp.tasks:app (--queues high,low as with celery worker -Q)",
        "nudge_on_enqueue(app)",
        "everything, unless task_acks_late is switched off; at once, when RabbitMQ notices that the connection is gone",
        "ready; ETA, countdown and retries when a drain has seen them; not what is running",
        "task_acks_late=False, task_reject_on_worker_lost, confirm_publish",
    ),
)

# On Redis: which worker holds which message, as the drain keeps it. The value is "UNTIL OWNER".
HELD_KEY = "wake-on-request.held"
NOTE_QUEUE = "wake-on-request.due."
# The note is out of its queue while somebody reads it.
NOTE_TRIES = 3
NOTE_PAUSE_S = 0.05
# Messages in one answer of Redis, and how many are read at all before the rest counts as ready.
PAGE = 500
READ_MOST = 20_000


class Note(NamedTuple):
    """What a drain put back on RabbitMQ: so many tasks whose time is ahead, and when the first is due."""

    delayed: int = 0
    due_at: float | None = None


def queues_of(app: "Celery", names: Sequence[str] = ()) -> list[str]:
    """The queues that a worker of *app* would take."""
    return list(names) or list(app.amqp.queues.consume_from)


def transport_of(app: "Celery") -> str:
    """ "redis", "amqp", or the name of a transport that is not known here."""
    name: str = app.connection_for_read().transport.driver_type
    return name


def backlog(app: "Celery", names: Sequence[str] = (), *, note: Note | None = None) -> Backlog:
    """Read the queues afresh, on a connection of its own. *note* is the drain's, instead of the one on RabbitMQ."""
    with app.connection_for_read() as connection:
        connection.connect()
        queues = queues_of(app, names)
        if connection.transport.driver_type == "redis":
            return _redis(connection.channel(), queues)
        return _amqp(connection, queues, note)


# -- Redis -------------------------------------------------------------------------------------------------------------


def raw(channel: Any) -> tuple[Any, Callable[[str], str]]:
    """A client on the connections of *channel*, and how its keys are named there."""
    import redis

    prefix = channel.global_keyprefix
    return redis.Redis(connection_pool=channel.client.connection_pool), lambda key: f"{prefix}{key}"


def _redis(channel: Any, queues: Sequence[str]) -> Backlog:
    client, named = raw(channel)
    now = time.time()
    keys = [named(channel._q_for_pri(queue, step)) for queue in queues for step in channel.priority_steps]
    with client.pipeline(transaction=False) as ask:
        ask.zrange(named(channel.unacked_index_key), 0, -1, withscores=True)
        ask.hgetall(named(HELD_KEY))
        for key in keys:
            ask.llen(key)
        held, owners, *lengths = ask.execute()
    ready = running = 0
    due: list[float] = []
    for tag, since in held:
        owner = owners.get(tag)
        until = float(owner.split()[0]) if owner else since + channel.visibility_timeout
        due.append(until)
        if until <= now:
            ready += 1
        else:
            running += 1
    for key, length in zip(keys, lengths, strict=True):
        ahead = [eta for eta in _etas(client, key, length) if eta > now]
        ready += length - len(ahead)
        due += ahead
    return Backlog(ready, running, min((at for at in due if at > now), default=None))


def _etas(client: Any, key: str, length: int) -> Iterator[float]:
    """The ETAs of the messages in one list, the next to be taken first."""
    for start in range(0, min(length, READ_MOST), PAGE):
        for message in client.lrange(key, -start - PAGE, -start - 1):
            if b'"eta": null' in message:
                continue
            try:
                eta = json.loads(message)["headers"]["eta"]
                yield _timestamp(datetime.fromisoformat(eta))
            except (ValueError, KeyError, TypeError):
                continue  # of another protocol, or not a task: a worker has to look at it


def _timestamp(eta: datetime) -> float:
    return (eta if eta.tzinfo else eta.replace(tzinfo=UTC)).timestamp()


# -- RabbitMQ ----------------------------------------------------------------------------------------------------------


def _amqp(connection: Any, queues: Sequence[str], note: Note | None) -> Backlog:
    messages = consumers = 0
    for queue in queues:
        channel = connection.channel()
        try:
            found = channel.queue_declare(queue, passive=True)
        except connection.channel_errors:
            continue  # nobody has declared it yet, so nothing was sent to it
        messages, consumers = messages + found.message_count, consumers + found.consumer_count
        channel.close()
    note = _read_note(connection, queues) if note is None and messages else note or Note()
    now = time.time()
    if note.due_at is None or note.due_at <= now:
        return Backlog(messages)
    ready = messages - note.delayed
    if ready < 0:
        # Somebody holds them, and takes what else there is; or they are gone, and what is there is something else.
        ready = 0 if consumers else messages
    return Backlog(ready, 0, note.due_at)


def _read_note(connection: Any, queues: Sequence[str]) -> Note:
    import kombu

    for attempt in range(NOTE_TRIES):
        if attempt:
            time.sleep(NOTE_PAUSE_S)
        with connection.channel() as channel:
            try:
                message = kombu.Queue(_note_queue(queues), channel=channel).get()
            except connection.channel_errors:
                return Note()  # there never was one
            if message is not None:
                message.requeue()
                return Note(*message.payload)
    return Note()


def leave_note(app: "Celery", names: Sequence[str], note: Note) -> None:
    """Put *note* where a probe finds it, in place of the one before."""
    import kombu

    with app.connection_for_write() as connection:
        connection.connect()
        name = _note_queue(queues_of(app, names))
        with connection.channel() as channel:
            queue = kombu.Queue(name, channel=channel, durable=True, max_length=1)
            if note.delayed:
                queue.declare()
                kombu.Producer(channel).publish(list(note), routing_key=name, serializer="json", delivery_mode=2)
                return
            try:
                queue.purge()
            except connection.channel_errors:
                pass  # there never was one


def _note_queue(queues: Sequence[str]) -> str:
    return NOTE_QUEUE + "+".join(sorted(queues))


# -- the app -----------------------------------------------------------------------------------------------------------


def nudge_on_enqueue(app: "Celery", waker: Nudges | None = None) -> None:
    """From now on, nudge after each task that is sent: Celery's `after_task_publish`, which comes after the write.

    That signal is one for all apps of a process. A task with an ETA ahead nudges nobody: the watch wakes for it.
    """
    from celery.signals import after_task_publish

    nudge = nudge_with(waker)

    def published(headers: Any = None, **_: Any) -> None:
        if not (isinstance(headers, dict) and headers.get("eta")):
            nudge()

    after_task_publish.connect(published, weak=False, dispatch_uid=f"wake-on-request {id(app)}")


def findings(app: "Celery") -> list[Finding]:
    """Settings with which a killed machine costs tasks."""
    conf, found = app.conf, []
    options = conf.broker_transport_options or {}
    transport = transport_of(app)
    if is_set(app, "task_acks_late") and not conf.task_acks_late:
        found.append(
            Finding(
                "task_acks_late",
                "False",
                "loses the job: a task that runs when its machine is killed is gone",
                "remove the setting (worker up makes it True), or set it for the tasks that may run twice",
            )
        )
    if not conf.task_reject_on_worker_lost:
        found.append(
            Finding(
                "task_reject_on_worker_lost",
                repr(conf.task_reject_on_worker_lost),
                "a task whose own process is killed, for want of memory, counts as failed and is not repeated",
                "True, if your tasks may run twice and none of them kills its process every time",
            )
        )
    if transport == "redis" and "visibility_timeout" not in options:
        found.append(
            Finding(
                "broker_transport_options['visibility_timeout']",
                "not set (3600)",
                "a task that runs longer is begun a second time beside the first",
                "seconds above your longest task and your longest countdown, the same in every worker",
            )
        )
    if transport == "amqp" and not options.get("confirm_publish"):
        found.append(
            Finding(
                "broker_transport_options['confirm_publish']",
                repr(options.get("confirm_publish")),
                "loses the job: delay() returns, and wakes, before RabbitMQ has the task",
                "True, in the app that sends tasks",
            )
        )
    return found


def is_set(app: "Celery", name: str) -> bool:
    """Whether the user gave this setting a value, under its present name or the one of old."""
    given = app.conf.table(with_defaults=False)
    return name in given or f"CELERY_{name.removeprefix('task_').upper()}" in given
