"""What the waker's side knows of each queue library: one module per library, and the registry of them all.

A library's module imports the library inside its functions, and nothing of another library. It has

- `backlog(queue, names=()) -> Backlog`: a fresh reading, through the library's public interfaces where there are some;
- `nudge_on_enqueue(queue, waker=None)`: from now on nudge after each enqueue, when the job is really in the queue;
- `findings(queue) -> list[Finding]`: its settings that lose jobs, for `worker check`;
- `ROWS`: its lines in the README's table, one for each broker on which it behaves differently.

*names* are queues as the library's users name them (`--queues high,low`); none means those that its own worker would
take. Where `several` is set, *queue* may also be a list. The drain of the same name in `worker/drains/` uses the
same probe. A queue is recognised by the names of its classes: no library is imported to find out that it is not in use.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import FunctionType
from typing import NamedTuple

from ..backlog import Backlog
from ..errors import UsageError

__all__ = ["KNOWN", "LIBRARIES", "Finding", "Library", "Row", "findings", "install_hint", "name_of", "nudge_on_enqueue",
           "probe_for", "rows"]  # fmt: skip


class Library(NamedTuple):
    """One queue library: how its objects are recognised, and what installs it."""

    kinds: tuple[str, ...]  # module and name of classes; an object of a subclass is recognised, too
    extra: str = ""  # of wake-on-request; "" where nothing needs to be installed
    modules: tuple[str, ...] = ()  # what the extra brings
    several: bool = False  # a list of such objects is one queue
    named: bool = False  # it has queues that are chosen by name
    settings: tuple[str, ...] = ()  # a class that has one of these has the settings of its worker


# The name of a library is that of its module here, and of its drain.
LIBRARIES = {
    "sqlite": Library(("waker.sqlite_queue.SqliteQueue",)),
    "rq": Library(("rq.queue.Queue", "rq.worker.base.BaseWorker"), "rq", ("rq", "redis"), several=True, named=True),
    "celery": Library(("celery.app.base.Celery",), "celery", ("celery", "kombu", "amqp", "redis"), named=True),
    "streaq": Library(("streaq.worker.Worker",), "streaq", ("streaq", "coredis")),
    "taskiq": Library(
        (
            "taskiq_redis.redis_broker.RedisStreamBroker",
            "taskiq_redis.redis_broker.ListQueueBroker",
            "taskiq_redis.redis_broker.PubSubBroker",
            "taskiq.scheduler.scheduler.TaskiqScheduler",
            "taskiq.receiver.receiver.Receiver",
        ),
        "taskiq",
        ("taskiq", "taskiq_redis"),
        several=True,
        named=True,
    ),
    "django_tasks": Library(
        (
            "django.core.handlers.asgi.ASGIHandler",
            "django.core.handlers.wsgi.WSGIHandler",
            "django_tasks_db.backend.DatabaseBackend",
            "django.utils.connection.ConnectionProxy",
        ),
        "django_tasks",
        ("django", "django_tasks", "django_tasks_db"),
        named=True,
    ),
    "pgqueuer": Library(
        (
            "pgqueuer.core.applications.PgQueuer",
            "pgqueuer.core.qm.QueueManager",
            "pgqueuer.adapters.persistence.queries.Queries",
            "pgqueuer.adapters.persistence.queries.SyncQueries",
        ),
        "pgqueuer",
        ("pgqueuer", "asyncpg"),
    ),
    "procrastinate": Library(("procrastinate.app.App",), "procrastinate", ("procrastinate", "psycopg"), named=True),
    "dramatiq": Library(
        ("dramatiq.brokers.redis.RedisBroker", "dramatiq.brokers.rabbitmq.RabbitmqBroker", "dramatiq.worker.Worker"),
        "dramatiq",
        ("dramatiq",),
        named=True,
    ),
    "huey": Library(("huey.api.Huey", "huey.consumer.Consumer"), "huey", ("huey",)),
    "saq": Library(("saq.queue.base.Queue", "saq.worker.Worker"), "saq", ("saq",)),
    "arq": Library(("arq.worker.Worker", "arq.connections.ArqRedis"), "arq", ("arq",), settings=("functions",)),
}
KNOWN = {kind: name for name, library in LIBRARIES.items() for kind in library.kinds}


class Row(NamedTuple):
    """A library's line in the README's table."""

    library: str  # with its broker, where that matters
    image: str
    app: str
    kill: str  # what survives a kill, and when it comes back
    watch: str  # what the watch can see
    check: str  # what `worker check` warns of


class Finding(NamedTuple):
    """A setting that loses jobs, or may: by name and value, with the remedy."""

    setting: str
    value: str
    risk: str
    remedy: str


def name_of(queue: object, names: Sequence[str] = ()) -> tuple[str, str]:
    """The name of the library that *queue* is an object of, and ""; or "" and why it cannot be used.

    By its class, or the first base class that is known; for a list, by the classes of what is in it; for a factory, by
    what it is annotated to return; for a class that holds settings, by their names.
    """
    if isinstance(queue, list | tuple) and queue:
        found = {name_of(one, names) for one in queue}
        if len(found) > 1:
            return "", "its objects are not of one kind; a list may only hold queues of one library"
        name, why = found.pop()
        if name and not LIBRARIES[name].several:
            return "", f"it is a list, and {name} takes one object that knows all its queues"
        return name, why
    if isinstance(queue, type) and (name := _set_by(queue)):
        return name, ""
    for base in _classes(queue):
        name = KNOWN.get(f"{base.__module__}.{base.__qualname__}", "")
        if name and names and not LIBRARIES[name].named:
            return "", f"--queues {','.join(names)} is given, and {name} has no queues that are chosen by name"
        if name:
            return name, ""
    kind = f"{type(queue).__module__}.{type(queue).__qualname__}"
    return "", f"it is a {kind}, which is not known; known are {', '.join(sorted(KNOWN))}"


def _classes(queue: object) -> Iterator[type]:
    """The class and base classes of *queue*; of a dict with settings, those of its "queue"; of a function, those of
    what it makes, as its annotation says."""
    made: list[object] = [type(queue["queue"] if isinstance(queue, dict) and "queue" in queue else queue)]
    if isinstance(queue, FunctionType) and "return" in queue.__annotations__:
        from typing import get_args, get_type_hints

        try:
            returned = get_type_hints(queue)["return"]
        except NameError:  # a name that is only there for type checkers
            returned = None
        made = [returned, *get_args(returned)]
    for one in made:
        if isinstance(one, type):
            yield from one.__mro__


def _set_by(settings: type) -> str:
    """The library whose settings the class *settings* has, or ""."""
    has = vars(settings)
    return next((name for name, library in LIBRARIES.items() if any(one in has for one in library.settings)), "")


def probe_for(queue: object, names: Sequence[str] = ()) -> Callable[[], Backlog]:
    """Return what reads the backlog of *queue* afresh.

    Raises UsageError for an object that is no known queue, and says which are.
    """
    backlog: Callable[..., Backlog] = _module(queue, names, "watched").backlog
    return (lambda: backlog(queue, names)) if names else (lambda: backlog(queue))


def nudge_on_enqueue(queue: object, waker: object = None) -> None:
    """From now on, nudge after each enqueue to *queue*, when the job is in it: one line in the app.

    Without a *waker*, the first enqueue makes a `Waker()` from the environment: a module that defines jobs is also
    imported where nobody enqueues. A hook that fails logs why; it neither slows nor breaks the enqueue.
    Raises UsageError for an object that is no known queue, and says which are.
    """
    _module(queue, (), "hooked").nudge_on_enqueue(queue, waker)


def findings(queue: object) -> list[Finding]:
    """The settings of *queue* that lose jobs, or may. Raises UsageError for an object that is no known queue."""
    found: list[Finding] = getattr(_module(queue, (), "checked"), "findings", lambda _: [])(queue)
    return found


def rows() -> Iterator[Row]:
    """Every library's lines of the table; imports no library."""
    for name in LIBRARIES:
        yield from import_module(f".{name}", __name__).ROWS


def install_hint(error: BaseException | None) -> str:
    """What installs the module that *error* misses, as the end of a sentence; "" if it is none of ours to know."""
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    extras = [library.extra for library in LIBRARIES.values() if missing in library.modules]
    return f". Install it: pip install 'wake-on-request[{' or '.join(extras)}]'" if extras else ""


def _module(queue: object, names: Sequence[str], done: str):  # type: ignore[no-untyped-def]  # a module is what it has
    name, why = name_of(queue, names)
    if not name:
        raise UsageError(f"this cannot be {done}: {why}")
    return import_module(f".{name}", __name__)
