"""The whole loop on real processes: waker, local platform, `worker up`, the embedded queue."""

import os
import random
import signal
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import BIN, session_pids, until

from waker import SqliteQueue, Waker
from waker.emulator import Knobs

# The platform's own delays, a twentieth of what they are.
QUICK = Knobs(time_scale=0.05)

APP = """
    import os, pathlib, time
    from waker import SqliteQueue

    HERE = pathlib.Path(os.environ["APP_FOLDER"])
    queue = SqliteQueue(HERE / "jobs.db", durability="process", backoff_s=0.05)

    def note(what):
        with open(HERE / "log", "a") as log:
            log.write(f"{what}\\n")

    @queue.task
    def job(name):
        note(f"ran {name}")

    @queue.task
    def parent(name, children):
        note(f"ran {name}")
        for child in range(children):
            job.enqueue(f"{name}.{child}")

    @queue.task
    def slow(name, seconds):
        note(f"began {name}")
        time.sleep(seconds)
        note(f"ran {name}")

    @queue.task
    def until_file(name):
        note(f"began {name}")
        while not (HERE / name).exists():
            time.sleep(0.005)
        note(f"ran {name}")

    @queue.task(retries=2)
    def poison(name):
        note(f"began {name}")
        os._exit(9)
"""


class App:
    """The user's app: its folder, its queue, and what its jobs wrote down."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "app.py").write_text(textwrap.dedent(APP))
        self.queue = SqliteQueue(folder / "jobs.db", durability="process", backoff_s=0.05)
        self.tasks = {}

    def enqueue(self, task, *args):
        """As the app would, with the task's name instead of its module."""
        if task not in self.tasks:
            retries = 2 if task == "poison" else 5
            self.tasks[task] = self.queue.task(name=f"app:{task}", retries=retries)(_never)
        return self.tasks[task].enqueue(*args)

    def noted(self, what):
        log = self.folder / "log"
        return (
            [line.split()[1] for line in log.read_text().splitlines() if line.startswith(what)] if log.exists() else []
        )


def _never(*_args):
    raise AssertionError("jobs run in the workers")


@pytest.fixture
def app(tmp_path):
    app = App(tmp_path)
    yield app
    app.queue.close()


@pytest.fixture
def platform(app, fly_platform):
    """`platform(**options)` starts one whose machines drain the app's queue."""

    def start(*arguments, machines=1, env=None, knobs=QUICK, **options):
        settings = {"WORKER_LINGER_S": "0", "APP_FOLDER": str(app.folder), **(env or {})}
        return fly_platform([f"{BIN}/worker", "up", *(arguments or ("app:queue",))], machines=machines, knobs=knobs,
                            env={**os.environ, **settings}, cwd=str(app.folder), **options)  # fmt: skip

    return start


def _empty(app):
    counts = app.queue.counts()
    return (counts.ready, counts.delayed, counts.running) == (0, 0, 0)


def test_a_wake_drains_the_queue_and_the_machine_stops_with_0(app, platform):
    """The main job."""
    world = platform()
    for number in range(20):
        app.enqueue("job", str(number))
    report = Waker(world.url).wake()
    assert (report.distinct, report.cold) == (1, 1)
    world.wait_all_stopped(60)
    assert sorted(app.noted("ran"), key=int) == [str(number) for number in range(20)]
    assert [machine.exit_code for machine in world.machines] == [0]
    assert _empty(app)


@pytest.mark.parametrize("reading", ["above", "at-or-above"])
def test_three_machines_are_woken_under_both_readings_of_soft_limit(app, platform, reading):
    """The report is right, and so is the number of machines that were started."""
    world = platform(machines=4, knobs=Knobs(time_scale=0.05, soft_limit_reading=reading))
    for number in range(30):
        app.enqueue("slow", str(number), 0.05)
    report = Waker(world.url).wake(machines=3)
    assert (report.distinct, report.missing) == (3, 0)
    world.wait_all_stopped(60)
    assert sum(machine.exit_code is not None for machine in world.machines) == 3
    assert len(app.noted("ran")) == 30


