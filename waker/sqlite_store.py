"""The embedded queue's file: its tables, its connections, and the few statements that move a job.

One row per job that is not done. A state is one of READY, DELAYED, RUNNING, DEAD; done is no row. The lease belongs to
the worker, not to the job: one row in `owners` per worker at work, renewed as one. A job that is RUNNING names its
owner; an owner's row and its jobs change in one transaction, so a running job always has one. Owner ids are never
used twice, so (owner, attempts) is what fences off a worker that lost its lease: its acknowledgement meets no row.
"""

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from .backlog import Backlog
from .errors import QueueError

__all__ = ["DEAD", "DELAYED", "READY", "RUNNING", "Claim", "Ended", "Owner", "Store", "owner_is_alive"]

READY, DELAYED, RUNNING, DEAD = range(4)

# "wake" in ASCII: what `file` and PRAGMA application_id show, and how a database of somebody else's is told apart.
APPLICATION_ID = 0x77616B65
SCHEMA_VERSION = 1
MIN_SQLITE = (3, 35)  # for RETURNING
WAL_RETRY_S = 0.01
ANY_ATTEMPTS = 1 << 62
ENDED = "ended"

SCHEMA = (
    """
create table jobs (
    id integer primary key,         -- the microsecond of the enqueue, or one more than the greatest id there is
    state integer not null,
    task text not null,
    payload text not null,          -- JSON: [args, kwargs]
    attempts integer not null default 0,
    max_attempts integer not null,
    enqueued_at real not null,
    at real,                        -- DELAYED: when it becomes ready. RUNNING: since when. DEAD: since when
    owner integer,                  -- RUNNING: who runs it
    error text                      -- why the last attempt failed
)""",
    "create index jobs_ready on jobs (attempts, id) where state = 0",
    "create index jobs_delayed on jobs (at) where state = 1",
    "create index jobs_running on jobs (owner) where state = 2",
    "create index jobs_dead on jobs (id) where state = 3",
    """
create table owners (
    id integer primary key autoincrement,
    host text not null, boot text not null, pid_ns text not null, pid integer not null, started text not null,
    lease_s real not null,
    until real not null             -- the end of its lease, unless it is renewed
)""",
    f"pragma application_id = {APPLICATION_ID}",
    f"pragma user_version = {SCHEMA_VERSION}",
)

# A waiting job carries no time, so a clock that is set back delays none. Its id keeps the order of enqueueing, and is
# not used again after the job is done: AUTOINCREMENT would do that too, for one more page written by each enqueue.
INSERT = """
insert into jobs (id, state, task, payload, max_attempts, enqueued_at, at)
values (max(?, 1 + coalesce((select max(id) from jobs), 0)), ?, ?, ?, ?, ?, ?)
"""

# Due ones first, then fresh ones in the order of enqueueing, then those that were running when their worker died: what
# kills a worker shall not stand before what does not. A worker whose owner row is gone claims nothing.
CLAIM = """
update jobs set state = 2, owner = ?, at = ?, attempts = attempts + 1
where id = coalesce(
    (select id from jobs where state = 1 and at <= ? order by at limit 1),
    (select id from jobs where state = 0 and attempts <= ? order by attempts, id limit 1)
) and exists (select 1 from owners where id = ?)
returning id, task, payload, attempts, max_attempts, owner
"""
DONE = "delete from jobs where id = ? and owner = ? and attempts = ?"
FAILED = "update jobs set state = ?, at = ?, error = ?, owner = null where id = ? and owner = ? and attempts = ?"

