"""The embedded queue when things go wrong: killed workers, forks, many processes, and files that cannot be used."""

import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest
from harness import until

from waker import QueueError, SqliteQueue

TASKS = """
import os, time
from waker import SqliteQueue

options = {"durability": "process", "backoff_s": 0, **eval(os.environ.get("QUEUE", "{}"))}
queue = SqliteQueue("jobs.db", **options)

@queue.task
def note(text):
    with open("notes", "a") as file:
        file.write(f"{text}\\n")

@queue.task
def hold(text):
    print("holding", text, flush=True)
    while not os.path.exists(f"let-go-{os.getpid()}"):
        time.sleep(0.005)

@queue.task(retries=2)
def die(code):
    print("dying", flush=True)
    os._exit(code)

@queue.task
def chain(number):
    note(number)
    if number:
        chain.enqueue(number - 1)
"""

WORK = "import threading, tasks; print('ran', tasks.queue.work(threading.Event()), flush=True)"


@pytest.fixture
def app(tmp_path, monkeypatch):
    """The queue of `tasks.py` in this process; worker processes import the same file."""
    (tmp_path / "tasks.py").write_text(TASKS)
    monkeypatch.chdir(tmp_path)
    queue = SqliteQueue("jobs.db", durability="process", backoff_s=0)
    names: dict[str, object] = {}
    with contextlib.closing(queue):
        queue.enqueue = lambda name, *args: _task(queue, names, name).enqueue(*args)
        yield queue


def _task(queue, names, name):
    if name not in names:
        names[name] = queue.task(name=f"tasks:{name}", retries={"die": 2}.get(name))(_not_here)
    return names[name]


def _not_here(*_):
    raise AssertionError("runs in a worker process")


@pytest.fixture
def worker(processes, app):
    """`worker()` starts a process that works until nothing is ready."""

    def start(code=WORK, **options):
        env = {"QUEUE": repr(options)} if options else None
        return processes([sys.executable, "-c", code], env=env)

    return start


def notes(tmp_path):
    try:
        return (tmp_path / "notes").read_text().split()
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def database(queue):
    with contextlib.closing(sqlite3.connect(queue.path, isolation_level=None)) as db:
        yield db


# Owners that died


def test_a_killed_worker_s_jobs_are_ready_at_once(app, worker, tmp_path):
    """Its lease would last for 30 s more; but on one host it can be seen that it is dead, even before it is reaped."""
    app.enqueue("hold", "a")
    app.enqueue("note", "b")
    held = worker()
    held.saw("holding a")
    assert app.backlog().ready == 1
    assert app.backlog().running == 1
    assert app.jobs("running")[0].owner == f"pid {held.pid} on {os.uname().nodename}"

    held.signal(signal.SIGKILL)
    until(lambda: app.backlog().running == 0, "the death is seen")
    assert app.backlog() == (2, 0, None)
    again = worker()
    again.saw("holding a")  # after b, because it may be what killed the first one
    assert notes(tmp_path) == ["b"]
    assert app.jobs("running")[0].attempts == 2
    assert f"its worker (pid {held.pid} on" in app.jobs("running")[0].error
    assert "died in attempt 1 of 6" in app.jobs("running")[0].error
    again.end()


def test_a_live_worker_s_job_is_left_alone_and_its_lease_end_is_due(app, worker):
    app.enqueue("hold", "a")
    held = worker()
    held.saw("holding a")
    ready, running, due_at = app.backlog()
    assert (ready, running) == (0, 1)
    assert due_at is not None
    assert app.work(threading.Event()) == 0
    other = worker()
    other.saw("ran 0")
    assert app.jobs("running")[0].owner.startswith(f"pid {held.pid} ")


def test_a_stopped_worker_that_lets_its_lease_end_is_fenced_when_it_goes_on(app, worker, tmp_path):
    app.enqueue("hold", "a")
    held = worker(lease_s=0.3)
    held.saw("holding a")
    held.signal(signal.SIGSTOP)
    until(lambda: app.backlog() == (1, 0, None), "the lease ends")
    again = worker()
    again.saw("holding a")

    held.signal(signal.SIGCONT)
    (tmp_path / f"let-go-{held.pid}").touch()
    assert held.wait() == 0
    held.saw("job.fenced")
    assert app.backlog().running == 1
    (tmp_path / f"let-go-{again.pid}").touch()
    assert again.wait() == 0
    assert app.counts() == (0, 0, 0, 0)


