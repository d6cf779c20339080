"""What every drain, probe and hook promises, against real servers; drainers are real `worker up` processes."""

import signal
import time
from collections import Counter

import pytest
from harness import Process, running, until
from queues.lab import CHECKOUT, kill_machine

from waker.emulator import Knobs

HOUR_S = 3600
QUICK = Knobs(time_scale=0.05)


def test_an_empty_queue_starts_no_worker(bench):
    """The backlog is probed first."""
    machine = bench.drain()
    machine.saw("drainer.left", "passes=0")


def test_every_job_is_run_once_and_what_is_delayed_is_left_alone(bench, size):
    """Many jobs, a job that enqueues jobs, a chain, a failing job; one drain runs them all and leaves."""
    many, long, _ = size
    bench.producer.enqueue("record", "tomorrow", delay_s=HOUR_S)
    bench.producer.enqueue("fail", "bad")
    bench.producer.enqueue("fan", "fan", 3)
    bench.producer.enqueue("chain", "chain", long)
    bench.producer.enqueue_many("record", range(many))
    before = bench.producer.backlog()
    assert before.ready == many + 3 + (not bench.library.sees_delays), before
    machine = bench.drain()
    expected = [
        *map(str, range(many)),
        "fan",
        *(f"fan.{n}" for n in range(3)),
        *(f"chain.{n + 1}" for n in range(long)),
    ]
    assert Counter(bench.noted("ran")) == Counter(expected)
    assert bench.noted("tried") == ["bad"]
    machine.saw("drainer.left", f"jobs={len(expected) + 1}")
    after = bench.producer.backlog()
    assert (after.ready, after.running) == (0, 0)
    assert after.due_at == pytest.approx(time.time() + HOUR_S, abs=60)
    bench.drain().saw("drainer.left", "jobs=0", "" if not bench.library.sees_delays else "passes=0")


def test_two_drainers_at_once_share_the_jobs(bench, size):
    """Neither waits for the other, and no job is run twice."""
    _, _, some = size
    bench.producer.enqueue_many("record", range(some))
    bench.producer.enqueue("slow", "slow", 0.5)
    bench.producer.enqueue_many("record", range(some, 2 * some))
    machines = [bench.up(), bench.up()]
    assert [machine.wait() for machine in machines] == [0, 0], [machine.text() for machine in machines]
    assert Counter(bench.noted("ran")) == Counter([*map(str, range(2 * some)), "slow"])
    assert bench.producer.backlog() == (0, 0, None)


def test_a_stop_signal_finishes_or_requeues_what_is_running(bench):
    """SIGTERM mid-job: within the deadline, with the rest left where it was, and an exit code that says so."""
    bench.producer.enqueue("slow", "slow", 1)
    machine = bench.up(CONTRACT_SLOTS="1")
    bench.saw("began", "slow")
    machine.signal(signal.SIGTERM)
    bench.producer.enqueue_many("record", range(20))
    code = machine.wait()
    left = bench.producer.backlog()
    # A pool with a free place may have run them all before it heard of the stop.
    assert code == (75 if left.ready else 0), machine.text()
    assert left.running == 0
    bench.drain()
    assert Counter(bench.noted("ran")) == Counter([*map(str, range(20)), "slow"])


@pytest.mark.full
def test_a_job_longer_than_the_stop_deadline_is_begun_again(bench):
    """It is put back in time, or comes back as after a kill."""
    if bench.library.back_s is None and not bench.library.back_here:
        pytest.skip(f"{bench.library.name} loses the job: what is cut off is gone")
    bench.producer.enqueue("hang", "hang")
    machine = bench.up(WORKER_STOP_TIMEOUT_S="3", FLY_MACHINE_ID="m1")
    bench.saw("began", "hang")
    machine.signal(signal.SIGTERM)
    assert machine.wait() != 0, machine.text()
    bench.drain_until(lambda: bench.noted("ran") == ["hang"], "the job ran", FLY_MACHINE_ID="m1")


@pytest.mark.full
def test_a_killed_worker_loses_no_job(bench):
    """SIGKILL mid-job: what waited runs at once, what was running when the library notices, and the probe says when."""
    if bench.library.back_s is None:
        pytest.skip(f"{bench.library.name} loses the job, or brings it back later than a test can wait")
    bench.producer.enqueue("hang", "hang")
    bench.producer.enqueue_many("record", range(5))
    machine = bench.up()
    bench.saw("began", "hang")
    kill_machine(machine)

    def seen():
        left = bench.producer.backlog()
        return left.ready or (left.running and left.due_at)

    until(seen, "somebody will look again", within_s=10)
    bench.drain()
    everything = {"hang", *map(str, range(5))}
    # Every time that the probe names is kept: at some reading the job is ready, and a drain runs it.
    bench.drain_until(lambda: set(bench.noted("ran")) == everything, "all ran", within_s=bench.library.back_s)
    # What had run and was not yet acknowledged may run again.
    assert max(Counter(bench.noted("ran")).values()) <= 2
    assert bench.producer.backlog() == (0, 0, None)


@pytest.mark.full
def test_the_same_machine_takes_its_own_job_back_at_once(bench):
    """Rule 11: what this machine held in an earlier boot is held by nobody."""
    if not bench.library.back_here:
        pytest.skip(f"{bench.library.name} cannot tell which machine held a job")
    bench.producer.enqueue("hang", "hang")
    machine = bench.up(FLY_MACHINE_ID="m1")
    bench.saw("began", "hang")
    kill_machine(machine)
    bench.drain(FLY_MACHINE_ID="m1")
    assert bench.noted("ran") == ["hang"]


