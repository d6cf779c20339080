"""The embedded queue: jobs in one SQLite file, each run at least once, by the worker or in any process of one
machine."""

import json
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, ParamSpec, TypeVar, overload

from .backlog import Backlog
from .errors import QueueError, UsageError, WakeError
from .sqlite_store import Store

if TYPE_CHECKING:
    import threading

    from .sqlite_worker import EventLoop, Shift

__all__ = ["Counts", "Job", "JobOverran", "SqliteQueue", "Task"]

P = ParamSpec("P")
R = TypeVar("R")
State = Literal["ready", "delayed", "running", "dead"]
_STATES: Final[tuple[State, ...]] = ("ready", "delayed", "running", "dead")  # by the number in the file

DEFAULT_RETRIES = 5
DEFAULT_BACKOFF_S = 10.0
DEFAULT_LEASE_S = 30.0
DEFAULT_BUSY_TIMEOUT_S = 5.0
MAX_CONCURRENCY = 256
# A job says what to do; what it is to be done to belongs into a file or an object store.
MAX_JOB_BYTES = 1 << 20

# inspect.CO_GENERATOR, CO_COROUTINE and CO_ASYNC_GENERATOR; importing inspect costs a cold start more than all of this.
GENERATOR, COROUTINE, ASYNC_GENERATOR = 0x20, 0x80, 0x200

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_PLAIN: Final = frozenset({str, int, float, bool, type(None)})


class JobOverran(WakeError):  # noqa: N818 - what happened, like NotWoken
    """A sync job ran past its *timeout_s*, was recorded as failed, and still runs: only the end of the process ends
    it."""

    exit_code = 75


class Counts(NamedTuple):
    """How many jobs there are in each state. A job that is done is no longer there."""

    ready: int
    delayed: int
    running: int
    dead: int


class Job(NamedTuple):
    """One job that is not done. Times are Unix seconds.

    *at* belongs to the state: when a delayed job becomes ready, since when one has been running or dead, None if ready.
    *attempts* counts the claims; *error* is why the last one failed. *owner* names the process of a running job.
    """

    id: int
    state: State
    task: str
    args: list[Any]
    kwargs: dict[str, Any]
    attempts: int
    max_attempts: int
    enqueued_at: float
    at: float | None
    error: str | None
    owner: str | None