def _owned_by(app, **changes):
    """A job that somebody else runs: an owner like this process, but for *changes*."""
    from waker.sqlite_store import Owner

    app.enqueue("note", "a")
    me = Owner.current()
    turn = app._store.turn(me, None, 30.0, None, suspects=True)
    with database(app) as db:
        for column, value in changes.items():
            db.execute(f"update owners set {column} = ? where id = ?", (value, turn.owner))  # noqa: S608
        return db.execute("select until from owners").fetchone()[0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"started": "1"}, "another process has its pid now"),
        ({"boot": "an-earlier-one"}, "this machine was started again since"),
        ({"until": 1.0, "host": "elsewhere", "boot": "its-own"}, "its lease has ended"),
        ({"until": 1.0}, "it lives, but its lease has ended"),
        ({"until": 9e9, "host": "elsewhere", "boot": "its-own"}, "its lease is from before the clock was set back"),
    ],
)
def test_an_owner_that_is_gone_holds_nothing(app, worker, tmp_path, changes, why):
    _owned_by(app, **changes)
    assert app.backlog() == (1, 0, None), why
    worker().saw("ran 1")
    assert notes(tmp_path) == ["a"]
    with database(app) as db:
        assert db.execute("select count(*) from owners").fetchone() == (0,)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"host": "elsewhere", "boot": "its-own"},
        {"pid_ns": "pid:[1]", "pid": 999_999_999},
        {"boot": ""},
    ],
)
def test_an_owner_that_may_be_alive_keeps_its_job_until_its_lease_ends(app, worker, changes):
    until_at = _owned_by(app, **changes)
    assert app.backlog() == (0, 1, until_at)
    worker().saw("ran 0")
    assert app.counts().running == 1


def test_a_job_that_kills_its_worker_again_and_again_ends_as_dead_and_what_is_behind_it_runs(app, worker, tmp_path):
    poison = app.enqueue("die", 9)
    app.enqueue("note", "behind")
    codes = []
    while app.backlog().ready:
        codes.append(worker().wait())
    assert codes == [9, 9, 9, 0]
    assert notes(tmp_path) == ["behind"]
    dead = app.job(poison)
    assert (dead.state, dead.attempts) == ("dead", 3)
    assert "died in attempt 3 of 3" in dead.error
    assert app.retry(poison) == 1
    assert worker().wait() == 9


def test_a_job_that_overran_its_time_ends_its_process_with_it(app, processes, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import threading\nfrom waker import SqliteQueue\nqueue = SqliteQueue('jobs.db', backoff_s=60)\n"
        "@queue.task(timeout_s=0.05)\ndef slow(): threading.Event().wait()\n"
    )
    code = "import slow, threading; slow.slow.enqueue(); slow.queue.work(threading.Event())"
    process = processes([sys.executable, "-c", code])
    assert process.wait() == 1
    process.saw("JobOverran: slow:slow ran longer than its timeout_s of 0.05 and still runs")
    assert app.counts() == (0, 1, 0, 0)


def test_kill_9_at_any_moment_loses_no_job(app, worker, tmp_path):
    """Workers are killed wherever they happen to be; the last ones find all that is left."""
    numbers = [str(number) for number in range(300)]
    for number in numbers:
        app.enqueue("note", number)
    for round_number in range(8):
        victims = [worker(), worker()]
        until(lambda n=round_number: len(notes(tmp_path)) > n * 30, "some jobs are done")
        for victim in victims:
            victim.signal(signal.SIGKILL)
            victim.wait()
    while app.backlog().ready:
        assert worker().wait() == 0
    assert app.counts() == (0, 0, 0, 0)
    done = notes(tmp_path)
    assert set(done) == set(numbers)
    assert len(done) <= len(numbers) + 16  # a killed worker's last job may have been done, but not yet recorded


