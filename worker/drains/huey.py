"""Huey (3.5.4 was read), on Redis and on SQLite: its tasks, executed by as many threads as its consumer would have.

A Huey is drained by one thread, a Consumer object by as many as it has. Huey has no mode that ends, so the threads take
tasks without waiting for one, and a pass is over when none is left and none runs. What else differs from
`huey_consumer`:

- a task that is taken is noted as held, in the same step, until it has run; Huey forgets it, and a kill loses it. What
  a dead drainer held is put back after HELD_S, and what an earlier run of this machine held, at once;
- tasks that are due are moved from the schedule to the queue in one step (Huey takes them out first);
- there are no worker processes or greenlets, and no periodic tasks: nobody is up to see their time.
"""

import itertools
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from ..aside import late
from . import Backlog, Options, Pulse, Refused

__all__ = ["Drain"]

probe = late("waker.queues.huey")

POLL_S = 0.05
PROMOTE_S = 1.0
PROMOTE_MOST = 1_000
# A task that was taken counts as held for so long after the last sign of life.
HELD_S = 30.0
BEAT_S = 5.0


class Taken(NamedTuple):
    """A task that was taken, and under which name it is held."""

    field: Any
    data: bytes


class Drain:
    """Executes the tasks of one Huey."""

    def __init__(self, target: Any, pulse: Pulse, options: Options) -> None:
        self._huey = huey = probe.huey_of(target)
        consumer = target if target is not huey else None
        if consumer is not None and consumer.worker_type != "thread":
            raise Refused(f"its workers are of type {consumer.worker_type!r}, and only 'thread' can be drained")
        if huey.immediate:
            raise Refused("it is immediate: its tasks run in the app and are never enqueued")
        stores: dict[str, Callable[[Any], Any]] = {"redis": _Redis, "sqlite": _Sqlite}
        self._store = stores.get(probe.storage_kind(huey), _Plain)(huey)
        self.broker_errors: tuple[type[BaseException], ...] = self._store.errors
        self._pulse = pulse
        self._workers = pulse.slots = consumer.workers if consumer is not None else 1
        # Owners of this machine have names that begin so, those of its earlier runs too.
        self._ours = f"{options.machine or uuid.uuid4()}."
        self._recovered = False
        self._lock = threading.Lock()
        self._busy = 0  # guarded by _lock: threads that execute a task, or look for one
        self._error: BaseException | None = None  # the first that ends a pass
        huey.storage.blocking = False
        huey.signal("error", "timeout")(self._failed)

    def backlog(self) -> Backlog:
        if not self._recovered:
            self._store.recover(self._ours)
            self._recovered = True
        reading: Backlog = probe.backlog(self._huey)
        return reading

    def work(self, stop: threading.Event) -> int:
        store = self._store
        # A new name for each pass: what is held under the last one is held by nobody.
        store.owner = f"{self._ours}{uuid.uuid4().hex}"
        store.recover(self._ours)
        store.beat()
        store.promote()
        self._error = None
        over = threading.Event()
        threads = [threading.Thread(target=self._run, args=(over,), name=f"huey-{number}", daemon=True)
                   for number in range(self._workers)]  # fmt: skip
        for thread in threads:
            thread.start()
        try:
            self._wait(stop)
        finally:
            over.set()
            for thread in threads:
                while thread.is_alive():
                    thread.join(BEAT_S)
                    self._beat_anyway()
        if self._error is not None:
            raise self._error
        return 0

    def release(self) -> None:
        self._store.put_back(lambda owner, _: owner == self._store.owner)

    def _wait(self, stop: threading.Event) -> None:
        """Until nothing is left, or *stop* is set, or something went wrong."""
        promoted_at = beat_at = time.monotonic()
        while not stop.wait(POLL_S) and self._error is None:
            now = time.monotonic()
            with self._lock:
                idle = not self._busy
            if idle and not self._huey.pending_count():
                return
            if now - promoted_at > PROMOTE_S:
                self._store.promote()
                promoted_at = now
            if now - beat_at > BEAT_S:
                self._store.beat()
                beat_at = now

    def _beat_anyway(self) -> None:
        try:
            self._store.beat()
        except self.broker_errors:
            pass  # the pass is over as soon as the last task has ended

    def _run(self, over: threading.Event) -> None:
        """Take tasks and execute them, on a thread of its own."""
        from huey.consumer import Worker

        worker = Worker(self._huey, over, POLL_S, POLL_S, 1)
        worker.initialize()
        try:
            self._take_tasks(over)
        except Exception as error:
            self._error = self._error or error
        finally:
            worker.shutdown()

    def _take_tasks(self, over: threading.Event) -> None:
        store, taken = self._store, None
        while not over.is_set():
            with self._lock:
                self._busy += 1
            try:
                # The one before is done in the same step. If it is not known to be done, it stays held.
                taken, done = None, taken
                taken = store.take(done)
                if taken is not None:
                    self._execute(taken.data)
            finally:
                with self._lock:
                    self._busy -= 1
            if taken is None:
                over.wait(POLL_S)
        if taken is not None:
            store.done(taken)

    def _execute(self, data: bytes) -> None:
        huey, pulse = self._huey, self._pulse
        try:
            task = huey.deserialize_task(data)
        except Exception as error:
            # Huey drops it, too.
            print(f"a task cannot be read: {error}", file=sys.stderr, flush=True)
            self._failed()
            return
        is_due = huey.ready_to_run(task)
        with self._lock:
            pulse.running += is_due
        try:
            huey.execute(task)
        except self.broker_errors:
            raise
        except Exception:
            import logging

            logging.getLogger("huey.consumer").exception("Unhandled error during execution of task %s.", task.id)
        finally:
            with self._lock:
                pulse.running -= is_due
                pulse.done += is_due

    def _failed(self, *_: Any) -> None:
        with self._lock:
            self._pulse.failed += 1


