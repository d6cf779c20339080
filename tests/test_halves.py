"""`worker listen` and `worker drain` on their own: the two `processes` of a Machine without supervisor."""

import os
import signal

import pytest
from harness import BIN, ask, free_port, until

from waker import SqliteQueue, Waker
from waker.emulator import Knobs

APP = """
import os, pathlib, time
from waker import SqliteQueue
queue = SqliteQueue("jobs.db", durability="process", backoff_s=0.05)

@queue.task
def note(name):
    with open("log", "a") as log:
        log.write(name + "\\n")

@queue.task(retries=1)
def die_once(name):
    if not os.path.exists("died"):
        open("died", "w").close()
        os._exit(9)
    note(name)
"""


@pytest.fixture
def halves(processes, tmp_path):
    """`halves()` starts both on a port of their own; returns (listener, drainer, port)."""
    (tmp_path / "app.py").write_text(APP)

    def start(*target, **settings):
        port = free_port()
        env = {"WORKER_PORT": str(port), "WORKER_GREET_S": "0", "WORKER_LINGER_S": "0", **settings}
        drainer = processes([f"{BIN}/worker", "drain", *(target or ("app:queue",))], env=env)
        listener = processes([f"{BIN}/worker", "listen"], env=env)
        return listener, drainer, port

    return start


def test_the_two_halves_find_each_other_and_both_leave_with_0(halves, tmp_path):
    """The drainer's socket is derived from the machine; whoever is first waits for the other."""
    queue = SqliteQueue(tmp_path / "jobs.db", durability="process")
    queue.task(name="app:note")(lambda name: None).enqueue("a")
    queue.close()
    listener, drainer, _ = halves()
    assert drainer.wait() == 0
    assert listener.wait() == 0
    assert (tmp_path / "log").read_text() == "a\n"


def test_the_halves_can_be_started_again_by_hand(halves):
    """A door that was left is opened by the next drainer's look."""
    for _ in range(2):
        listener, drainer, _ = halves("--", "sh", "-c", "true")
        assert (drainer.wait(), listener.wait()) == (0, 0)


def test_a_stop_of_both_lets_the_command_finish(halves):
    """The platform sends its signal to every process of the machine; started again by hand afterwards, they work."""
    script = "trap 'echo finished; exit 0' TERM; echo began; while :; do sleep 0.05; done"
    for _ in range(2):
        listener, drainer, port = halves("--", "sh", "-c", script)
        drainer.saw("began")
        listener.saw("drainer.attached")
        for process in (listener, drainer):
            process.signal(signal.SIGINT)
        drainer.saw("finished")
        assert drainer.wait() == 0
        assert listener.wait() == 0
        with pytest.raises(OSError, match="refused"):
            ask(port)


def test_without_its_drainer_the_listener_leaves_with_75(halves):
    """Rule 4: nobody else would notice."""
    listener, drainer, _ = halves("--", "sleep", "60")
    listener.saw("drainer.attached")
    os.kill(drainer.pid, signal.SIGKILL)
    assert listener.wait() == 75


def test_a_drainer_that_never_comes_is_not_waited_for_for_ever(processes):
    """The listener without a parent leaves with 75 after boot_s."""
    env = {"WORKER_PORT": str(free_port()), "WORKER_BOOT_S": "0.2"}
    assert processes([f"{BIN}/worker", "listen"], env=env).wait() == 75


@pytest.mark.parametrize("what_follows", ["restart-machine", "restart-process"])
def test_the_promise_holds_as_far_as_the_platform_restarts(tmp_path, fly_platform, what_follows):
    """What a failing process does in a Machine with two `processes` is undocumented: a knob, in both its kind
    readings.
    """
    (tmp_path / "app.py").write_text(APP)
    queue = SqliteQueue(tmp_path / "jobs.db", durability="process", backoff_s=0.05)
    note = queue.task(name="app:note")(lambda name: None)
    die_once = queue.task(name="app:die_once")(lambda name: None)
    world = fly_platform(
        processes=[[f"{BIN}/worker", "listen"], [f"{BIN}/worker", "drain", "app:queue"]],
        machines=1, knobs=Knobs(time_scale=0.05, process_failure=what_follows), cwd=str(tmp_path),
        env={**os.environ, "WORKER_LINGER_S": "0"},
    )  # fmt: skip
    waker = Waker(world.url, timeout_s=60)
    note.enqueue("a")
    assert waker.wake().distinct == 1
    world.wait_all_stopped(60)
    die_once.enqueue("b")
    note.enqueue("c")
    assert waker.wake().machines
    until(lambda: sorted((tmp_path / "log").read_text().split()) == ["a", "b", "c"], "all jobs ran")
    world.wait_all_stopped(60)
    assert queue.counts() == (0, 0, 0, 0)
    queue.close()