def test_an_enqueue_that_returned_survives_kill_9(app, processes):
    code = "import tasks\nwhile True: print(tasks.note.enqueue('x'), flush=True)"
    process = processes([sys.executable, "-c", code])
    until(lambda: len(process.out) > 200, "some jobs are enqueued")
    process.signal(signal.SIGKILL)
    process.wait()
    there = {job.id for job in app.jobs(limit=1_000_000)}
    assert {int(line) for line in process.out} <= there


# Several at once


def test_several_processes_share_one_file_and_each_job_runs_once(app, worker, tmp_path):
    for number in range(200):
        app.enqueue("note", number)
    for _ in range(2):
        app.enqueue("chain", 1000)
    workers = [worker(), worker(), worker(concurrency=3)]
    assert [each.wait() for each in workers] == [0, 0, 0]
    assert app.backlog() == (0, 0, None)
    assert sum(int(each.saw("ran").split()[1]) for each in workers) == 200 + 2 * 1001
    assert sorted(notes(tmp_path)) == sorted(map(str, [*range(200), *range(1001), *range(1001)]))


def test_several_processes_may_make_the_file_at_the_same_time(app, processes):
    code = "import sys, tasks; sys.stdin.read(); [tasks.note.enqueue(n) for n in range(20)]"
    read, write = os.pipe()
    starters = [
        subprocess.Popen([sys.executable, "-c", code], stdin=read, stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    os.close(read)
    os.close(write)
    for starter in starters:
        assert starter.communicate(timeout=60)[1] == ""
        assert starter.returncode == 0
    assert app.counts() == (80, 0, 0, 0)


def test_threads_share_one_queue_from_the_first_moment(tmp_path):
    """Each round makes the file anew, with all threads at once."""
    for number in range(20):
        queue = SqliteQueue(tmp_path / f"{number}.db", durability="process")
        note = queue.task(name="note")(print)
        errors = []

        def enqueue(note=note, errors=errors):
            try:
                for _ in range(25):
                    note.enqueue()
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=enqueue) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert queue.counts().ready == 100
        assert len(queue._store._idle) <= 4
        queue.close()


def test_a_fork_uses_no_connection_of_its_parent(app, processes):
    """As under gunicorn with preload: opened before the fork, used on both sides after it."""
    code = """
import os, threading
import tasks
tasks.note.enqueue("parent")
children = []
for number in range(3):
    child = os.fork()
    if not child:
        inherited = len(tasks.queue._store._idle)
        for _ in range(20):
            tasks.note.enqueue(f"child{number}")
        assert inherited == 1 and len(tasks.queue._store._inherited) == 1
        raise SystemExit(0)  # tears the interpreter down, inherited connections and all
    children.append(child)
for _ in range(20):
    tasks.note.enqueue("parent")
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
assert tasks.queue.counts().ready == 81, tasks.queue.counts()
print("ran", tasks.queue.work(threading.Event()))
"""
    process = processes([sys.executable, "-c", code])
    assert process.wait() == 0, process.text()
    process.saw("ran 81")
    with database(app) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)


# Files that cannot be used


def test_a_locked_file_is_an_error_and_nothing_was_enqueued(app):
    app.enqueue("note", "before")
    impatient = SqliteQueue(app.path, busy_timeout_s=0.05)
    task = impatient.task(name="note")(print)
    with database(app) as db:
        db.execute("begin immediate")
        with pytest.raises(QueueError, match=r"jobs.db: another process has kept it locked for longer than 0.05 s; "):
            task.enqueue()
        with pytest.raises(QueueError, match="no job was claimed"):
            impatient.work(threading.Event())
        assert impatient.backlog().ready == 1  # reading needs no lock
        db.execute("rollback")
    task.enqueue()
    assert impatient.backlog().ready == 2
    impatient.close()


