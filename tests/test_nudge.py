"""Nudges: coalesced, owed until they succeed, alive across forks, and flushed at the end of a process."""

import asyncio
import logging
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from waker import AsyncWaker, NotWoken, Unauthorized, Waker, nudge
from waker.nudge import Nudger

PATIENCE_S = 20.0


class Wakes:
    """Stands for the wake: each one is noted as it begins, and ends when it is let through."""

    def __init__(self, *, blocked: bool = False, errors: tuple[Exception, ...] = ()) -> None:
        self.asked: list[int] = []
        self.began = threading.Semaphore(0)
        self.let_through = threading.Semaphore(0 if blocked else 1_000_000)
        self.errors = list(errors)

    def __call__(self, machines: int, timeout_s: float) -> None:
        self.asked.append(machines)
        self.began.release()
        assert self.let_through.acquire(timeout=PATIENCE_S)
        if self.errors:
            raise self.errors.pop(0)

    def wait(self) -> None:
        assert self.began.acquire(timeout=PATIENCE_S)


class Worker(BaseHTTPRequestHandler):
    """Answers each wake with a receipt of a new machine."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Workers)
        server.wakes.append(self.path)
        self.send_response(200)
        for name, value in {"machine": f"m{len(server.wakes)}", "boot": "b", "ring": "1", "up": "0"}.items():
            self.send_header(f"wake-{name}", value)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Workers(ThreadingHTTPServer):
    """A worker app on loopback that notes its wakes."""

    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Worker)
        self.wakes: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def workers() -> Iterator[Workers]:
    """A running worker app."""
    with Workers() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run *script* in a process of its own, to its end."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again at once."""
    monkeypatch.setattr(nudge, "RETRY_S", 0.01)
    monkeypatch.setattr(nudge, "RETRY_MAX_S", 0.02)


def test_ten_thousand_nudges_while_one_wake_is_in_flight_are_one_more_wake() -> None:
    wakes = Wakes(blocked=True)
    nudger = Nudger(wakes, interval_s=0.0)
    nudger.nudge()
    wakes.wait()
    for _ in range(10_000):
        nudger.nudge()
    wakes.let_through.release(100)
    assert nudger.flush(PATIENCE_S)
    assert wakes.asked == [1, 1]


def test_a_nudge_returns_while_the_wake_is_stuck() -> None:
    wakes = Wakes(blocked=True)
    nudger = Nudger(wakes)
    for _ in range(3):
        nudger.nudge()
    wakes.wait()
    nudger.nudge()
    assert not nudger.flush(0.05), "the wake has not ended yet"
    wakes.let_through.release(100)
    assert nudger.flush(PATIENCE_S)


def test_the_wake_that_follows_takes_the_largest_number_asked() -> None:
    wakes = Wakes(blocked=True)
    nudger = Nudger(wakes, interval_s=0.0)
    nudger.nudge()
    wakes.wait()
    for machines in (2, 5, 3, 1):
        nudger.nudge(machines)
    wakes.let_through.release(100)
    assert nudger.flush(PATIENCE_S)
    assert wakes.asked == [1, 5]


def test_every_nudge_is_followed_by_a_wake_that_began_after_it() -> None:
    """Eight threads at random moments; each wake notes what had been committed when it began."""
    committed = 0
    seen = 0
    lock = threading.Lock()

    def wake(machines: int, timeout_s: float) -> None:
        nonlocal seen
        seen = committed
        time.sleep(random.random() * 0.0005)

    nudger = Nudger(wake, interval_s=0.0)

    def produce() -> None:
        nonlocal committed
        for _ in range(100):
            with lock:
                committed += 1
            nudger.nudge()
            time.sleep(random.random() * 0.001)

    for _ in range(3):
        threads = [threading.Thread(target=produce) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert nudger.flush(PATIENCE_S)
        assert seen == committed


def test_there_is_one_wake_per_interval_and_the_one_that_trails() -> None:
    clock = 0.0
    wakes = Wakes()
    nudger = Nudger(wakes, interval_s=3600.0, now=lambda: clock)
    nudger.nudge()
    assert nudger.flush(PATIENCE_S)
    for _ in range(1_000):
        nudger.nudge()
    assert wakes.asked == [1]
    clock += 3600.0
    assert nudger.flush(PATIENCE_S)
    assert wakes.asked == [1, 1]


@pytest.mark.usefixtures("quick_retries")
def test_a_wake_that_failed_stays_owed_and_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    wakes = Wakes(errors=(NotWoken("nobody"), NotWoken("nobody"), OSError("strange")))
    nudger = Nudger(wakes, name="http://w/")
    nudger.nudge(3)
    for _ in range(4):
        wakes.wait()
    assert nudger.flush(PATIENCE_S)
    assert wakes.asked == [3, 3, 3, 3]
    assert "nudge.owed target=http://w/ machines=3 failures=1 error=nobody" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.WARNING, logging.ERROR]


