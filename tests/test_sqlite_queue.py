"""The embedded queue as an app sees it: tasks, enqueueing, delays, failures, and looking at jobs."""

import datetime as dt
import importlib
import logging
import math
import os
import sqlite3
import subprocess
import sys
import threading

import pytest

from waker import QueueError, SqliteQueue, UsageError
from waker.queues import probe_for
from waker.queues.sqlite import nudge_on_enqueue


class Clock:
    """A wall clock that a test sets."""

    def __init__(self, at=1_800_000_000.0):
        self.at = at

    def __call__(self):
        return self.at


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def queue(tmp_path, clock):
    with SqliteQueue(tmp_path / "jobs.db", durability="process", now=clock) as queue:
        yield queue


def drain(queue):
    return queue.work(threading.Event())


def test_a_task_is_still_the_function(queue):
    @queue.task
    def add(a, b=1):
        """Adds."""
        return a + b

    assert add(2, b=3) == 5
    assert add.__doc__ == "Adds."
    assert add.name == f"{__name__}:test_a_task_is_still_the_function.<locals>.add"
    assert queue.counts() == (0, 0, 0, 0)


def test_a_job_runs_with_its_arguments_and_is_gone(queue):
    seen = []

    @queue.task(name="note")
    def note(*args, **kwargs):
        seen.append((args, kwargs))

    job = note.enqueue(1, "two", [3.5, None], flag=True, options={"deep": [{"er": "ü"}]})
    assert queue.job(job).args == [1, "two", [3.5, None]]
    assert drain(queue) == 1
    assert seen == [((1, "two", [3.5, None]), {"flag": True, "options": {"deep": [{"er": "ü"}]}})]
    assert queue.job(job) is None
    assert queue.backlog() == (0, 0, None)


def test_keywords_of_a_task_may_have_any_name(queue):
    seen = {}

    @queue.task(name="note")
    def note(**kwargs):
        seen.update(kwargs)

    note.enqueue(self=1, seconds=2, task=3, args=4)
    note.enqueue_in(0, self=1, seconds=2)
    assert drain(queue) == 2
    assert seen == {"self": 1, "seconds": 2, "task": 3, "args": 4}


def test_jobs_run_in_the_order_of_enqueueing_even_if_the_clock_is_set_back(queue, clock):
    seen = []
    note = queue.task(name="note")(seen.append)
    ids = []
    for number in range(5):
        ids.append(note.enqueue(number))
        clock.at -= 3600
    assert queue.backlog().ready == 5
    assert drain(queue) == 5
    assert seen == [0, 1, 2, 3, 4]
    assert ids == sorted(set(ids))


def test_ids_are_not_used_again_when_the_queue_has_been_empty(queue, clock):
    note = queue.task(name="note")(print)
    first = note.enqueue()
    drain(queue)
    clock.at += 1e-3
    assert note.enqueue() > first


def test_a_function_of_main_is_refused_unless_it_has_a_name(tmp_path):
    script = """
from waker import SqliteQueue, UsageError
queue = SqliteQueue("jobs.db")
def f(): pass
try:
    queue.task(f)
except UsageError as error:
    print(error)
print(queue.task(name="f")(f).name)
"""
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "f is defined in __main__" in said
    assert said.endswith("\nf\n")


def test_two_functions_of_one_name_are_refused_but_a_reloaded_module_is_not(queue, tmp_path, monkeypatch):
    queue.task(name="same")(print)
    with pytest.raises(UsageError, match="two tasks are named 'same'"):
        queue.task(name="same")(len)

    (tmp_path / "reloaded_tasks.py").write_text(
        "from waker import SqliteQueue\nq = globals().get('q') or SqliteQueue('x.db')\n@q.task\ndef f(): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("reloaded_tasks")
    first = module.f
    importlib.reload(module)
    assert module.q.tasks["reloaded_tasks:f"] is module.f is not first


def test_a_generator_function_is_refused(queue):
    def generate():
        yield

    async def agenerate():
        yield

    for function in (generate, agenerate):
        with pytest.raises(UsageError, match="generator function: calling it runs nothing"):
            queue.task(function)


@pytest.mark.parametrize(
    "options",
    [
        {"durability": "none"},
        {"concurrency": 0},
        {"concurrency": True},
        {"concurrency": 10_000},
        {"retries": -1},
        {"retries": 1.5},
        {"backoff_s": -1},
        {"backoff_s": math.nan},
        {"lease_s": 0},
        {"lease_s": "30"},
        {"busy_timeout_s": math.inf},
    ],
)
def test_a_bad_option_is_refused_with_its_name_and_value(tmp_path, options):
    ((name, value),) = options.items()
    with pytest.raises(UsageError, match="expected") as caught:
        SqliteQueue(tmp_path / "jobs.db", **options)
    assert f"{name}={value!r}" in str(caught.value)


@pytest.mark.parametrize("path", ["", ":memory:", "file:jobs.db?mode=ro", b"jobs.db"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(UsageError, match="expected the path of a file"):
        SqliteQueue(path)


def test_a_bad_task_option_is_refused(queue):
    for options in ({"retries": -1}, {"backoff_s": "1"}, {"timeout_s": 0}):
        with pytest.raises(UsageError, match="expected"):
            queue.task(**options)(print)
    with pytest.raises(UsageError, match="expected a function"):
        queue.task("print")


def _itself():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "argument 1 is a datetime, which is not JSON"),
        ({"a": [1, {2}]}, r"argument 1\['a'\]\[1\] is a set"),
        ({"a": {7: "secret"}}, r"argument 1\['a'\] has a key of type int"),
        ([b"bytes"], r"argument 1\[0\] is a bytes"),
        (math.nan, "nan or inf"),
        ([1, -math.inf], "nan or inf"),
        (_itself(), "contains itself"),
        ("x" * 2_000_000, "2,000,0.. bytes of JSON"),
    ],
)
def test_what_is_not_json_is_refused_at_enqueue(queue, value, said):
    """The error names the place and the type, never the value."""
    note = queue.task(name="note")(print)
    with pytest.raises(UsageError, match=said) as caught:
        note.enqueue(value)
    assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match=said.replace("argument 1", "what")):
        note.enqueue(what=value)
    assert queue.counts().ready == 0