ENLIST = "insert into owners (host, boot, pid_ns, pid, started, lease_s, until) values (?, ?, ?, ?, ?, ?, ?)"
RENEW = "update owners set until = ? where id = ?"
RESIGN = "delete from owners where id = ?"
# A job put back on purpose has not been attempted.
PUT_BACK = "update jobs set state = 0, owner = null, at = null, attempts = attempts - 1 where state = 2 and owner = ?"
TAKE_BACK = """
update jobs set state = case when attempts < max_attempts then 0 else 3 end,
    at = case when attempts < max_attempts then null else ? end,
    error = ? || ' in attempt ' || attempts || ' of ' || max_attempts, owner = null
where state = 2 and owner = ?
"""
OWNERS = "select id, lease_s, until, host, boot, pid_ns, pid, started from owners"
HELD = """
select count(*), lease_s, until, host, boot, pid_ns, pid, started
from jobs join owners on owners.id = jobs.owner where state = 2 group by owners.id
"""
WAITING = """
select (select count(*) from jobs where state = 0), (select count(*) from jobs where state = 1 and at <= ?),
    (select min(at) from jobs where state = 1 and at > ?)
"""
COUNTS = """
select (select count(*) from jobs where state = 0), (select count(*) from jobs where state = 1),
    (select count(*) from jobs where state = 2), (select count(*) from jobs where state = 3)
"""
LIST = """
select jobs.id, state, task, payload, attempts, max_attempts, enqueued_at, at, error, host, pid
from jobs left join owners on owners.id = jobs.owner
"""

# What SQLite says (its primary result code) → what is wrong and what to do about it.
REASONS = {
    sqlite3.SQLITE_BUSY: "another process has kept it locked for longer than {busy_timeout_s:g} s",
    sqlite3.SQLITE_LOCKED: "another process has kept it locked for longer than {busy_timeout_s:g} s",
    sqlite3.SQLITE_READONLY: "it is read-only: this user must be able to write the file and its folder",
    sqlite3.SQLITE_PERM: "this user may not open it: give it write access to the file and its folder",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: this user must be able to write the file and its folder",
    sqlite3.SQLITE_FULL: "the disk is full: make room",
    sqlite3.SQLITE_IOERR: "the disk refused to read or write: it is full, limited in size, or failing",
    sqlite3.SQLITE_CORRUPT: "it is damaged: move it away, or restore it from a backup",
    sqlite3.SQLITE_NOTADB: "it is not a SQLite database: name another file",
}


class Claim(NamedTuple):
    """A job in the hands of the worker that may run it; *owner* and *attempts* together are the fencing token."""

    id: int
    task: str
    payload: str
    attempts: int
    max_attempts: int
    owner: int


class Ended(NamedTuple):
    """What came of a claim: done if *error* is None, else tried again at *retry_at*, else dead since *ended_at*."""

    claim: Claim
    error: str | None = None
    retry_at: float | None = None
    ended_at: float | None = None


class Turn(NamedTuple):
    """What one transaction of a worker did: *settled* is False if the lease had been lost before."""

    claim: Claim | None
    owner: int | None
    settled: bool


class Owner(NamedTuple):
    """A process, so that another one can tell whether it still lives. *started* guards against a reused pid."""

    host: str
    boot: str
    pid_ns: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> "Owner":
        """This process. Without /proc nobody can tell, and a lease just lasts until its end."""
        pid = os.getpid()
        try:
            with open("/proc/sys/kernel/random/boot_id", "rb") as file:
                boot = file.read().decode().strip()
            pid_ns = os.readlink("/proc/self/ns/pid")
        except OSError:
            boot = pid_ns = ""
        return cls(os.uname().nodename, boot, pid_ns, pid, _start_of(pid) or "")


def owner_is_alive(owner: Owner, me: Owner) -> bool | None:
    """Whether *owner* still runs, as seen by *me*; None if that cannot be told from here."""
    if not me.boot or not owner.boot:
        return None
    if owner.boot != me.boot:
        # An earlier boot of this machine is over; what another machine does is unknown.
        return False if owner.host == me.host else None
    if owner.pid_ns != me.pid_ns:
        return None
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    started = _start_of(owner.pid)
    return None if started is None else started == owner.started