def test_a_wake_on_an_empty_queue_is_answered_by_the_machine_that_it_started_every_time(app, platform):
    """Linger and hold 0, machine cold; and the machine then leaves with 0. `make soak` does it hundreds of times."""
    world = platform(env={"WORKER_HOLD_S": "0"})
    waker = Waker(world.url)
    starts = int(os.environ.get("SOAK_STARTS", "15"))
    for start in range(starts):
        report = waker.wake()
        assert report.distinct == 1
        assert report.cold == 1
        world.wait_all_stopped(60)
        assert [machine.exit_code for machine in world.machines] == [0]
        runs = [event for event in world.events if event.type == "machine.started"]
        assert len(runs) == start + 1


@pytest.mark.parametrize("victim", ["all", "parent", "listener", "drainer"])
def test_killed_at_any_moment_everything_is_done_after_the_next_wake(app, platform, victim):
    """kill -9 on the whole tree and on each process alone, at random moments of a run with work in it."""
    rng = random.Random(victim)
    world = platform()
    waker = Waker(world.url, timeout_s=60)
    for round_ in range(4):
        for number in range(10):
            app.enqueue("slow", f"{round_}.{number}", 0.01)
        waker.wake()
        pause = rng.uniform(0, 0.4)
        until(lambda: session_pids(_main_pid(world)) or _stopped(world), "the machine runs")
        time.sleep(pause)  # not a synchronisation: any moment is right
        _kill(world, victim)
    waker.wake()
    world.wait_all_stopped(60)
    until(lambda: _settled(world, app, waker), "everything is done")
    expected = {f"{round_}.{number}" for round_ in range(4) for number in range(10)}
    assert set(app.noted("ran")) == expected
    assert app.queue.counts().dead == 0


def _main_pid(world):
    return (world.machines[0].pids or (0,))[0]


def _stopped(world):
    return all(machine.state == "stopped" for machine in world.machines)


def _settled(world, app, waker):
    """After a kill the restart that a non-zero exit brings, or the next wake, does the rest."""
    if _stopped(world) and not _empty(app):
        waker.wake()
    return _stopped(world) and _empty(app)