def test_a_delayed_job_waits_for_its_time_and_the_backlog_says_when(queue, clock):
    seen = []
    note = queue.task(name="note")(seen.append)
    note.enqueue_in(60, "later")
    note.enqueue_in(30.5, "sooner")
    assert queue.backlog() == (0, 0, clock.at + 30.5)
    assert queue.counts() == (0, 2, 0, 0)
    assert drain(queue) == 0

    clock.at += 31
    assert queue.backlog() == (1, 0, clock.at - 31 + 60)
    note.enqueue("fresh")
    assert drain(queue) == 2
    assert seen == ["sooner", "fresh"]  # what is due comes first: nothing makes it wait for ever

    clock.at += 31
    assert queue.backlog() == (1, 0, None)
    assert drain(queue) == 1


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, "5", True, None])
def test_a_delay_that_is_no_number_of_seconds_is_refused(queue, seconds):
    note = queue.task(name="note")(print)
    with pytest.raises(UsageError, match="expected seconds from now"):
        note.enqueue_in(seconds)


def test_a_job_that_raises_is_tried_again_later_and_later_and_then_kept_as_dead(queue, clock, caplog):
    @queue.task(name="burst", retries=3, backoff_s=10)
    def burst(what):
        raise ValueError(f"no {what}")

    job = burst.enqueue("luck")
    waits = []
    for attempt in (1, 2, 3):
        assert drain(queue) == 1
        seen = queue.job(job)
        assert (seen.state, seen.attempts) == ("delayed", attempt)
        assert queue.backlog() == (0, 0, seen.at)
        waits.append(seen.at - clock.at)
        clock.at = seen.at
    assert [round(wait / 10) for wait in waits] in ([1, 2, 4], [1, 2, 3], [1, 2, 5])  # doubling, with jitter

    assert drain(queue) == 1
    dead = queue.job(job)
    assert (dead.state, dead.attempts, dead.max_attempts, dead.at) == ("dead", 4, 4, clock.at)
    assert dead.error.endswith("ValueError: no luck")
    assert __file__ in dead.error
    assert "sqlite_worker" not in dead.error  # the user's frames, not ours
    assert queue.failed == 4
    assert queue.backlog() == (0, 0, None)
    assert "job.failed" in caplog.text
    assert "attempt=4/4 dead=yes" in caplog.text


def test_dead_jobs_can_be_retried_and_purged(queue):
    broken = True

    @queue.task(name="fragile", retries=0)
    def fragile(number):
        if broken:
            raise RuntimeError(number)

    ids = [fragile.enqueue(number) for number in range(4)]
    healthy = queue.task(name="healthy")(print).enqueue_in(60)
    drain(queue)
    assert [job.id for job in queue.jobs("dead")] == ids
    assert queue.counts() == (0, 1, 0, 4)

    broken = False
    assert queue.retry(ids[0], healthy, 12345) == 1
    assert queue.job(ids[0])[:2] == (ids[0], "ready")
    assert queue.purge(ids[1], healthy) == 1
    assert queue.job(ids[1]) is None
    assert queue.retry() == queue.purge() == 0
    assert queue.retry(every=True) == 2
    assert drain(queue) == 3
    assert queue.purge(every=True) == 0
    assert queue.counts() == (0, 1, 0, 0)
    assert queue.failed == 4


def test_jobs_are_listed_by_state_the_oldest_first(queue, clock):
    note = queue.task(name="note")(print)
    ids = [note.enqueue(n) for n in range(3)]
    later = note.enqueue_in(5, "later")
    assert [job.id for job in queue.jobs()] == [*ids, later]
    assert [job.id for job in queue.jobs(limit=2)] == ids[:2]
    assert [job.id for job in queue.jobs("delayed")] == [later]
    job = queue.job(later)
    assert (job.task, job.args, job.kwargs, job.at, job.owner) == ("note", ["later"], {}, clock.at + 5, None)
    with pytest.raises(UsageError, match="expected one of ready, delayed, running, dead"):
        queue.jobs("lost")


