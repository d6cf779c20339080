"""The embedded queue's worker in one process: slots, async jobs, time-outs, stopping, leases."""

import asyncio
import contextlib
import functools
import os
import sqlite3
import subprocess
import sys
import threading

import pytest
from harness import PATIENCE_S, until

from waker import QueueError, SqliteQueue, UsageError
from waker.sqlite_queue import JobOverran


@pytest.fixture
def make_queue(tmp_path):
    """`make_queue(concurrency=…)`: any number of queues on one file."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            options = {"durability": "process", "backoff_s": 0, **options}
            return stack.enter_context(SqliteQueue(tmp_path / "jobs.db", **options))

        yield make


@pytest.fixture
def stop():
    return threading.Event()


@contextlib.contextmanager
def working(queue, stop=None):
    """work() in a thread; gives a function that waits for its result, or raises what it raised."""
    outcome = []

    def work():
        try:
            outcome.append(queue.work(stop or threading.Event()))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result():
        thread.join(PATIENCE_S)
        assert outcome, "work() did not return"
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    yield result
    thread.join(PATIENCE_S)


def wait(event):
    assert event.wait(PATIENCE_S), "the event never came"


def test_with_a_concurrency_of_one_sync_jobs_run_in_the_calling_thread(make_queue, stop):
    queue = make_queue()
    threads = []
    where = queue.task(name="where")(lambda: threads.append(threading.current_thread()))
    where.enqueue()
    where.enqueue()
    assert queue.work(stop) == 2
    assert threads == [threading.current_thread()] * 2


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_job_enqueued_by_a_running_job_runs_in_the_same_call(make_queue, stop, concurrency):
    queue = make_queue(concurrency=concurrency)
    seen = []

    @queue.task(name="down")
    def down(number):
        seen.append(number)
        if number:
            down.enqueue(number - 1)

    down.enqueue(20)
    assert queue.work(stop) == 21
    assert sorted(seen) == list(range(21))
    assert queue.work(stop) == 0


def test_up_to_concurrency_jobs_run_at_once_and_never_more(make_queue, stop):
    queue = make_queue(concurrency=3)
    together = threading.Barrier(3, timeout=PATIENCE_S)
    running, most = [], []

    @queue.task(name="meet")
    def meet():
        running.append(1)
        most.append(len(running))
        together.wait()  # passes only in threes
        running.pop()

    for _ in range(9):
        meet.enqueue()
    assert queue.work(stop) == 9
    assert max(most) <= 3
    assert queue.counts() == (0, 0, 0, 0)


def test_a_free_slot_takes_a_job_that_another_process_enqueues_while_one_runs(make_queue, stop):
    queue, app = make_queue(concurrency=2), make_queue()
    came = threading.Event()
    long = queue.task(name="long")(lambda: wait(came))
    queue.task(name="short")(came.set)
    long.enqueue()
    with working(queue) as result:
        until(lambda: app.backlog().running == 1, "the long job runs")
        app.task(name="short")(print).enqueue()
        assert result() == 2


def test_async_jobs_share_one_loop_and_run_beside_each_other(make_queue, stop):
    queue = make_queue(concurrency=2)
    loops = []
    together = asyncio.Barrier(2)

    @queue.task(name="meet")
    async def meet():
        loops.append(asyncio.get_running_loop())
        async with asyncio.timeout(PATIENCE_S):
            await together.wait()  # passes only in pairs

    for _ in range(4):
        meet.enqueue()
    assert queue.work(stop) == 4
    meet.enqueue()
    meet.enqueue()
    assert queue.work(stop) == 2
    assert len(set(loops)) == 1
    assert queue.failed == 0


def test_an_async_function_behind_a_plain_decorator_is_awaited(make_queue, stop):
    queue = make_queue()
    seen = []

    def plain(fn):
        @functools.wraps(fn)
        def wrapper(*args):
            return fn(*args)

        return wrapper

    @queue.task(name="note")
    @plain
    async def note(text):
        await asyncio.sleep(0)
        seen.append(text)

    note.enqueue("done")
    assert queue.work(stop) == 1
    assert seen == ["done"]


def test_an_async_job_past_its_time_is_cancelled_and_has_failed(make_queue, stop):
    queue = make_queue()
    cleaned = []

    @queue.task(name="slow", timeout_s=0.05, retries=1)
    async def slow():
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(1)

    job = slow.enqueue()
    assert queue.work(stop) == 2
    assert cleaned == [1, 1]
    assert queue.job(job).state == "dead"
    assert queue.job(job).error.endswith("ran longer than its timeout_s of 0.05")


def test_a_time_out_of_the_job_s_own_is_not_taken_for_ours(make_queue, stop):
    queue = make_queue()

    @queue.task(name="fetch", timeout_s=PATIENCE_S, retries=0)
    async def fetch():
        raise TimeoutError("the server said nothing")

    job = fetch.enqueue()
    queue.work(stop)
    assert queue.job(job).error.endswith("TimeoutError: the server said nothing")


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_sync_job_past_its_time_is_recorded_and_ends_the_work(make_queue, stop, concurrency):
    """What is behind it stays in the queue; what runs beside it is finished."""
    queue = make_queue(concurrency=concurrency)
    never = threading.Event()
    slow = queue.task(name="slow", timeout_s=0.05, retries=1, backoff_s=60)(never.wait)
    job = slow.enqueue()
    for _ in range(3):
        queue.task(name="slow2", timeout_s=60)(never.wait)
    note = queue.task(name="note")(print)
    note.enqueue_in(0.0)
    if concurrency == 1:
        with pytest.raises(JobOverran, match=r"slow ran longer than its timeout_s of 0.05 and still runs"):
            queue.work(stop)
        assert queue.counts() == (1, 1, 0, 0)
    else:
        with pytest.raises(SqliteQueue.Overran) as caught:
            queue.work(stop)
        assert caught.value.exit_code == 75
        assert queue.counts() == (0, 1, 0, 0)
    assert queue.job(job).error.endswith("timeout_s of 0.05")
    assert queue.failed == 1
    never.set()


def test_a_sync_job_within_its_time_succeeds_or_fails_like_any_other(make_queue, stop):
    queue = make_queue()
    seen = []
    queue.task(name="note", timeout_s=PATIENCE_S)(seen.append).enqueue(1)
    broken = queue.task(name="broken", timeout_s=PATIENCE_S, retries=0)(int).enqueue("x")
    assert queue.work(stop) == 2
    assert seen == [1]
    assert "invalid literal" in queue.job(broken).error


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), GeneratorExit()])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_job_that_ends_itself_oddly_has_failed_and_its_worker_lives(make_queue, stop, error, concurrency):
    queue = make_queue(concurrency=concurrency)

    @queue.task(name="odd", retries=0)
    def odd():
        raise error

    job = odd.enqueue()
    queue.task(name="note")(str).enqueue()
    assert queue.work(stop) == 2
    assert type(error).__name__ in queue.job(job).error


def test_when_told_to_stop_it_finishes_what_runs_and_claims_no_more(make_queue, stop):
    queue = make_queue(concurrency=2)
    started, finish = threading.Semaphore(0), threading.Event()

    @queue.task(name="hold")
    def hold():
        started.release()
        wait(finish)

    for _ in range(5):
        hold.enqueue()
    with working(queue, stop) as result:
        for _ in range(2):
            assert started.acquire(timeout=PATIENCE_S)
        stop.set()
        finish.set()
        assert result() == 2
    assert queue.counts() == (3, 0, 0, 0)
    assert queue.work(stop) == 0


@pytest.mark.parametrize("concurrency", [1, 2])
def test_release_puts_back_what_is_held_as_not_attempted_and_fences_it(make_queue, stop, concurrency, caplog):
    queue, other = make_queue(concurrency=concurrency), make_queue()
    started, finish = threading.Event(), threading.Event()
    seen = []

    @queue.task(name="hold", retries=0)
    def hold():
        started.set()
        wait(finish)

    job = hold.enqueue()
    other.task(name="hold")(lambda: seen.append("again"))
    with working(queue, stop) as result:
        wait(started)
        stop.set()
        assert queue.release() == 1
        assert queue.release() == 0
        assert other.backlog() == (1, 0, None)
        assert other.job(job).attempts == 0
        finish.set()
        assert result() == 1
    assert "job.fenced" in caplog.text
    assert other.work(threading.Event()) == 1
    assert seen == ["again"]


def test_an_interrupted_job_is_put_back_as_not_attempted(make_queue, stop):
    queue = make_queue()

    @queue.task(name="interrupt")
    def interrupt():
        raise KeyboardInterrupt

    job = interrupt.enqueue()
    with pytest.raises(KeyboardInterrupt):
        queue.work(stop)
    assert (queue.job(job).state, queue.job(job).attempts) == ("ready", 0)
    assert queue.release() == 0


@pytest.mark.parametrize("concurrency", [1, 4])
def test_progress_says_how_many_run_and_how_many_are_done(make_queue, stop, concurrency):
    queue = make_queue(concurrency=concurrency)
    note = queue.task(name="note")(str)
    for _ in range(20):
        note.enqueue()
    calls = []
    assert queue.work(stop, lambda running, done: calls.append((running, done))) == 20
    assert calls[0] == (1, 0)
    assert calls[-1] == (0, 20)
    assert [done for _, done in calls] == sorted(done for _, done in calls)
    assert all(0 <= running <= concurrency for running, _ in calls)
    assert {done for _, done in calls} == set(range(21))


def test_a_task_of_a_module_that_nobody_imported_is_found_by_its_name(tmp_path):
    (tmp_path / "app_queue.py").write_text("from waker import SqliteQueue\nqueue = SqliteQueue('jobs.db')\n")
    (tmp_path / "app_tasks.py").write_text(
        "from app_queue import queue\n@queue.task\ndef note(text): print('ran', text)\n"
    )
    run = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=True)
    run([sys.executable, "-c", "import app_tasks; app_tasks.note.enqueue('it')"])
    said = run([sys.executable, "-c", "import app_queue, threading; app_queue.queue.work(threading.Event())"])
    assert said.stdout == "ran it\n"


def test_a_job_whose_task_is_gone_fails_and_says_so(make_queue, stop):
    app, queue = make_queue(), make_queue(retries=0)
    renamed = app.task(name="old-name", retries=0)(print).enqueue()
    moved = app.task(name="no_such_module_here:f", retries=0)(print).enqueue()
    assert queue.work(stop) == 2
    assert "no task is named 'old-name'" in queue.job(renamed).error
    assert "No module named 'no_such_module_here'" in queue.job(moved).error


def test_work_runs_once_at_a_time_in_a_process(make_queue, stop):
    queue = make_queue()
    refused = []

    @queue.task(name="recurse")
    def recurse():
        try:
            queue.work(stop)
        except UsageError as error:
            refused.append(str(error))

    recurse.enqueue()
    queue.work(stop)
    assert "already running" in refused[0]


def test_jobs_whose_worker_died_while_it_ran_them_come_last_and_one_at_a_time(make_queue, stop):
    """One of them may be what killed it: it shall not stand before others, nor take down who is suspected with it."""
    queue = make_queue(concurrency=3)
    lock = threading.Lock()
    running, seen = [], []
    together = threading.Barrier(2, timeout=PATIENCE_S)

    @queue.task(name="note")
    def note(text):
        with lock:
            running.append(text)
            seen.append((text, running.count("suspect")))
        if text == "fresh":
            together.wait()
        with lock:
            running.remove(text)

    suspects = [note.enqueue("suspect") for _ in range(20)]
    with contextlib.closing(sqlite3.connect(queue.path, isolation_level=None)) as db:
        db.execute("update jobs set attempts = 1")
    note.enqueue("fresh")
    note.enqueue("fresh")
    assert queue.work(stop) == 22
    assert [text for text, _ in seen[:2]] == ["fresh", "fresh"]
    assert max(count for _, count in seen) == 1
    assert not any(map(queue.job, suspects))


def test_an_error_text_that_is_no_unicode_is_kept_as_far_as_it_is(make_queue, stop):
    queue = make_queue()

    @queue.task(name="odd", retries=0)
    def odd():
        raise OSError("caf\udce9")

    job = odd.enqueue()
    assert queue.work(stop) == 1
    assert queue.job(job).error.endswith("OSError: caf?")


def _lease_ends(queue):
    with contextlib.closing(sqlite3.connect(queue.path)) as db:
        return [end for (end,) in db.execute("select until from owners")]


def test_a_job_that_outlasts_its_lease_keeps_it(make_queue, stop):
    queue, other = make_queue(lease_s=0.5), make_queue()
    finish = threading.Event()
    job = queue.task(name="hold")(lambda: wait(finish)).enqueue()
    other.task(name="hold")(print)
    with working(queue) as result:
        until(lambda: other.backlog().running, "the job runs")
        (first,) = _lease_ends(queue)
        while _lease_ends(queue)[0] < first + 1.0:
            assert other.work(threading.Event()) == 0
        assert other.backlog().due_at > first
        finish.set()
        assert result() == 1
    assert queue.job(job) is None
    assert _lease_ends(queue) == []


def test_a_worker_that_lost_its_lease_cannot_settle_and_goes_on_under_a_new_one(make_queue, stop, caplog):
    queue = make_queue()
    runs = []

    @queue.task(name="note")
    def note():
        runs.append(1)
        if len(runs) == 1:  # somebody else thinks that we are dead
            with contextlib.closing(sqlite3.connect(queue.path, isolation_level=None)) as db:
                db.executescript("delete from owners; update jobs set state = 0, owner = null")

    job = note.enqueue()
    assert queue.work(stop) == 2
    assert len(runs) == 2
    assert queue.job(job) is None
    assert queue.counts() == (0, 0, 0, 0)
    assert "queue.lease_lost" in caplog.text
    assert f"job.fenced id={job}" in caplog.text


@contextlib.contextmanager
def locked(queue):
    db = sqlite3.connect(queue.path, isolation_level=None, check_same_thread=False)
    db.execute("begin immediate")
    try:
        yield
    finally:
        db.close()


@pytest.mark.parametrize("concurrency", [1, 2])
def test_what_has_been_done_is_not_done_again_because_the_file_was_locked_for_a_moment(make_queue, stop, concurrency):
    queue = make_queue(concurrency=concurrency, busy_timeout_s=0.01)
    runs = []
    lock = contextlib.ExitStack()

    @queue.task(name="note")
    def note():
        runs.append(1)
        lock.enter_context(locked(queue))
        threading.Timer(0.3, lambda: unlock.set()).start()

    unlock = threading.Event()
    note.enqueue()
    with working(queue) as result:
        wait(unlock)
        lock.close()
        if concurrency == 1:
            assert result() == 1
        else:
            # Its other slot met the lock and gave up; the job that had been done was recorded all the same.
            with contextlib.suppress(QueueError):
                result()
    assert runs == [1]
    assert queue.counts() == (0, 0, 0, 0)


@pytest.mark.parametrize("concurrency", [1, 2])
def test_what_could_not_be_recorded_is_put_back_by_the_next_call_and_runs_again(make_queue, stop, concurrency, caplog):
    queue = make_queue(concurrency=concurrency, busy_timeout_s=0.01, lease_s=0.2)
    runs = []
    lock = contextlib.ExitStack()

    @queue.task(name="note", retries=0)
    def note():
        runs.append(1)
        if len(runs) == 1:
            lock.enter_context(locked(queue))

    note.enqueue()
    with pytest.raises(
        QueueError, match=r"kept it locked for longer than 0.01 s; a job that ended was not recorded|no job"
    ):
        queue.work(stop)
    assert "queue.not_released" in caplog.text
    with pytest.raises(QueueError, match="not put back"):
        queue.work(stop)
    lock.close()
    assert queue.work(stop) == 1
    assert runs == [1, 1]
    assert queue.counts() == (0, 0, 0, 0)


def test_async_jobs_and_their_loop_end_with_close(make_queue, stop):
    queue = make_queue()
    ended = []

    @queue.task(name="spawn")
    async def spawn():
        async def background():
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(1)

        spawn.background = asyncio.ensure_future(background())
        await asyncio.sleep(0)

    spawn.enqueue()
    queue.work(stop)
    queue.close()
    assert ended == [1]
    assert not [thread for thread in threading.enumerate() if thread.name == "async-jobs"]
    spawn.enqueue()
    assert queue.work(stop) == 1


def test_a_job_that_forks_and_comes_back_twice_settles_once(tmp_path):
    script = """
