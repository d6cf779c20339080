"""The registry of the queue libraries: how an object is recognised, and what is said where it is not."""

import sys
import textwrap

import pytest
from harness import BIN

from waker import SqliteQueue, UsageError
from waker.queues import LIBRARIES, findings, install_hint, name_of, nudge_on_enqueue, probe_for, rows
from worker.drains import NAMES, UnknownQueue, drain_for


def _kind(name):
    """A class as a library would have it, and one of the user's that is derived from it."""
    module, _, qualname = name.rpartition(".")
    theirs = type(qualname, (), {"__module__": module, "__qualname__": qualname})
    return theirs, type("Mine", (theirs,), {})


def test_an_object_of_every_library_is_recognised_and_so_is_one_of_a_subclass():
    """By the names of classes: no library is imported to find out that it is not in use."""
    for name, library in LIBRARIES.items():
        for kind in library.kinds:
            theirs, mine = _kind(kind)
            assert drain_for(theirs()) == drain_for(mine()) == name


def test_no_library_is_imported_by_the_registry_or_by_its_table():
    """Nor by any probe's module."""
    before = set(sys.modules)
    assert len(list(rows())) >= len(LIBRARIES)
    roots = {module.partition(".")[0] for library in LIBRARIES.values() for module in library.modules}
    assert not roots & {name.partition(".")[0] for name in set(sys.modules) - before}


def test_a_list_is_recognised_by_what_is_in_it():
    """Where a library drains several queues at once; and not where they are of two libraries."""
    (queue, _), (app, _) = _kind("rq.queue.Queue"), _kind("celery.app.base.Celery")
    assert name_of([queue(), queue()]) == ("rq", "")
    assert "takes one object" in name_of([app()])[1]
    assert "not of one kind" in name_of([queue(), app()])[1]


def test_names_of_queues_are_for_libraries_that_have_some(tmp_path):
    """`--queues` for the others is said to be of no use, not ignored."""
    app, _ = _kind("celery.app.base.Celery")
    assert name_of(app(), ["high"]) == ("celery", "")
    queue = SqliteQueue(tmp_path / "jobs.db")
    assert isinstance(drain_for(queue, ("high",)), UnknownQueue)
    with pytest.raises(UsageError, match="--queues high"):
        probe_for(queue, ["high"])
    queue.close()


@pytest.mark.parametrize("use", [probe_for, nudge_on_enqueue, findings])
def test_an_unknown_object_is_refused_with_those_that_are_known(use):
    """In one sentence, by the type's full name."""
    with pytest.raises(UsageError, match=r"it is a builtins.dict, which is not known; known are .*rq\.queue\.Queue"):
        use({})


def test_a_missing_library_names_its_extra():
    """Of whichever of its modules is the one that misses."""
    assert install_hint(ModuleNotFoundError(name="celery.app")).endswith("pip install 'wake-on-request[celery]'")
    assert install_hint(ModuleNotFoundError(name="numpy")) == install_hint(ValueError()) == ""


def test_worker_up_says_what_it_can_drain(machines, tmp_path):
    """An unknown type, an unknown --drain, and a library that is not installed; each in one line, and with 2."""
    (tmp_path / "app.py").write_text("queue = {}\n")
    (tmp_path / "other.py").write_text("from celery import Celery\n")
    if _installed("celery"):
        pytest.skip("celery is installed in the environment of the tests")
    for arguments, said in (
        (["app:queue"], "builtins.dict"),
        (["--drain", "nats", "app:queue"], f"expected one of {', '.join(NAMES)}"),
        (["other:queue"], "pip install 'wake-on-request[celery]'"),
    ):
        machine = machines(*arguments)
        machine.saw("drainer.not_started", said)
        assert machine.wait() == 2


def _installed(module):
    from importlib.util import find_spec

    return find_spec(module) is not None


def test_the_watch_names_the_extra_of_a_missing_library(processes, tmp_path):
    """As the worker does."""
    if _installed("rq"):
        pytest.skip("rq is installed in the environment of the tests")
    (tmp_path / "app.py").write_text(textwrap.dedent("import rq\n"))
    watch = processes([f"{BIN}/waker", "watch", "app:queue", "--target", "http://127.0.0.1:9"])
    watch.saw("pip install 'wake-on-request[rq]'")
    assert watch.wait() == 2
