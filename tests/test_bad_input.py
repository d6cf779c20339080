"""What `worker up` says of an app or a queue that cannot be used: a sentence, a code, and nothing lost."""

import sqlite3

import pytest

from waker import SqliteQueue

APP = """
from waker import SqliteQueue
queue = SqliteQueue("jobs.db", durability="process", busy_timeout_s=0.05)

@queue.task
def note(name):
    with open("log", "a") as log:
        log.write(name + "\\n")

not_a_queue = {"a": 1}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "broken.py").write_text("queue = 1 / 0\n")
    (tmp_path / "needy.py").write_text("import no_such_library\n")
    return tmp_path


def _enqueue(folder, *names):
    with SqliteQueue(folder / "jobs.db", durability="process") as queue:
        note = queue.task(name="app:note")(lambda name: None)
        for name in names:
            note.enqueue(name)


MESSAGES = {
    "nowhere:queue": "there is no module 'nowhere'",
    "app:nothing": "app has no 'nothing'",
    "app:not_a_queue": "no drain is known for it",
    "broken:queue": "the module raised while it was imported",
    "needy:queue": "No module named 'no_such_library'",
    "app": "expected module:name, like myapp.tasks:queue",
}


@pytest.mark.parametrize("target", MESSAGES)
def test_an_app_that_cannot_be_used_is_a_sentence_of_its_own(machines, folder, target):
    """Not found, not a known queue, its module raised: different messages, and never a traceback."""
    machine = machines(target, cwd=str(folder))
    assert machine.wait() == 2
    assert MESSAGES[target] in machine.text()
    assert "Traceback" not in machine.text()


def test_the_place_in_the_users_module_is_named(machines, folder):
    """Whoever broke it wants to know where."""
    machine = machines("broken:queue", cwd=str(folder))
    assert machine.wait() == 2
    assert "broken.py:1: ZeroDivisionError" in machine.text()


def test_an_unknown_drain_lists_the_known_ones(machines, folder):
    """`--drain` overrules the type of the object, but not what exists."""
    machine = machines("app:queue", "--drain", "sqlight", cwd=str(folder))
    assert machine.wait() == 2
    assert "sqlite" in machine.text()
    assert "'sqlight'" in machine.text()


def test_a_locked_file_is_waited_for(machines, folder):
    """Rule 12: retried in the process; when the lock is gone, the jobs run."""
    _enqueue(folder, "a")
    lock = sqlite3.connect(folder / "jobs.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    machine = machines("app:queue", cwd=str(folder))
    machine.saw("broker.down", "locked")
    lock.execute("COMMIT")
    lock.close()
    assert machine.wait() == 0
    assert (folder / "log").read_text() == "a\n"


def test_a_file_that_stays_locked_ends_the_machine_with_75_and_loses_nothing(machines, folder):
    """After WORKER_BROKER_RETRY_S, with the file and the reason."""
    _enqueue(folder, "a")
    lock = sqlite3.connect(folder / "jobs.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    machine = machines("app:queue", cwd=str(folder), env={"WORKER_BROKER_RETRY_S": "0.5"})
    assert machine.wait() == 75
    lock.execute("COMMIT")
    lock.close()
    assert "the broker is down since" in machine.text()
    assert "jobs.db" in machine.text()
    with SqliteQueue(folder / "jobs.db") as queue:
        assert queue.counts().ready == 1


def test_a_file_that_is_no_database_ends_the_machine_with_75(machines, folder):
    """The file is not touched."""
    (folder / "jobs.db").write_text("dear diary")
    machine = machines("app:queue", cwd=str(folder), env={"WORKER_BROKER_RETRY_S": "0.2"})
    assert machine.wait() == 75
    assert "not a database" in machine.text()
    assert (folder / "jobs.db").read_text() == "dear diary"


def test_a_crash_of_the_library_is_not_0(machines, folder):
    """What is neither a job's failure nor a broker's absence is shown whole, and the platform starts the machine
    again.
    """
    (folder / "odd.py").write_text(APP + "\nqueue.work = lambda *_: 1 / 0\n")
    _enqueue(folder, "a")
    machine = machines("odd:queue", cwd=str(folder))
    assert machine.wait() == 70
    assert "ZeroDivisionError" in machine.text()
