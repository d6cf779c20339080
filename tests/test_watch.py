"""The watch: level-triggered, patient where waking changes nothing; and how `module:queue` is found."""

import argparse
import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from waker import Backlog, LoadError, Look, NotWoken, UsageError, WakeError, WakeReport, Watch
from waker.load import load
from waker.verbs import watch as verb

NOBODY = NotWoken("nobody there")


class World:
    """A clock, a queue and a waker, all in the test's hands."""

    def __init__(self, *backlogs: Backlog | Exception, error: WakeError | None = None) -> None:
        self.now = 1_000_000.0
        self.backlogs = list(backlogs)
        self.error = error
        self.woken: list[tuple[float, int]] = []

    def probe(self) -> Backlog:
        backlog = self.backlogs.pop(0) if len(self.backlogs) > 1 else self.backlogs[0]
        if isinstance(backlog, Exception):
            raise backlog
        return backlog

    def wake(self, machines: int, *, busy_counts: bool) -> WakeReport:
        assert busy_counts, "a busy machine will read the queue: the watch is no reason to start one beside it"
        self.woken.append((self.now, machines))
        if self.error is not None:
            raise self.error
        return WakeReport("http://w/", machines, (), machines, 1, machines, 0.1, {})

    def watch(self, **settings: int | float) -> Watch:
        return Watch(self.probe, self, now=lambda: self.now, chance=lambda: 0.0, **settings)  # type: ignore[arg-type]

    def wakes_in(self, seconds: float, watch: Watch) -> list[float]:
        """Let *watch* look for so long; the moments of its wakes, from the start."""
        began, self.woken = self.now, []
        while self.now < began + seconds:
            self.now += watch.once().next_s
        return [at - began for at, _ in self.woken]


def test_an_empty_queue_wakes_nobody() -> None:
    world = World(Backlog(0))
    assert world.wakes_in(3_600, world.watch()) == []


def test_a_ready_job_with_no_drainer_is_noticed_within_the_interval() -> None:
    world = World(Backlog(0), Backlog(0), Backlog(1))
    assert world.wakes_in(90, world.watch(interval_s=30))[0] == 60.0


def test_a_due_time_is_met_before_the_interval_is_over() -> None:
    """Delayed jobs and lease ends alike, also while something is in flight and no machine is up (rule 11)."""
    world = World(Backlog(0))
    world.backlogs = [Backlog(0, 1, world.now + 12.5), Backlog(1, 0)]
    assert world.wakes_in(20, world.watch(interval_s=30)) == [12.5]


def test_a_job_that_is_due_wakes_even_if_the_broker_does_not_count_it_as_ready() -> None:
    world = World(Backlog(0))
    world.backlogs = [Backlog(0, 0, world.now - 1)]
    assert world.wakes_in(10, world.watch()) == [0.0]


@pytest.mark.parametrize(
    ("backlog", "settings", "wanted"),
    [
        (Backlog(1), {}, 1),
        (Backlog(500), {}, 1),
        (Backlog(500), {"max_machines": 8}, 8),
        (Backlog(25), {"max_machines": 8, "jobs_per_machine": 10}, 3),
        (Backlog(5, running=20), {"max_machines": 8, "jobs_per_machine": 10}, 3),
        (Backlog(1), {"min_machines": 2, "max_machines": 4}, 2),
    ],
)
def test_machines_follow_the_jobs_within_bounds(backlog: Backlog, settings: dict[str, int], wanted: int) -> None:
    world = World(backlog)
    world.watch(**settings).once()
    assert [machines for _, machines in world.woken] == [wanted]


def test_a_wake_that_changed_nothing_is_repeated_ever_more_rarely() -> None:
    """A minute, doubling to an hour (rule 21)."""
    world = World(Backlog(3))
    moments = world.wakes_in(30_000, world.watch(interval_s=30))
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert gaps == [30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, *[3600.0] * 7]


@pytest.mark.parametrize("change", [Backlog(4), Backlog(2), Backlog(3, running=1)], ids=["more", "fewer", "at work"])
def test_any_change_ends_the_patience(change: Backlog) -> None:
    world = World(Backlog(3))
    watch = world.watch(interval_s=30)
    world.wakes_in(4_000, watch)
    world.backlogs = [change]
    assert world.wakes_in(30, watch) == [0.0]


def test_a_queue_that_was_emptied_is_new_again() -> None:
    world = World(Backlog(3))
    watch = world.watch(interval_s=30)
    world.wakes_in(4_000, watch)
    world.backlogs = [Backlog(0), Backlog(3)]
    assert world.wakes_in(60, watch) == [30.0]


def test_a_wake_that_failed_is_in_the_look_and_the_watch_goes_on() -> None:
    world = World(Backlog(1), error=NOBODY)
    look = world.watch().once()
    assert (look.wanted, look.report, look.error) == (1, None, "nobody there")


def test_a_broker_that_is_down_is_read_again_at_the_next_look() -> None:
    world = World(ConnectionError("refused"), Backlog(1))
    watch = world.watch(interval_s=30)
    look = watch.once()
    assert (look.backlog, look.wanted, look.error) == (None, 0, "ConnectionError: refused")
    world.now += look.next_s
    assert watch.once().wanted == 1


def test_a_restarted_watch_needs_nothing_from_the_one_before() -> None:
    world = World(Backlog(2))
    world.watch().once()
    world.watch().once()
    assert len(world.woken) == 2


def test_run_ends_when_it_is_stopped() -> None:
    world, stop, looks = World(Backlog(0)), threading.Event(), []

    def seen(look: Look) -> None:
        looks.append(look)
        stop.set()

    world.watch().run(stop, seen)
    assert len(looks) == 1