def test_a_relative_path_is_made_absolute_where_the_queue_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    queue = SqliteQueue("jobs.db")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    queue.task(name="note")(print).enqueue()
    queue.close()
    assert queue.path == str(tmp_path / "jobs.db")
    assert (tmp_path / "jobs.db").exists()
    assert not any(elsewhere.iterdir())


def test_making_a_queue_opens_nothing_and_without_create_nothing_is_made(tmp_path):
    SqliteQueue(tmp_path / "jobs.db")
    looking = SqliteQueue(tmp_path / "jobs.db", create=False)
    with pytest.raises(QueueError, match="there is no such file"):
        looking.backlog()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("durability", "synchronous"), [("full", 2), ("process", 1)])
def test_durability_is_what_sqlite_calls_it(tmp_path, durability, synchronous):
    with SqliteQueue(tmp_path / "jobs.db", durability=durability) as queue:
        db = queue._store.borrow()
        assert db.execute("pragma synchronous").fetchone() == (synchronous,)
        assert db.execute("pragma journal_mode").fetchone() == ("wal",)
        queue._store.give_back(db)


def test_a_file_that_was_deleted_or_replaced_is_not_written_to_any_more(queue, tmp_path):
    note = queue.task(name="note")(print)
    note.enqueue("old")
    for name in os.listdir(tmp_path):
        os.unlink(tmp_path / name)
    note.enqueue("new")
    with SqliteQueue(queue.path) as other:
        assert [job.args for job in other.jobs()] == [["new"]]


def test_callbacks_run_after_the_commit_and_only_for_jobs_that_are_ready(queue):
    seen = []

    def callback():
        with SqliteQueue(queue.path, create=False) as other:
            seen.append(other.backlog().ready)

    queue.after_enqueue(callback)
    note = queue.task(name="note")(print)
    note.enqueue()
    note.enqueue_in(60)
    note.enqueue_in(0)
    assert seen == [1, 2]
    with pytest.raises(UsageError):
        note.enqueue(object())
    assert seen == [1, 2]


def test_a_callback_that_raises_does_not_fail_the_enqueue(queue, caplog):
    def broken():
        raise OSError("no route")

    queue.after_enqueue(broken)
    with caplog.at_level(logging.ERROR):
        queue.task(name="note")(print).enqueue()
    assert queue.backlog().ready == 1
    assert "enqueue.callback_failed" in caplog.text
    assert "OSError: no route" in caplog.text


def test_an_enqueue_nudges_the_waker(queue):
    class Waker:
        nudges = 0

        def nudge(self):
            self.nudges += 1

    waker = Waker()
    nudge_on_enqueue(queue, waker)
    note = queue.task(name="note")(print)
    note.enqueue()
    note.enqueue_in(60)
    assert waker.nudges == 1


def test_a_waker_from_an_environment_that_has_none_is_an_error_in_the_log_and_the_job_is_there(queue, caplog):
    nudge_on_enqueue(queue)
    queue.task(name="note")(print).enqueue()
    assert "WAKER_TARGET" in caplog.text
    assert queue.backlog().ready == 1


def test_the_watch_finds_the_probe_of_a_queue_or_of_its_subclass(queue):
    class Mine(SqliteQueue):
        pass

    queue.task(name="note")(print).enqueue()
    assert probe_for(queue)() == (1, 0, None)
    assert probe_for(Mine(queue.path))() == (1, 0, None)
    with pytest.raises(UsageError, match=r"builtins\.dict.*waker\.sqlite_queue\.SqliteQueue"):
        probe_for({})


def test_the_queue_and_its_worker_import_nothing_that_a_cold_start_would_feel(tmp_path):
    script = """
import sys, threading
from waker import SqliteQueue
queue = SqliteQueue("jobs.db")
task = queue.task(name="note")(print)
task.enqueue("ran")
assert queue.work(threading.Event()) == 1
costly = {"asyncio", "dataclasses", "httpx", "inspect", "logging", "random", "socket", "traceback"}
print(sorted(costly & set(sys.modules)))
"""
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert said == "ran\n[]\n"


def test_every_state_has_an_index_so_that_a_long_queue_is_no_slow_one(queue):
    """Without them a claim, or a reading of the backlog, would look at each of a million delayed or dead jobs."""
    queue.counts()
    from waker import sqlite_store

    db = sqlite3.connect(queue.path)
    statements = {
        sqlite_store.CLAIM: (1, 0.0, 0.0, 0, 1),
        sqlite_store.WAITING: (0.0, 0.0),
        sqlite_store.HELD: (),
        sqlite_store.COUNTS: (),
        sqlite_store.TAKE_BACK: (0.0, "", 1),
        sqlite_store.PUT_BACK: (1,),
    }
    for statement, values in statements.items():
        plan = [row[3] for row in db.execute(f"explain query plan {statement}", values)]
        assert any("USING" in line for line in plan), plan
        assert not [line for line in plan if line.startswith("SCAN jobs") and "USING" not in line], plan
    db.close()