class _Plain:
    """A storage that is not known here: what is taken is gone from it."""

    errors: tuple[type[BaseException], ...] = ()
    owner = ""

    def __init__(self, huey: Any) -> None:
        self._huey = huey
        self._storage = huey.storage

    def take(self, _done: Taken | None) -> Taken | None:
        """Take a task, and forget the one that is done."""
        data = self._storage.dequeue()
        return None if data is None else Taken(None, data)

    def done(self, taken: Taken) -> None:
        """It has run, and there will be no next one."""

    def beat(self) -> None:
        """Say that the owner lives."""

    def recover(self, ours: str) -> None:
        """Put back what nobody holds any more."""
        now = time.time()
        self.put_back(lambda owner, until: until <= now or (owner.startswith(ours) and owner != self.owner))

    def put_back(self, lost: Callable[[str, float], bool]) -> None:
        """Put back what is held by an owner who is *lost*, by name and last sign of life."""

    def promote(self) -> None:
        """Move tasks that are due from the schedule to the queue."""
        for task in self._huey.read_schedule():
            self._huey.enqueue(task)

    def _now(self) -> Any:
        import datetime as dt

        now = dt.datetime.now(dt.UTC)
        return now.replace(tzinfo=None) if self._huey.utc else now.astimezone().replace(tzinfo=None)


# KEYS: queue, held, alive. ARGV: field that is done or "", owner, number, until.
TAKE = """
if ARGV[1] ~= "" then redis.call("hdel", KEYS[2], ARGV[1]) end
local data, rank = nil, ""
if redis.call("type", KEYS[1])["ok"] == "zset" then
    local popped = redis.call("zpopmin", KEYS[1])
    data, rank = popped[1], popped[2]
else
    data = redis.call("rpop", KEYS[1])
end
if not data then return false end
local field = ARGV[2] .. " " .. ARGV[3] .. " " .. (rank or "")
redis.call("hset", KEYS[2], field, data)
redis.call("hset", KEYS[3], ARGV[2], ARGV[4])
return {field, data}
"""
# KEYS: queue, held. ARGV: field.
PUT_BACK = """
local data = redis.call("hget", KEYS[2], ARGV[1])
if not data then return end
local rank = string.match(ARGV[1], "[^ ]*$")
if rank == "" then redis.call("rpush", KEYS[1], data) else redis.call("zadd", KEYS[1], rank, data) end
redis.call("hdel", KEYS[2], ARGV[1])
"""
# KEYS: queue, schedule. ARGV: task, the same as a member of the queue, its rank or "".
PROMOTE = """
if redis.call("zrem", KEYS[2], ARGV[1]) == 0 then return end
if ARGV[3] == "" then redis.call("lpush", KEYS[1], ARGV[2]) else redis.call("zadd", KEYS[1], ARGV[3], ARGV[2]) end
"""