async def test_the_async_variant_takes_either_waker_and_ends_when_it_is_stopped() -> None:
    world, looks = World(Backlog(1)), []

    class Async:
        async def wake(self, machines: int, *, busy_counts: bool) -> WakeReport:
            return world.wake(machines, busy_counts=busy_counts)

    for waker in (world, Async()):
        stop = asyncio.Event()

        def seen(look: Look, stop: asyncio.Event = stop) -> None:
            looks.append(look)
            stop.set()

        await Watch(world.probe, waker).run_async(stop, seen)
    assert [look.report is not None for look in looks] == [True, True]


@pytest.mark.parametrize(
    "settings",
    [{"interval_s": 0}, {"jobs_per_machine": 0}, {"min_machines": 0}, {"min_machines": 3, "max_machines": 2}],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="expected"):
        World(Backlog(0)).watch(**settings)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """An app's folder; what was imported from it is forgotten afterwards."""
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_an_object_is_found_in_the_working_directory(project: Path) -> None:
    (project / "shop_a").mkdir()
    (project / "shop_a" / "tasks.py").write_text("class apps:\n    queue = 42\n")
    assert load("shop_a.tasks:apps.queue", directory=str(project)) == 42


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("shop_b", "expected module:name"),
        ("shop_b:", "expected module:name"),
        (":queue", "expected module:name"),
        ("shop b:queue", "expected module:name"),
        ("shop_c:queue", "there is no module 'shop_c'"),
        ("shop_b.tusks:queue", "there is no module 'shop_b.tusks'"),
        ("shop_b:quue", "shop_b has no 'quue'; it has queue"),
        ("shop_raises:queue", "shop_raises.py:2: ZeroDivisionError: division by zero"),
        ("shop_needs:queue", "shop_needs.py:1: ModuleNotFoundError: No module named 'not_installed_here'"),
        ("shop_syntax:queue", "shop_syntax.py:1: SyntaxError"),
        ("shop_exits:queue", "ended the program"),
    ],
)
def test_what_cannot_be_loaded_says_which_half_failed(spec: str, said: str, project: Path) -> None:
    (project / "shop_b.py").write_text("queue = 1\n")
    (project / "shop_raises.py").write_text("def f(): pass\n1 / 0\n")
    (project / "shop_needs.py").write_text("import not_installed_here\n")
    (project / "shop_syntax.py").write_text("def (:\n")
    (project / "shop_exits.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(LoadError) as caught:
        load(spec, directory=str(project))
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


class Worker(BaseHTTPRequestHandler):
    """Gives a receipt for every wake."""

    def do_GET(self) -> None:
        self.send_response(200)
        for name, value in {"machine": "m1", "boot": "b", "ring": "1", "up": "0"}.items():
            self.send_header(f"wake-{name}", value)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def worker() -> Iterator[str]:
    """The address of a worker that gives receipts."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Worker) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


TASKS = """
from waker import SqliteQueue
queue = SqliteQueue("jobs.db")
@queue.task
def job(): pass
other = object()
"""


def command(*arguments: str) -> list[str]:
    script = "import sys; from waker.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", script, "watch", *arguments]


def test_the_verb_wakes_for_the_embedded_queue(tmp_path: Path, worker: str) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    enqueue = [sys.executable, "-c", "import tasks; tasks.job.enqueue()"]
    subprocess.run(enqueue, cwd=tmp_path, check=True, timeout=60, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    arguments = ("tasks:queue", "--target", worker, "--once", "--json")
    done = subprocess.run(command(*arguments), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    look = json.loads(done.stdout)
    assert (look["backlog"]["ready"], look["wanted"], look["wake"]["distinct"]) == (1, 1, 1)


def test_the_verb_fails_where_nobody_answers(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(TASKS + "job.enqueue()\n")
    environ = os.environ | {"WAKER_TARGET": "127.0.0.1:1", "WAKER_TIMEOUT_S": "0.3"}
    argv = command("tasks:queue", "--once")
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environ, check=False)
    assert done.returncode == 1
    assert "connection refused" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_verb_ends_with_0_on_a_signal(number: signal.Signals, tmp_path: Path, worker: str) -> None:
    (tmp_path / "tasks.py").write_text(TASKS + "queue.backlog()\njob.enqueue()\n")
    argv = command("tasks:queue", "--target", worker)
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert line.startswith("watch.looked ready=1 running=0 due_at=- wanted=1 distinct=1")
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tasks:other", "cannot be watched"),
        ("tasks:nothing", "has no 'nothing'"),
        ("nowhere:q", "no module"),
    ],
)
def test_the_verb_tells_the_three_ways_to_be_wrong_apart(spec: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    argv = command(spec, "--target", "127.0.0.1:1", "--once")
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_every_setting_of_the_verb_reaches_the_watch(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    (project / "shop_d.py").write_text("from waker import SqliteQueue\nqueue = SqliteQueue('jobs.db')\n")
    monkeypatch.chdir(project)
    given: dict[str, object] = {}

    class Spy(Watch):
        def __init__(self, probe: Callable[[], Backlog], waker: object, **settings: object) -> None:
            given.update(settings)
            super().__init__(lambda: Backlog(0), waker, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("waker.watch.Watch", Spy)
    parser = argparse.ArgumentParser()
    verb.arguments(parser)
    argv = "shop_d:queue --target w.flycast --interval 5 --jobs-per-machine 4 --min-machines 2 --max-machines 9 --once"
    assert verb.run(parser.parse_args(argv.split()), {}) == 0
    assert given == {"interval_s": 5.0, "jobs_per_machine": 4, "min_machines": 2, "max_machines": 9}