@pytest.mark.full
def test_the_watch_brings_a_retry_and_a_delayed_job(bench, fly_platform):
    """Every machine is stopped; a retry with backoff and a delayed job run all the same, when they are due."""
    if bench.library.retries:
        bench.producer.enqueue("flaky", "flaky")
    bench.producer.enqueue("record", "soon", delay_s=3)
    platform = fly_platform(bench.command, machines=1, knobs=QUICK, cwd=f"{CHECKOUT}/tests/queues/apps",
                            env={**bench.env, "WORKER_LINGER_S": "0"})  # fmt: skip
    watch = Process([f"{bench.venv}/bin/waker", "watch", f"{bench.library.app}:target", "--target", platform.url,
                     "--interval", "1"], env=bench.env, cwd=f"{CHECKOUT}/tests/queues/apps")  # fmt: skip
    with running(watch):
        expected = {"flaky", "soon"} if bench.library.retries else {"soon"}
        until(lambda: set(bench.noted("ran")) == expected, "the watch brought both")
        platform.wait_all_stopped(60)
    assert bench.noted("tried") == (["flaky", "flaky"] if bench.library.retries else [])


@pytest.mark.full
def test_a_broker_that_dies_during_a_pass_and_comes_back_costs_no_job(bench):
    """The drainer waits for it, in the process, and goes on."""
    if bench.library.server == "files":
        pytest.skip(f"{bench.library.name} has no server that could die")
    bench.producer.enqueue_many("record", range(300))
    bench.producer.enqueue("slow", "slow", 1.5)
    bench.producer.enqueue_many("record", range(300, 400))
    machine = bench.up(FLY_MACHINE_ID="m1")
    until(lambda: len(bench.noted("ran")) > 50, "the pass is under way")
    bench.server.kill()
    machine.saw("broker.down", within_s=60)
    bench.server.start()
    code = machine.wait(120)
    assert code in (0, 75), machine.text()
    everything = {*map(str, range(400)), "slow"}
    bench.drain_until(lambda: set(bench.noted("ran")) == everything, "all ran", within_s=60, FLY_MACHINE_ID="m1")


def test_a_ring_around_the_last_look_is_kept(bench, moments_s):
    """An accepted wake means that its job is run before the machine ends with 0, whenever it comes."""
    for number, moment_s in enumerate(moments_s):
        bench.producer.enqueue("record", f"first-{number}")
        machine = bench.up()
        bench.saw("ran", f"first-{number}")
        # During the pass, the last reading, the leave, and after it: no wait for something, the moment that is tried.
        time.sleep(moment_s)
        bench.producer.enqueue("record", f"second-{number}")
        try:
            accepted = machine.ask().status == 200
        except OSError:
            accepted = False
        assert machine.wait() == 0, machine.text()
        if accepted:
            assert f"second-{number}" in bench.noted("ran")
        else:
            bench.drain()
    assert len(bench.noted("ran")) == 2 * len(moments_s)


def test_the_hook_nudges_when_the_job_is_in_the_queue(bench, fly_platform):
    """One line in the app: every enqueue is followed by a wake, and a hook that cannot wake breaks nothing."""
    platform = fly_platform(bench.command, machines=1, knobs=QUICK, cwd=f"{CHECKOUT}/tests/queues/apps",
                            env={**bench.env, "WORKER_LINGER_S": "0"})  # fmt: skip
    app = bench.new_producer(WAKER_TARGET=platform.url)
    app.ask(do="hook")
    app.enqueue("record", "nudged")
    bench.saw("ran", "nudged")
    platform.wait_all_stopped(60)
    lost = bench.new_producer(WAKER_TARGET="")
    lost.ask(do="hook")
    lost.enqueue("record", "not nudged")
    assert bench.producer.backlog().ready == 1


def test_one_library_imports_no_other(bench, python_of):
    """Cold start with one drain loads no other library, and neither does its probe."""
    roots = (
        "{'celery','kombu','rq','dramatiq','arq','saq','huey','procrastinate','pgqueuer','taskiq','streaq','django'}"
    )
    loaded = python_of(
        f"import sys; from worker.aside import late; late('worker.drains.{bench.library.extra}');"
        f"late('waker.queues.{bench.library.extra}'); print(sorted({roots} & set(sys.modules)))",
        **{name: value for name, value in bench.env.items() if name.startswith("CONTRACT")},
    )
    assert loaded.strip() == "[]"


@pytest.mark.full
def test_a_thousand_jobs_handed_over_at_random(bench, fly_platform, size):
    """Producers, each enqueue followed by a wake, and two machines that start and leave all the time: none is lost."""
    platform = fly_platform(bench.command, machines=2, knobs=QUICK, cwd=f"{CHECKOUT}/tests/queues/apps",
                            env={**bench.env, "WORKER_LINGER_S": "0", "WORKER_GREET_S": "0.2"})  # fmt: skip
    expected = [f"{who}-{number}" for who in ("a", "b") for number in range(500)]
    apps = [
        Process(
            [f"{bench.venv}/bin/python", "hand_over.py", bench.library.app, who, "500", str(seed)],
            cwd=f"{CHECKOUT}/tests/queues/apps",
            env={**bench.env, "WAKER_TARGET": platform.url},
        )
        for seed, who in enumerate(("a", "b"))
    ]
    try:
        for app in apps:
            assert app.wait(240) == 0, app.text()
    finally:
        for app in apps:
            app.end()
    platform.wait_all_stopped(120)
    ran = Counter(bench.noted("ran"))
    assert ran == Counter(expected), {"lost": set(expected) - set(ran), "again": [n for n, k in ran.items() if k > 1]}
    assert bench.producer.backlog().ready == 0
    starts = sum(event.type == "machine.started" for event in platform.events)
    assert starts > 2 or not bench.library.leaves, "no machine ever left"