def test_a_full_disk_is_an_error_and_no_job_is_lost(app, processes):
    """The limit stands in for the disk: SQLite is told "no" in the middle of a write."""
    code = """
import sys, resource
import tasks
from waker import QueueError
ids = [tasks.note.enqueue("x" * 1000) for _ in range(20)]
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
try:
    while True: ids.append(tasks.note.enqueue("x" * 1000))
except QueueError as error:
    print(error)
assert [job.id for job in tasks.queue.jobs(limit=1000)] == ids
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
ids.append(tasks.note.enqueue("room again"))
assert [job.id for job in tasks.queue.jobs(limit=1000)] == ids
print("there", len(ids))
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    process = processes([sys.executable, "-c", code])
    assert process.wait() == 0, process.text()
    process.saw("jobs.db: the disk", "the job was not enqueued")
    assert app.counts().ready == int(process.saw("there").split()[1])


def test_a_full_disk_by_sqlite_s_own_word_is_an_error_too(app):
    job = app.enqueue("note", "x")
    db = app._store.borrow()
    db.execute("pragma max_page_count = 1")  # it does not shrink: no page is left
    app._store.give_back(db)
    with pytest.raises(QueueError, match=r"jobs.db: the disk is full: make room; the job was not enqueued"):
        app.enqueue("note", "x" * 100_000)
    assert app.enqueue("note", "a new connection, without the limit") > job


def test_a_read_only_file_is_an_error_that_says_what_to_change(app, processes, tmp_path):
    app.enqueue("note", "a")
    app.close()
    code = """
import os, threading
import tasks
import waker.sqlite_worker  # now: the user below may not be able to read where Python lives
from waker import QueueError
if os.getuid() == 0: os.setuid(65534)  # root may write anything
for use in (lambda: tasks.note.enqueue("b"), lambda: tasks.queue.work(threading.Event())):
    try: use()
    except QueueError as error: print(error)
"""
    # The folder must be passable for anybody, and neither it nor the file writable.
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        os.chmod(folder, 0o755)  # noqa: S103
    os.chmod(app.path, 0o444)
    if os.getuid():
        os.chmod(tmp_path, 0o555)  # noqa: S103
    process = processes([sys.executable, "-B", "-c", code])
    try:
        assert process.wait() == 0, process.text()
    finally:
        os.chmod(tmp_path, 0o755)  # noqa: S103
        os.chmod(app.path, 0o644)
    assert len(process.out) == 2
    process.saw("jobs.db: it ", "this user must be able to write the file and its folder", times=2)
    assert app.counts().ready == 1


def _text_file(path):
    path.write_text("not a database, but long enough that it could be one\n" * 100)


def _other_database(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("create table users (name text)")


def _newer_queue(path):
    with SqliteQueue(path) as queue:
        queue.counts()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("pragma user_version = 99")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_text_file, "it is not a SQLite database: name another file"),
        (_other_database, "it is a database, but not a queue: name another file"),
        (_newer_queue, "its format is 99, ours is 1"),
        (lambda path: path.mkdir(), "it cannot be opened"),
        (lambda path: None, "its folder does not exist: make it, or name another file"),
    ],
)
def test_a_file_that_is_no_queue_of_ours_is_an_error_and_is_not_touched(tmp_path, make, said):
    path = tmp_path / "jobs.db"
    make(path)
    if not path.exists():
        path = tmp_path / "missing" / "jobs.db"
    before = path.read_bytes() if path.is_file() else None
    queue = SqliteQueue(path)
    for use in (queue.task(name="note")(print).enqueue, queue.backlog, lambda: queue.work(threading.Event())):
        with pytest.raises(QueueError, match=said) as caught:
            use()
        assert str(path) in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert not (tmp_path / "missing").exists()


def test_a_damaged_file_is_an_error(app):
    for number in range(500):
        app.enqueue("note", "x" * 500 + str(number))
    app.close()
    with open(app.path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 300_000)
    with pytest.raises(QueueError, match="it is damaged"):
        app.jobs()


def test_a_copy_that_is_not_in_wal_mode_is_put_into_it(app, tmp_path):
    app.enqueue("note", "a")
    with database(app) as db:
        db.execute("vacuum into 'copy.db'")
    with SqliteQueue(tmp_path / "copy.db") as copy:
        assert copy.backlog().ready == 1
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as db:
        assert db.execute("pragma journal_mode").fetchone() == ("wal",)