@pytest.mark.usefixtures("quick_retries")
def test_a_refused_token_stays_owed_and_is_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """Rule 20: a rotation that is not through yet must not lose the wake."""
    wakes = Wakes(errors=(Unauthorized("401"),))
    nudger = Nudger(wakes)
    nudger.nudge()
    wakes.wait()
    wakes.wait()
    assert nudger.flush(PATIENCE_S)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_close_drops_what_cannot_be_paid_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    wakes = Wakes(blocked=True, errors=(NotWoken("nobody"),))
    nudger = Nudger(wakes)
    nudger.nudge(2)
    wakes.wait()
    nudger.nudge(4)
    nudger.close(0.05)
    wakes.let_through.release(100)
    assert nudger.flush(PATIENCE_S)
    assert wakes.asked == [2], "neither the failed wake nor the nudge behind it is owed any more"
    assert "nudge.dropped" in caplog.text
    nudger.nudge()
    wakes.wait()
    assert nudger.flush(PATIENCE_S)


@pytest.mark.parametrize("machines", [0, -3, "many", None])
def test_a_nudge_never_raises(machines: object, caplog: pytest.LogCaptureFixture) -> None:
    nudger = Nudger(Wakes())
    nudger.nudge(machines)  # type: ignore[arg-type]
    assert "nudge.failed" in caplog.text
    assert nudger.flush(0.0)


def test_where_no_thread_can_start_the_caller_wakes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    wakes = Wakes(errors=(NotWoken("nobody"),))
    nudger = Nudger(wakes)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    nudger.nudge(2)
    assert wakes.asked == [2], "tried once, and still owed"
    nudger.nudge()
    assert wakes.asked == [2, 2]
    assert nudger.flush(0.0)


def test_a_payer_that_died_does_not_hide_the_nudges_after_it(caplog: pytest.LogCaptureFixture) -> None:
    """In flight means a thread that is alive, never a flag."""
    wakes = Wakes()
    nudger = Nudger(wakes)
    dead = threading.Thread(target=lambda: None)
    dead.start()
    dead.join()
    nudger._payer, nudger._owed, nudger._paying = dead, 1, 1
    nudger.nudge()
    wakes.wait()
    assert nudger.flush(PATIENCE_S)


FORK = """
import os, sys, threading
from waker.nudge import Nudger

sent = []
held = threading.Event()
began = threading.Event()
pid = os.getpid()

def wake(machines, timeout_s):
    sent.append(machines)
    began.set()
    if os.getpid() == pid:
        held.wait(20)

nudger = Nudger(wake, interval_s=0.0)
nudger.nudge()
began.wait(20)
nudger.nudge(7)
if sys.argv[1] == "locked":
    # Another thread holds the lock at the moment of the fork.
    locked = threading.Event()
    def hold():
        with nudger._changed:
            locked.set()
            held.wait(20)
    threading.Thread(target=hold, daemon=True).start()
    locked.wait(20)
child = os.fork()
if child == 0:
    sent.clear()
    for _ in range(5):
        nudger.nudge(2)
    print("child", nudger.flush(20), sent, flush=True)
    os._exit(0)
os.waitpid(child, 0)
held.set()
print("parent", nudger.flush(20), sent, flush=True)
"""


@pytest.mark.parametrize("lock", ["free", "locked"])
def test_a_fork_behind_a_wake_in_flight_sends_its_own_and_only_its_own(lock: str) -> None:
    """Rule 16, gunicorn with preload: 5 of 5 nudges were lost behind a wake that the child does not have."""
    done = run(FORK, lock)
    child, parent = done.stdout.splitlines()
    assert child in ("child True [2]", "child True [2, 2]"), done.stderr
    assert parent == "parent True [1, 7]"