class _Redis(_Plain):
    """One hash of what is held, one of how long each owner is sure to live."""

    def __init__(self, huey: Any) -> None:
        import redis

        super().__init__(huey)
        self.errors = (redis.ConnectionError, redis.TimeoutError)
        storage = self._storage
        self._conn = storage.conn
        self._queue, self._held = storage.queue_key, probe.held_key(storage)
        self._alive = probe.alive_key(storage)
        self._take, self._put_back, self._promote = map(storage.conn.register_script, (TAKE, PUT_BACK, PROMOTE))
        self._number = itertools.count()

    def take(self, done: Taken | None) -> Taken | None:
        until = time.time() + HELD_S
        found = self._take(
            keys=[self._queue, self._held, self._alive],
            args=[done.field if done else "", self.owner, next(self._number), until],
        )
        # A member of a priority queue begins with the time at which it was enqueued.
        return Taken(found[0], found[1][8:] if self._storage.priority else found[1]) if found else None

    def done(self, taken: Taken) -> None:
        self._conn.hdel(self._held, taken.field)

    def beat(self) -> None:
        self._conn.hset(self._alive, self.owner, time.time() + HELD_S)

    def put_back(self, lost: Callable[[str, float], bool]) -> None:
        fields, alive = self._conn.hkeys(self._held), self._conn.hgetall(self._alive)
        owners = {name: float(until) for name, until in alive.items()}
        for field in fields:
            name = field.split(b" ")[0]
            if lost(name.decode(), owners.get(name, 0)):
                self._put_back(keys=[self._queue, self._held], args=[field])
        if gone := [name for name, until in owners.items() if lost(name.decode(), until)]:
            self._conn.hdel(self._alive, *gone)

    def promote(self) -> None:
        storage = self._storage
        now = storage.convert_ts(self._now())
        for data in self._conn.zrangebyscore(storage.schedule_key, "-inf", now, start=0, num=PROMOTE_MOST):
            member, rank = data, ""
            if storage.priority:
                member = int(time.time() * 1e6).to_bytes(8) + data
                rank = str(-(self._huey.serializer.deserialize(data).priority or 0))
            self._promote(keys=[self._queue, storage.schedule_key], args=[data, member, rank])


CREATE = """
create table if not exists wake_on_request_held (id integer primary key, queue text not null, owner text not null,
    until real not null, data blob not null, priority real not null)
"""


class _Sqlite(_Plain):
    """A table of what is held, in the same file."""

    def __init__(self, huey: Any) -> None:
        import sqlite3

        super().__init__(huey)
        self.errors = (sqlite3.OperationalError,)
        self._made = False

    def _make_table(self) -> None:
        if not self._made:
            self._storage.sql(CREATE)
            self._made = True

    def take(self, done: Taken | None) -> Taken | None:
        self._make_table()
        storage = self._storage
        if done is None and not storage.sql(
            "select 1 from task where queue = ? limit 1", (storage.name,), results=True
        ):
            return None
        with storage.db(commit=True) as ask:
            if done is not None:
                ask.execute("delete from wake_on_request_held where id = ?", (done.field,))
            ask.execute("select id, data, priority from task where queue = ? order by priority desc, id limit 1",
                        (storage.name,))  # fmt: skip
            found = ask.fetchone()
            if found is None:
                return None
            ask.execute("delete from task where id = ?", found[:1])
            ask.execute("insert into wake_on_request_held (queue, owner, until, data, priority) values (?, ?, ?, ?, ?)",
                        (storage.name, self.owner, time.time() + HELD_S, *found[1:]))  # fmt: skip
            return Taken(ask.lastrowid, found[1])

    def done(self, taken: Taken) -> None:
        self._storage.sql("delete from wake_on_request_held where id = ?", (taken.field,), commit=True)

    def beat(self) -> None:
        beat = "update wake_on_request_held set until = ? where owner = ?"
        self._storage.sql(beat, (time.time() + HELD_S, self.owner), commit=True)

    def put_back(self, lost: Callable[[str, float], bool]) -> None:
        self._make_table()
        storage = self._storage
        if not storage.sql("select 1 from wake_on_request_held where queue = ? limit 1", (storage.name,), results=True):
            return
        with storage.db(commit=True) as ask:
            ask.execute(
                "select id, owner, until, data, priority from wake_on_request_held where queue = ?", (storage.name,)
            )
            for number, owner, until, data, priority in ask.fetchall():
                if lost(owner, until):
                    ask.execute(
                        "insert into task (queue, data, priority) values (?, ?, ?)", (storage.name, data, priority)
                    )
                    ask.execute("delete from wake_on_request_held where id = ?", (number,))

    def promote(self) -> None:
        storage, now = self._storage, self._now().timestamp()
        due = "from schedule where queue = ? and timestamp <= ?"
        if not storage.sql(f"select 1 {due} limit 1", (storage.name, now), results=True):
            return
        with storage.db(commit=True) as ask:
            ask.execute(f"select id, data {due} order by timestamp, id limit {PROMOTE_MOST}", (storage.name, now))
            for number, data in ask.fetchall():
                priority = self._huey.serializer.deserialize(data).priority or 0
                ask.execute("insert into task (queue, data, priority) values (?, ?, ?)", (storage.name, data, priority))
                ask.execute("delete from schedule where id = ?", (number,))