def _kill(world, victim):
    main = _main_pid(world)
    words = {"listener": "listen", "drainer": "drain"}.get(victim)
    for pid in _tree(main):
        line = _cmdline(pid)
        if victim == "all" or (victim == "parent" and pid == main) or (words and words in line[:4]):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _tree(root):
    """A process and everything below it."""
    children = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                    parent = int(file.read().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        if pid:
            found.append(pid)
            todo += children.get(pid, [])
    return found


def _cmdline(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().decode(errors="replace").split("\0")
    except OSError:
        return []


def test_a_job_that_kills_its_worker_ends_as_dead_and_what_is_behind_it_runs(app, platform):
    """Non-zero exits bring restarts; each claim was an attempt."""
    world = platform()
    app.enqueue("poison", "p")
    app.enqueue("job", "behind")
    waker = Waker(world.url, timeout_s=60)
    waker.wake()
    until(lambda: _settled(world, app, waker), "everything is done")
    assert app.noted("began") == ["p"] * 3
    assert app.noted("ran") == ["behind"]
    [dead] = app.queue.jobs("dead")
    assert dead.attempts == 3
    assert 9 in [event.fields.get("exit_code") for event in world.events if event.type == "machine.restarting"]


def test_a_stop_signal_lets_a_short_job_finish(app, platform):
    """And the machine leaves with 0, because the queue is empty."""
    world = platform()
    app.enqueue("slow", "short", 0.5)
    Waker(world.url).wake()
    until(lambda: app.noted("began"), "the job runs")
    world.stop_machine(world.machines[0].id)
    world.wait_all_stopped(60)
    assert app.noted("ran") == ["short"]
    assert [machine.exit_code for machine in world.machines] == [0]


def test_a_long_job_goes_back_on_a_stop_and_another_machine_takes_the_baton(app, platform):
    """Released, not counted as an attempt; the baton starts the other machine, and the first one leaves with 0."""
    world = platform(machines=2)
    app.enqueue("until_file", "go")
    Waker(world.url).wake()
    until(lambda: app.noted("began"), "the job runs")
    first = next(machine for machine in world.machines if machine.state == "started")
    world.stop_machine(first.id)
    until(lambda: len(app.noted("began")) == 2, "the job runs again")
    (app.folder / "go").touch()
    world.wait_all_stopped(60)
    assert app.noted("ran") == ["go"]
    assert _empty(app)
    assert {machine.exit_code for machine in world.machines} == {0}


def test_with_the_baton_off_jobs_left_are_said_by_the_exit_code(app, platform):
    """For operators who mean to stop everything."""
    world = platform(machines=2, env={"WORKER_BATON": "off"})
    app.enqueue("until_file", "go")
    Waker(world.url).wake()
    until(lambda: app.noted("began"), "the job runs")
    first = next(machine for machine in world.machines if machine.state == "started")
    world.stop_machine(first.id)
    world.wait_all_stopped(60)
    assert app.queue.counts().ready == 1
    assert sorted(machine.exit_code for machine in world.machines if machine.exit_code is not None) == [75]


def test_the_watch_wakes_for_a_job_that_nobody_rang_for(app, platform, processes):
    """The promise has two sentences: a producer that died between enqueue and nudge loses nothing but time."""
    world = platform()
    app.enqueue("job", "forgotten")
    watch = processes([f"{BIN}/waker", "watch", "app:queue", "--target", world.url, "--interval", "0.2"],
                      cwd=str(app.folder), env={"APP_FOLDER": str(app.folder)})  # fmt: skip
    until(lambda: app.noted("ran"), "the watch brought a machine")
    world.wait_all_stopped(60)
    watch.signal(signal.SIGTERM)
    assert watch.wait() == 0


def test_the_race_at_the_end_of_a_drain_loses_nothing(tmp_path, fly_platform):
    """Hundreds of randomized rounds: several jobs each, some of which enqueue jobs, two drainers on one file, the
    listener killed in some; each round's wake lands anywhere around the end of the round before.

    Several platforms at once, because most of a round is waiting for machines. `make soak` does thousands.
    """
    seed, rounds = int(os.environ.get("SOAK_SEED", "1")), int(os.environ.get("SOAK_ROUNDS", "200"))
    platforms = 4

    def race(index):
        folder = tmp_path / str(index)
        folder.mkdir()
        app = App(folder)
        settings = {"WORKER_LINGER_S": "0", "APP_FOLDER": str(folder)}
        world = fly_platform([f"{BIN}/worker", "up", "app:queue"], machines=2, knobs=QUICK, seed=seed + index,
                             env={**os.environ, **settings}, cwd=str(folder))  # fmt: skip
        try:
            _race(app, world, random.Random(seed + index), rounds // platforms)
        finally:
            app.queue.close()

    with ThreadPoolExecutor(platforms) as pool:
        list(pool.map(race, range(platforms)))


def _race(app, world, rng, rounds):
    waker = Waker(world.url, timeout_s=60)
    expected = set()
    for number in range(rounds):
        for index in range(rng.randint(1, 4)):
            name = f"{number}.{index}"
            children = rng.choice((0, 0, 2))
            app.enqueue("parent", name, children)
            expected |= {name, *(f"{name}.{child}" for child in range(children))}
        report = waker.wake(machines=rng.choice((1, 1, 1, 2)))
        assert report.machines
        if rng.random() < 0.1:
            _kill_a_listener(world, rng)
        # The next round begins anywhere between now and well after the machine has left.
        time.sleep(rng.choice((0, rng.uniform(0, 0.02), rng.uniform(0, 0.3))))
    # No wake from here on: whatever was answered 200 has to be kept without further help.
    world.wait_all_stopped(120)
    assert set(app.noted("ran")) == expected
    assert _empty(app)
    assert {machine.exit_code for machine in world.machines} <= {0}


def _kill_a_listener(world, rng):
    listeners = [
        pid
        for machine in world.machines
        for pid in _tree(machine.pids[0] if machine.pids else 0)
        if "listen" in _cmdline(pid)[:4]
    ]
    if listeners:
        try:
            os.kill(rng.choice(listeners), signal.SIGKILL)
        except ProcessLookupError:
            pass