import os, sys, threading
from waker import SqliteQueue
queue = SqliteQueue("jobs.db", backoff_s=0)
@queue.task(name="forks")
def forks():
    global child
    child = os.fork()
forks.enqueue()
note = queue.task(name="note")(lambda: os.write(1, b"behind it\\n"))
note.enqueue()
try:
    os.write(1, f"ran {queue.work(threading.Event())}\\n".encode())  # in one piece: both write
except Exception as error:
    os.write(1, f"{type(error).__name__} {error}\\n".encode())
    os._exit(0 if not child else 1)
os.waitpid(child, 0)
print(queue.counts())
"""
    said = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = sorted(said.stdout.splitlines())
    assert lines == [
        "Counts(ready=0, delayed=0, running=0, dead=0)",
        "UsageError a job forked, and its child came back from the job: end the child with os._exit()",
        "behind it",
        "ran 2",
    ], said.stdout + said.stderr
    assert os.listdir(tmp_path)


@pytest.mark.parametrize("kind", ["SystemExit(3)", "KeyboardInterrupt()"])
@pytest.mark.parametrize("word", ["def", "async def"])
def test_a_job_that_wants_to_end_its_worker_has_failed_and_what_is_behind_it_runs(machines, tmp_path, kind, word):
    """Sync and async: `sys.exit()` in a job, or a library that raises KeyboardInterrupt."""
    (tmp_path / "leaver.py").write_text(
        "from waker import SqliteQueue\n"
        "queue = SqliteQueue('jobs.db', durability='process', backoff_s=0)\n"
        f"@queue.task(retries=0)\n{word} leave():\n    raise {kind}\n"
        "@queue.task\ndef behind():\n    print('behind ran', flush=True)\n"
    )
    with SqliteQueue(tmp_path / "jobs.db", durability="process") as queue:
        queue.task(name="leaver:leave", retries=0)(lambda: None).enqueue()
        queue.task(name="leaver:behind")(lambda: None).enqueue()
        machine = machines("leaver:queue")
        assert machine.wait() == 0, machine.text()
        assert "behind ran" in machine.text()
        [dead] = queue.jobs("dead")
        assert dead.task == "leaver:leave"
