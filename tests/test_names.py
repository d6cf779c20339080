"""Users have a worker.py, a worker/ and a waker.py of their own: each gets its own, and the commands reach ours."""

import json
import os
import subprocess
import sys

import pytest
from harness import BIN, free_port

# The queue's module: imports the user's `worker` at the top, and again inside a job, the second one for the first time.
TASKS = """
import json
from waker import SqliteQueue
import worker

queue = SqliteQueue("jobs.db")
EARLY = worker.WHOSE

@queue.task
def look():
    import worker as again
    import late_helper
    with open("seen.json", "w") as file:
        json.dump([EARLY, again.WHOSE, late_helper.WHOSE], file)
"""
LATE_TASKS = """
import json
from waker import SqliteQueue

queue = SqliteQueue("jobs.db")

@queue.task
def look():
    import worker, late_helper
    with open("seen.json", "w") as file:
        json.dump([worker.WHOSE, late_helper.WHOSE], file)
"""
HELPER = "from worker import WHOSE\n"
SHADOWS = {"module": ("worker.py",), "package": ("worker/__init__.py", "worker/cli.py", "worker/config.py")}


def write(folder, *files, text="WHOSE = 'mine'\n"):
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def shadowed(folder, place, *files):
    """Put the user's modules into the working directory or on PYTHONPATH; the environment that goes with it."""
    if place == "cwd":
        write(folder, *files)
        return {}
    write(folder / "lib", *files)
    return {"PYTHONPATH": str(folder / "lib")}


def python(folder, code, env):
    """What the user's app does: a Python of its own, in the same folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env={**os.environ, **env}, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("tasks", [TASKS, LATE_TASKS], ids=["early", "late"])
@pytest.mark.parametrize("place", ["cwd", "PYTHONPATH"])
@pytest.mark.parametrize("shadow", SHADOWS)
def test_user_code_gets_its_own_worker_early_and_late(machines, tmp_path, shadow, place, tasks):
    """And the console script, its listener and its drainer are ours all the while."""
    env = shadowed(tmp_path, place, *SHADOWS[shadow])
    write(tmp_path, "tasks.py", text=tasks)
    write(tmp_path, "late_helper.py", text=HELPER)
    python(tmp_path, "import tasks; tasks.look.enqueue()", env)
    machine = machines("tasks:queue", env=env)
    assert machine.wait() == 0, machine.text()
    assert set(json.loads((tmp_path / "seen.json").read_text())) == {"mine"}
    assert "jobs=1" in machine.text()


def test_the_queue_may_be_inside_the_users_own_worker_package(machines, tmp_path):
    """`worker up worker.tasks:queue` drains theirs; a task's name begins with their package's."""
    write(tmp_path, "worker/__init__.py", "worker/late_helper.py")
    code = LATE_TASKS.replace("late_helper", "worker.late_helper")
    write(tmp_path, "worker/tasks.py", text=code)
    python(tmp_path, "from worker.tasks import look; look.enqueue()", {})
    machine = machines("worker.tasks:queue")
    assert machine.wait() == 0, machine.text()
    assert json.loads((tmp_path / "seen.json").read_text()) == ["mine", "mine"]


@pytest.mark.parametrize("place", ["cwd", "PYTHONPATH"])
@pytest.mark.parametrize("shadow", ["waker.py", "worker.py"])
def test_a_command_gets_the_users_modules_and_the_machine_is_ours(machines, tmp_path, shadow, place):
    """Who has a waker.py cannot import the embedded queue from ours; a command of theirs drains any other queue."""
    env = shadowed(tmp_path, place, shadow, "waker.py" if shadow == "worker.py" else "worker.py")
    write(tmp_path, "drain.py", text="import waker, worker\nprint('whose', waker.WHOSE, worker.WHOSE)\n")
    machine = machines("--", sys.executable, "drain.py", env=env)
    assert machine.wait() == 0, machine.text()
    assert "whose mine mine" in machine.out


@pytest.mark.parametrize("place", ["cwd", "PYTHONPATH"])
def test_a_machine_with_shadowed_names_answers_a_wake(machines, tmp_path, place):
    """The listener is a process of its own that imports our packages after it was started in the user's folder."""
    env = shadowed(tmp_path, place, "worker.py", "waker/__init__.py", "waker/protocol.py", "aside.py", "config.py")
    machine = machines("--", "sh", "-c", "while [ ! -e go ]; do sleep 0.02; done", env=env)
    machine.saw("drainer.attached")
    answer = machine.ask()
    assert (answer.status, answer.headers["wake-version"]) == (200, "1")
    (tmp_path / "go").touch()
    assert machine.wait() == 0


@pytest.mark.parametrize("place", ["cwd", "PYTHONPATH"])
def test_the_console_scripts_reach_ours(processes, tmp_path, place):
    """Whatever stands in the working directory or on PYTHONPATH."""
    broken = "raise SystemExit('this is the user\\'s')\n"
    env = shadowed(tmp_path, place, "worker.py", "waker.py")
    for folder in (tmp_path, tmp_path / "lib"):
        for file in ("worker.py", "waker.py"):
            if (folder / file).exists():
                (folder / file).write_text(broken)
    for command in ("worker", "waker"):
        process = processes([f"{BIN}/{command}", "--version"], env=env)
        assert process.wait() == 0, process.text()
        assert process.out[0][0].isdigit()


def test_the_watch_and_the_jobs_load_the_users_own_worker(processes, tmp_path):
    """`waker watch` and `waker jobs` import the queue's module as the drainer does."""
    write(tmp_path, "worker.py")
    write(tmp_path, "late_helper.py", text=HELPER)
    write(tmp_path, "tasks.py", text=TASKS)
    python(tmp_path, "import tasks; tasks.queue.counts()", {})
    target = f"http://127.0.0.1:{free_port()}"
    watch = processes([f"{BIN}/waker", "watch", "tasks:queue", "--once", "--target", target])
    assert watch.wait() == 0, watch.text()
    assert "ready=0" in watch.text()
    jobs = processes([f"{BIN}/waker", "jobs", "list", "tasks:queue"])
    assert jobs.wait() == 0, jobs.text()