AT_EXIT = """
import atexit, sys
url, way = sys.argv[1:]
if way == "by a handler that runs after the flush":
    atexit.register(lambda: waker.nudge())
from waker import AsyncWaker, Waker
waker = Waker(url)
if way == "by a short script":
    waker.nudge()
if way == "by a handler that runs before the flush":
    atexit.register(waker.nudge)
if way == "by an event loop that was closed":
    import asyncio
    waker = AsyncWaker(url)
    async def main():
        waker.nudge()
    asyncio.run(main())
if way == "by a child of multiprocessing":
    import multiprocessing
    child = multiprocessing.get_context("fork").Process(target=waker.nudge)
    child.start()
    child.join()
if way == "by a fork that ends":
    import os
    child = os.fork()
    if child == 0:
        waker.nudge()
        sys.exit()
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize(
    "way",
    [
        "by a short script",
        "by a handler that runs before the flush",
        "by a handler that runs after the flush",
        "by an event loop that was closed",
        "by a child of multiprocessing",
        "by a fork that ends",
    ],
)
def test_a_nudge_before_the_end_is_sent(way: str, host: str, workers: Workers) -> None:
    """A name is looked up in a thread, as long as one can start: both kinds of address must get through."""
    done = run(AT_EXIT, workers.url.replace("127.0.0.1", host), way)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(workers.wakes) == 1


def test_a_process_ends_though_nobody_answers_and_says_what_it_lost() -> None:
    script = "import sys; from waker import Waker; Waker('127.0.0.1:1', flush_at_exit_s=0.2).nudge(3)"
    done = run(script)
    assert done.returncode == 0
    assert "nudge.lost target=http://127.0.0.1:1/ machines=3" in done.stderr


def test_a_prefork_server_wakes_from_every_child(workers: Workers) -> None:
    """The waker is made, and used, before the fork; then by four children at once."""
    script = """
import os, sys
from waker import Waker
waker = Waker(sys.argv[1], nudge_interval_s=0.0)
waker.nudge()
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        waker.nudge()
        os._exit(0 if waker.flush(20) else 1)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""
    done = run(script, workers.url)
    assert done.stdout == "[0, 0, 0, 0]\n", done.stderr
    assert len(workers.wakes) == 5


def test_a_fork_waits_for_what_a_nudge_imports(workers: Workers) -> None:
    """A child that is forked in the middle of an import would have half of asyncio for ever."""
    script = """
import os, sys, threading, time
importing = threading.Event()

class Slow:
    def find_spec(self, name, path, target=None):
        if name == "asyncio.events":
            importing.set()
            time.sleep(0.5)

sys.meta_path.insert(0, Slow())
from waker import Waker
waker = Waker(sys.argv[1], nudge_interval_s=0.0)
waker.nudge()
importing.wait()
child = os.fork()
if child == 0:
    waker.nudge()
    os._exit(0 if waker.flush(20) else 1)
print(os.waitpid(child, 0)[1])
"""
    done = run(script, workers.url)
    assert done.stdout == "0\n", done.stderr
    assert len(workers.wakes) == 2


def test_in_a_drainer_a_nudge_to_its_own_app_does_nothing(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next reading of the queue sees the job; another app's worker is woken all the same."""
    monkeypatch.setenv("WORKER_DRAINS", f"my-worker {workers.url}")
    own = Waker(workers.url)
    own.nudge()
    assert own.flush(0.0)
    assert workers.wakes == []
    other = Waker(f"{workers.url.replace('127.0.0.1', 'localhost')}/other")
    other.nudge()
    assert other.flush(PATIENCE_S)
    assert workers.wakes == ["/other"]


async def test_the_async_wakers_nudge_never_stops_the_loop(workers: Workers) -> None:
    waker = AsyncWaker(workers.url)
    for _ in range(100):
        waker.nudge()
    assert await asyncio.to_thread(waker.flush, PATIENCE_S)
    assert 1 <= len(workers.wakes) <= 2


def test_a_real_wake_that_fails_is_owed_until_somebody_listens(caplog: pytest.LogCaptureFixture) -> None:
    """The worker app comes up after the nudge: it is woken with no further help."""
    with Workers() as reserved:
        port = reserved.server_port
    waker = Waker(f"127.0.0.1:{port}")
    waker.nudge()
    assert not waker.flush(0.2)

    class Late(Workers):
        def __init__(self) -> None:
            ThreadingHTTPServer.__init__(self, ("127.0.0.1", port), Worker)
            self.wakes = []

    with Late() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        paid = waker.flush(PATIENCE_S)
        server.shutdown()
        thread.join()
    assert paid
    assert len(server.wakes) == 1


def test_the_parents_debt_is_not_the_childs() -> None:
    script = """
import os, threading
from waker import nudge
from waker.nudge import Nudger
nudger = Nudger(lambda machines, timeout_s: None, interval_s=3600.0)
nudger.nudge(); nudger.flush(20)
nudger.nudge(9)
child = os.fork()
if child == 0:
    os._exit(0 if nudger.flush(0.0) and not nudger._owed else 1)
print(os.waitpid(child, 0)[1], nudger._owed, flush=True)
os._exit(0)
"""
    assert run(script).stdout == "0 9\n"