class Task(Generic[P, R]):
    """A function that can be called, or enqueued to be called by a worker. Made by `SqliteQueue.task`."""

    def __init__(
        self,
        queue: "SqliteQueue",
        fn: Callable[P, R],
        name: str,
        *,
        retries: int,
        backoff_s: float,
        timeout_s: float | None,
        is_async: bool,
    ) -> None:
        self.fn = fn
        self.name = name
        self.retries = retries
        self.backoff_s = backoff_s
        self.timeout_s = timeout_s
        self.is_async = is_async
        self._queue = queue
        self.__wrapped__ = fn
        self.__doc__ = fn.__doc__
        self.__name__ = getattr(fn, "__name__", name)
        self.__module__ = fn.__module__

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function here and now, as if it were no task."""
        return self.fn(*args, **kwargs)

    def enqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> int:
        """Commit a job that calls the function with these arguments, and return its id.

        When this returns, the job is on the disk as *durability* says, and every later reading of the queue sees it.
        Raises UsageError if an argument is not JSON, QueueError if the file cannot be written; then there is no job.
        """
        return self._queue._enqueue(self, 0.0, args, kwargs)

    def enqueue_in(self, seconds: float, /, *args: P.args, **kwargs: P.kwargs) -> int:
        """Like `enqueue`, but the job becomes ready *seconds* from now, by the clock of whoever looks.

        Nothing is nudged then: the watch, or whoever reads `Backlog.due_at`, wakes a machine when it is time.
        """
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise UsageError(f"{self.name}: enqueue_in({seconds!r}, …): expected seconds from now, like 90 or 2.5")
        return self._queue._enqueue(self, float(seconds), args, kwargs)

    def __repr__(self) -> str:
        return f"<Task {self.name}>"


class SqliteQueue:
    """Jobs in the SQLite file *path*, for one machine and for development.

    On Fly, a machine's root file system is wiped at each stop and shared with no other machine, and so would the jobs
    be: there, put the file on a volume that is mounted into the one machine that both enqueues and works, or use a
    queue that lives on a server. Nor does the file work on a network mount.

    A job runs at least once: it leaves the file when its function has returned. A worker holds its jobs under a lease
    of *lease_s* seconds that it keeps renewing; the jobs of a worker that died on this host are ready again at once,
    of any other when its lease ends. A worker that lost its lease can no longer settle what it held. A claim counts
    as an attempt. A job that raised is tried again after *backoff_s*, doubling, up to *retries* times, and is then
    kept as dead, with its error; so is a job that killed its worker in each of its attempts. With retries=0 a job is
    begun at most once. What a worker puts back when it is told to stop does not count.

    *path* is made absolute here; the file is made by the first use, in a folder that exists (without *create*, a
    missing file is an error). Any number of threads, forks and processes of one host may use it at once.
    *durability*: "full" keeps an enqueued job through a power cut, "process" through the death of any process, and is
    faster. *concurrency*: how many jobs `work` runs at a time. *busy_timeout_s*: how long to wait for another
    process's write. Raises UsageError for a bad argument; nothing is opened before the first use.
    """

    # What every operation raises if the file cannot be used: locked, read-only, full, not a database, not ours.
    Error = QueueError
    Overran = JobOverran

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durability: Literal["full", "process"] = "full",
        concurrency: int = 1,
        retries: int = DEFAULT_RETRIES,
        backoff_s: float = DEFAULT_BACKOFF_S,
        lease_s: float = DEFAULT_LEASE_S,
        busy_timeout_s: float = DEFAULT_BUSY_TIMEOUT_S,
        create: bool = True,
        now: Callable[[], float] = time.time,
    ) -> None:
        name = os.fspath(path)
        if not isinstance(name, str) or not name or name.startswith(("file:", ":memory:")) or "\0" in name:
            raise UsageError(f"SqliteQueue({name!r}): expected the path of a file, like jobs.db")
        if durability not in ("full", "process"):
            raise UsageError(f'SqliteQueue: durability={durability!r}: expected "full" or "process"')
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or not 1 <= concurrency <= MAX_CONCURRENCY:
            raise UsageError(f"SqliteQueue: concurrency={concurrency!r}: expected 1 to {MAX_CONCURRENCY}")
        _check_retrying("SqliteQueue", retries, backoff_s)
        _check_seconds("SqliteQueue", "lease_s", lease_s)
        _check_seconds("SqliteQueue", "busy_timeout_s", busy_timeout_s)
        self.path = os.path.abspath(name)
        self.durability = durability
        self.concurrency = concurrency
        self.retries = retries
        self.backoff_s = backoff_s
        self.lease_s = lease_s
        #: Attempts that failed in this process.
        self.failed = 0
        self.tasks: dict[str, Task[..., Any]] = {}
        self._store = Store(self.path, durability=durability, busy_timeout_s=busy_timeout_s, create=create, now=now)
        self._after_enqueue: list[Callable[[], object]] = []
        # The call of work() under way in this process, and the loop of its async jobs, which outlives it.
        self._shift: Shift | None = None
        self._loop: EventLoop | None = None
        # Under what this process still holds jobs that it no longer runs, because the file could not be written.
        self._left_over: list[int] = []

    @overload
    def task(self, fn: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self,
        /,
        *,
        name: str | None = None,
        retries: int | None = None,
        backoff_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Callable[[Callable[P, R]], Task[P, R]]: ...
    def task(
        self,
        fn: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        retries: int | None = None,
        backoff_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Make a function a task: `@queue.task`, or `@queue.task(retries=2)` with what differs from the queue's own.

        A task's *name*, which the jobs carry, is `module:qualname` unless given. A worker that meets a name it does
        not know imports that module. Async functions run on one event loop, which lives as long as the worker.

        After *timeout_s* an async job is cancelled and has failed. A sync one cannot be stopped: it is recorded as
        failed, and `work` raises JobOverran, so that the process ends and takes the job with it; give such a task a
        time-out for what must never be, and what waits inside it a shorter one. A sync job with *timeout_s* runs in a
        thread of its own.

        Raises UsageError for a bad option, a generator function, a name that is taken, or a function of `__main__`,
        which the worker, having another `__main__`, could not find.
        """
        if fn is None:
            return lambda fn: self._register(fn, name, retries, backoff_s, timeout_s)
        return self._register(fn, name, retries, backoff_s, timeout_s)

    def _register(
        self,
        fn: Callable[P, R],
        name: str | None,
        retries: int | None,
        backoff_s: float | None,
        timeout_s: float | None,
    ) -> Task[P, R]:
        flags = getattr(getattr(fn, "__code__", None), "co_flags", 0)
        qualname = getattr(fn, "__qualname__", None)
        if not callable(fn) or (qualname is None and name is None):
            raise UsageError(f"queue.task({fn!r}): expected a function, or anything callable and name=…")
        if name is None:
            if fn.__module__ == "__main__":
                raise UsageError(
                    f"queue.task: {qualname} is defined in __main__, where no worker finds it: "
                    "move it to a module and import it from there, or give it a name: @queue.task(name=…)"
                )
            name = f"{fn.__module__}:{qualname}"
        if flags & (GENERATOR | ASYNC_GENERATOR):
            raise UsageError(f"queue.task: {name} is a generator function: calling it runs nothing of it")
        known = self.tasks.get(name)
        # The same function once more is a module that was reloaded.
        if known is not None and _place_of(known.fn) != _place_of(fn):
            raise UsageError(f"queue.task: two tasks are named {name!r}: give one of them another name=…")
        retries = self.retries if retries is None else retries
        backoff_s = self.backoff_s if backoff_s is None else backoff_s
        _check_retrying(name, retries, backoff_s)
        if timeout_s is not None:
            _check_seconds(name, "timeout_s", timeout_s)
        is_async = bool(flags & COROUTINE)
        task = Task(self, fn, name, retries=retries, backoff_s=backoff_s, timeout_s=timeout_s, is_async=is_async)
        self.tasks[name] = task
        return task

    def after_enqueue(self, callback: Callable[[], object]) -> None:
        """Have *callback* called in the enqueueing thread after each commit of a job that is ready at once.

        It must be quick, and what it raises is logged, not raised: the job is in the queue whatever it does.
        """
        self._after_enqueue.append(callback)

    def _enqueue(self, task: Task[..., Any], delay_s: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        payload = _to_json(task.name, args, kwargs)
        job = self._store.insert(task.name, payload, delay_s, task.retries + 1)
        if delay_s <= 0:
            self._look_again()
            for callback in self._after_enqueue:
                try:
                    callback()
                except Exception as error:
                    _log("error", "enqueue.callback_failed", job=job, error=repr(f"{type(error).__name__}: {error}"))
        return job

    def _look_again(self) -> None:
        """Tell a free slot of this process, if there is one, that there is a job."""
        if self._shift is not None and self._shift.is_ours():
            self._shift.look_again()

    # For the worker

    def work(self, stop: "threading.Event", progress: Callable[[int, int], object] | None = None) -> int:
        """Run jobs until none is ready and none is running here, or *stop* is set; return how many were run.

        A job enqueued meanwhile, by a job or by anybody, is run in the same call. When *stop* is set nothing more is
        claimed, and this returns when what is running has ended; `release` does not wait for that. With a concurrency
        of one, sync jobs run in the calling thread, otherwise in up to that many threads. Jobs whose worker died
        while it ran them come last, and one at a time: one of them may be why. *progress* is called with (running,
        done) whenever one of them has changed, one call at a time, from any thread. Raises QueueError if the file
        cannot be used; a job that had ended by then is recorded if that becomes possible within the lease, and runs
        again otherwise. Raises JobOverran as `task` says. One call at a time per process.
        """
        from .sqlite_worker import Shift

        if self._shift is not None and self._shift.is_ours():
            raise UsageError(f"{self.path}: work() is already running in this process; raise concurrency instead")
        shift = self._shift = Shift(self, self._store, stop, progress)
        try:
            return shift.run()
        finally:
            self._shift = None

    def release(self) -> int:
        """Put back at once what a `work` under way in this process holds, as not attempted; return the number of jobs.

        For another thread, when *stop* is set and time is up. Jobs that run on can no longer settle: they run again.
        """
        return self._shift.release() if self._shift is not None and self._shift.is_ours() else 0

    def backlog(self) -> Backlog:
        """Read the queue afresh. Ready are jobs that a `work` beginning now would claim, with those whose worker died
        on this host or let its lease end; the ends of the other leases are among what *due_at* is the earliest of."""
        return self._store.backlog()

    # For people

    def counts(self) -> Counts:
        """Count the jobs in each state, as they are written down: a delayed job that is due still counts as delayed."""
        return Counts(*self._store.counts())

    def jobs(self, state: State | None = None, *, limit: int = 100) -> list[Job]:
        """Return at most *limit* jobs, all or those in one *state*, the oldest first."""
        if state is not None and state not in _STATES:
            raise UsageError(f"jobs(state={state!r}): expected one of {', '.join(_STATES)}")
        if state is None:
            rows = self._store.rows("order by jobs.id limit ?", (limit,))
        else:
            rows = self._store.rows(f"where state = {_STATES.index(state)} order by jobs.id limit ?", (limit,))
        return [_job(row) for row in rows]

    def job(self, job_id: int) -> Job | None:
        """Return one job; None if it is done, was purged, or never was."""
        rows = self._store.rows("where jobs.id = ?", (job_id,))
        return _job(rows[0]) if rows else None

    def retry(self, *job_ids: int, every: bool = False) -> int:
        """Make these dead jobs ready again, or *every* one, with all their attempts; return how many were dead."""
        changed = self._store.revive(None if every else job_ids)
        self._look_again()
        return changed

    def purge(self, *job_ids: int, every: bool = False) -> int:
        """Delete these dead jobs, or *every* one; return how many were dead."""
        return self._store.purge(None if every else job_ids)

    def close(self) -> None:
        """Close the file and the event loop of the async jobs; both open again when they are used again."""
        self._store.close()
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def __enter__(self) -> "SqliteQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SqliteQueue({self.path!r})"


def _place_of(fn: object) -> tuple[object, object]:
    return getattr(fn, "__module__", None), getattr(fn, "__qualname__", fn)


def _check_retrying(where: str, retries: object, backoff_s: object) -> None:
    if isinstance(retries, bool) or not isinstance(retries, int) or not 0 <= retries <= 1_000_000:
        raise UsageError(f"{where}: retries={retries!r}: expected how often to try again, like 3, or 0")
    if isinstance(backoff_s, bool) or not isinstance(backoff_s, (int, float)) or not 0 <= backoff_s < math.inf:
        raise UsageError(f"{where}: backoff_s={backoff_s!r}: expected seconds, like 10 or 0.5")


def _check_seconds(where: str, what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UsageError(f"{where}: {what}={value!r}: expected seconds, like 30 or 2.5")


def _to_json(task: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    try:
        for place, value in enumerate(args):
            if value.__class__ not in _PLAIN:
                _check_json(task, f"argument {place + 1}", value)
        for name, value in kwargs.items():
            if value.__class__ not in _PLAIN:
                _check_json(task, name, value)
        payload = _encode((args, kwargs))
    except RecursionError:
        raise UsageError(f"{task}: an argument is nested too deeply, or contains itself") from None
    except ValueError:
        raise UsageError(f"{task}: an argument is or holds nan or inf, which JSON does not know") from None
    if len(payload) > MAX_JOB_BYTES:
        raise UsageError(
            f"{task}: the arguments are {len(payload):,} bytes of JSON, and {MAX_JOB_BYTES:,} are allowed: "
            "put the data into a file or an object store, and its name into the job"
        )
    return payload


def _check_json(task: str, where: str, value: object) -> None:
    """Raise UsageError, with the place and the type but never the value, for what JSON would refuse or silently
    change."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise UsageError(f"{task}: {where} has a key of type {type(key).__name__}; JSON would make it text")
            if item.__class__ not in _PLAIN:
                _check_json(task, f"{where}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            if item.__class__ not in _PLAIN:
                _check_json(task, f"{where}[{place}]", item)
    elif not isinstance(value, (str, int, float)):
        raise UsageError(
            f"{task}: {where} is a {type(value).__name__}, which is not JSON: "
            "pass text, numbers, lists and dicts, like str(uuid), os.fspath(path) or moment.isoformat()"
        )


def _job(row: Any) -> Job:
    job_id, state, task, payload, attempts, max_attempts, enqueued_at, at, error, host, pid = row
    args, kwargs = json.loads(payload)
    owner = None if pid is None else f"pid {pid} on {host}"
    return Job(job_id, _STATES[state], task, args, kwargs, attempts, max_attempts, enqueued_at, at, error, owner)


def _log(level: str, event: str, **fields: object) -> None:
    import logging  # costs a cold start 20 ms, and most runs have nothing to say

    text = " ".join([event, *(f"{name}={value}" for name, value in fields.items())])
    logging.getLogger("waker.queue").log(getattr(logging, level.upper()), "%s", text)