def _start_of(pid: int) -> str | None:
    """When the process started, in ticks since boot; ENDED if it was not reaped yet, None if it is hidden."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the command in brackets, and may hold anything, brackets too.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return ENDED if fields[0] in (b"Z", b"X") else fields[19].decode()


class _Connection(sqlite3.Connection):
    inode: tuple[int, int]


class Store:
    """The file at *path*, made at the first use (or, without *create*, refused if it is missing).

    Usable from any thread and after a fork: each operation borrows a connection that nobody else holds, and a child
    process begins with none. Raises QueueError, which says what is wrong with the file and what has not happened.
    """

    def __init__(
        self, path: str, *, durability: str, busy_timeout_s: float, create: bool, now: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self.create = create
        self._synchronous = {"full": "full", "process": "normal"}[durability]
        self._busy_timeout_s = busy_timeout_s
        self.now = now
        self._pid = os.getpid()
        # Connections that nobody uses now. list.append and list.pop are one step each; no other guard.
        self._idle: list[_Connection] = []
        # Connections of the process that we were forked from: SQLite wants them neither used nor closed here.
        self._inherited: list[list[_Connection]] = []

    def close(self) -> None:
        """Close the connections that are not in use; the next operation opens a new one."""
        if self._pid == os.getpid():
            while self._idle:
                self._idle.pop().close()

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # noqa: S110 - when the interpreter ends, there may be nothing left to do it with
            pass

    # Enqueueing and looking

    def insert(self, task: str, payload: str, delay_s: float, max_attempts: int) -> int:
        """Commit one job and return its id."""
        now = self.now()
        state, at = (DELAYED, now + delay_s) if delay_s > 0 else (READY, None)
        with _Loan(self, "the job was not enqueued") as db:
            row = db.execute(INSERT, (int(now * 1e6), state, task, payload, max_attempts, now, at)).lastrowid
        return row or 0

    def backlog(self) -> Backlog:
        """Read what is ready, what is running, and when the next job becomes ready by itself. Changes nothing."""
        now = self.now()
        with _Loan(self, "its backlog is unknown") as db:
            db.execute("begin")  # one snapshot for both
            ready, due, next_at = db.execute(WAITING, (now, now)).fetchone()
            held = db.execute(HELD).fetchall()
            db.execute("commit")
        ready += due
        running = 0
        times = [next_at] if next_at is not None else []
        me = Owner.current() if held else None
        for count, lease_s, until, *owner in held:
            if me is not None and _why_gone(Owner(*owner), me, lease_s, until, now):
                ready += count
            else:
                running += count
                times.append(until)
        return Backlog(ready, running, min(times, default=None))

    def counts(self) -> Sequence[int]:
        """Return how many jobs are in each state, in the order of their numbers."""
        with _Loan(self, "its jobs are unknown") as db:
            row: tuple[int, ...] = db.execute(COUNTS).fetchone()
        return row

    def rows(self, where: str, values: Sequence[object]) -> list[Any]:
        """Return the jobs that *where* (ours, never a user's text) selects, as LIST names the columns."""
        with _Loan(self, "its jobs are unknown") as db:
            return db.execute(f"{LIST} {where}", values).fetchall()

    def revive(self, ids: Sequence[int] | None) -> int:
        """Make dead jobs ready again with all their attempts; all of them if *ids* is None."""
        return self._dead("update jobs set state = 0, at = null, attempts = 0", ids, "nothing was retried")

    def purge(self, ids: Sequence[int] | None) -> int:
        """Delete dead jobs; all of them if *ids* is None."""
        return self._dead("delete from jobs", ids, "nothing was purged")

    def _dead(self, change: str, ids: Sequence[int] | None, consequence: str) -> int:
        with _Loan(self, consequence) as db:
            if ids is None:
                return db.execute(f"{change} where state = 3").rowcount
            db.execute("begin immediate")
            changed = sum(db.execute(f"{change} where state = 3 and id = ?", (job,)).rowcount for job in ids)
            db.execute("commit")
            return changed

    # A worker's moves

    def turn(self, me: Owner, owner: int | None, lease_s: float, ended: Ended | None, *, suspects: bool) -> Turn:
        """Settle what *ended* and claim the next job for *owner*, in one transaction.

        Without an *owner* a new one is enlisted for *me*, if there is a job to claim. *suspects*: jobs whose worker
        died while it ran them are claimed too, after all others.
        """
        now = self.now()
        with _Loan(self, "a job that ended was not recorded" if ended else "no job was claimed") as db:
            db.execute("begin immediate")
            settled = ended is None or _settle(db, ended)
            claimant = owner
            if claimant is None:
                claimant = db.execute(ENLIST, (*me, lease_s, now + lease_s)).lastrowid
            # fetchall: the statement is over, and the row lock-free, only when its last row has been read.
            rows = db.execute(CLAIM, (claimant, now, now, ANY_ATTEMPTS if suspects else 0, claimant)).fetchall()
            if rows:
                db.execute("commit")
                return Turn(Claim._make(rows[0]), claimant, settled)
            if owner is None:
                db.execute(RESIGN, (claimant,))
            elif not db.execute("select 1 from owners where id = ?", (owner,)).fetchall():
                claimant = None
            # Nothing to write: no reason to wait for the disk.
            db.execute("commit" if ended else "rollback")
            return Turn(None, None if owner is None else claimant, settled)

    def settle(self, ended: Ended) -> bool:
        """Record what came of a claim; False if its lease had been lost, then nothing is changed."""
        with _Loan(self, "a job that ended was not recorded") as db:
            return _settle(db, ended)

    def renew(self, owner: int, lease_s: float) -> bool:
        """Make the lease of *owner* last *lease_s* from now; False if it has been lost."""
        with _Loan(self, "the lease was not renewed") as db:
            return db.execute(RENEW, (self.now() + lease_s, owner)).rowcount == 1

    def resign(self, owner: int) -> int:
        """Put back what *owner* holds, as not attempted, and forget the owner. Returns the number of jobs put back."""
        with _Loan(self, "the jobs held here were not put back") as db:
            db.execute("begin immediate")
            put_back = db.execute(PUT_BACK, (owner,)).rowcount
            db.execute(RESIGN, (owner,))
            db.execute("commit")
            return put_back

    def recover(self, me: Owner) -> int:
        """Take back the jobs of owners that are dead or have let their lease end; return how many there were."""
        now = self.now()
        with _Loan(self, "no dead worker's job was taken back") as db:
            gone = []
            for owner, lease_s, until, *process in db.execute(OWNERS).fetchall():
                them = Owner(*process)
                if why := _why_gone(them, me, lease_s, until, now):
                    gone.append((owner, until, f"its worker (pid {them.pid} on {them.host}) {why}"))
            if not gone:
                return 0
            taken = 0
            db.execute("begin immediate")
            for owner, until, error in gone:
                # It may have renewed its lease since we looked, or somebody else took its jobs back.
                if db.execute("delete from owners where id = ? and until = ?", (owner, until)).rowcount:
                    taken += db.execute(TAKE_BACK, (now, error, owner)).rowcount
            db.execute("commit")
            return taken

    # Connections

    def borrow(self) -> "_Connection":
        """Return a connection that nobody else uses; a loan gives it back."""
        if self._pid != os.getpid():
            self._inherited.append(self._idle)
            self._idle, self._pid = [], os.getpid()
        while self._idle:
            try:
                db = self._idle.pop()
            except IndexError:  # another thread was quicker
                break
            # A file that was deleted or replaced under us would take jobs that no worker ever sees.
            if db.inode == self._inode():
                return db
            db.close()
        return self._open()

    def give_back(self, db: "_Connection") -> None:
        """Keep a connection for the next loan."""
        self._idle.append(db)

    def explain(self, error: sqlite3.Error, consequence: str) -> QueueError:
        """Say what SQLite's *error* means for the user, and what did not happen because of it."""
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        reason = REASONS.get(code, "SQLite refused").format(busy_timeout_s=self._busy_timeout_s)
        return QueueError(f"{self.path}: {reason}; {consequence} ({error})")

    def _inode(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _open(self) -> "_Connection":
        if sqlite3.sqlite_version_info < MIN_SQLITE:
            raise QueueError(f"SQLite {sqlite3.sqlite_version} is too old: 3.35 or newer is needed")
        if not os.path.isdir(os.path.dirname(self.path)):
            raise QueueError(f"{self.path}: its folder does not exist: make it, or name another file")
        if not self.create and not os.path.exists(self.path):
            raise QueueError(f"{self.path}: there is no such file: name the file of an existing queue")
        db = None
        try:
            # Any thread may use it, one at a time: whoever has borrowed it.
            db = sqlite3.connect(
                self.path,
                timeout=self._busy_timeout_s,
                isolation_level=None,
                check_same_thread=False,
                factory=_Connection,
            )
            self._prepare(db)
            db.inode = self._inode() or (0, 0)
            return db
        except BaseException as error:
            if db is not None:
                db.close()
            if isinstance(error, sqlite3.Error):
                raise self.explain(error, "it was not opened") from error
            raise

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute(f"pragma synchronous = {self._synchronous}")
        db.execute("begin")  # one snapshot: somebody else may be making the tables
        schema = self._schema_of(db)
        db.execute("commit")
        if schema is None:
            self._use_wal(db)
            db.execute("begin immediate")
            if self._schema_of(db) is None:  # nobody was quicker
                for statement in SCHEMA:
                    db.execute(statement)
            db.execute("commit")
        elif db.execute("pragma journal_mode").fetchone()[0] != "wal":  # a copy, made with VACUUM INTO or .dump
            self._use_wal(db)

    def _schema_of(self, db: sqlite3.Connection) -> int | None:
        """Return the version of our schema, None if the database is empty; raise if it is somebody else's."""
        (application,) = db.execute("pragma application_id").fetchone()
        (version,) = db.execute("pragma user_version").fetchone()
        if (application, version) == (APPLICATION_ID, SCHEMA_VERSION):
            return SCHEMA_VERSION
        if application == APPLICATION_ID:
            raise QueueError(
                f"{self.path}: its format is {version}, ours is {SCHEMA_VERSION}: use one version everywhere"
            )
        if application or version or db.execute("select 1 from sqlite_master limit 1").fetchone():
            raise QueueError(f"{self.path}: it is a database, but not a queue: name another file")
        return None

    def _use_wal(self, db: sqlite3.Connection) -> None:
        # SQLite does not wait for locks here as it does elsewhere, so we do.
        deadline = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                (mode,) = db.execute("pragma journal_mode = wal").fetchone()
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(WAL_RETRY_S)
        if mode != "wal":
            raise QueueError(f"{self.path}: SQLite cannot share it here (a network mount?): put it on a local disk")


class _Loan:
    """`with _Loan(store, consequence) as db`: one connection for one operation; foreign errors stop here.

    A connection that met any error is closed, which rolls its transaction back; the next loan opens another.
    """

    __slots__ = ("_consequence", "_db", "_store")

    def __init__(self, store: Store, consequence: str) -> None:
        self._store = store
        self._consequence = consequence

    def __enter__(self) -> sqlite3.Connection:
        self._db = self._store.borrow()
        return self._db

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._store.give_back(self._db)
            return
        self._db.close()
        if isinstance(error, sqlite3.Error):
            raise self._store.explain(error, self._consequence) from error


def _settle(db: sqlite3.Connection, ended: Ended) -> bool:
    claim = ended.claim
    token = (claim.id, claim.owner, claim.attempts)
    if ended.error is None:
        return db.execute(DONE, token).rowcount == 1
    state = DEAD if ended.retry_at is None else DELAYED
    at = ended.ended_at if ended.retry_at is None else ended.retry_at
    return db.execute(FAILED, (state, at, ended.error, *token)).rowcount == 1


def _why_gone(owner: Owner, me: Owner, lease_s: float, until: float, now: float) -> str:
    """Say why *owner* holds its jobs no longer; "" if it does, or may."""
    if owner_is_alive(owner, me) is False:
        return "died"
    # A lease that ends too far away was given before the clock was set back; a live owner renews it within a third.
    if not now < until <= now + 2 * lease_s:
        return "did not renew its lease"
    return ""
