"""The contract's fixtures: `bench` is one library at work on an empty place, and every test runs for each library.

Two forms: the short one (a few seconds for a library) by default, the full one with QUEUE_CONTRACT=full. Tests marked
`full` are only in the full form. QUEUE_LIBRARIES=rq,celery runs only these.
"""

import contextlib
import os
import subprocess

import pytest
from queues.lab import APPS, Bench, Unavailable, for_library, serving
from queues.libraries import LIBRARIES

FULL = os.environ.get("QUEUE_CONTRACT") == "full"
ONLY = [name for name in os.environ.get("QUEUE_LIBRARIES", "").split(",") if name]
CHOSEN = [one for one in LIBRARIES if (FULL or one.short) and (not ONLY or one.name in ONLY)]
SKIPPED: dict[str, str] = {}


def pytest_collection_modifyitems(config, items):
    """In the short form, leave out what is only in the full one."""
    if not FULL:
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_generate_tests(metafunc):
    if "library" in metafunc.fixturenames:
        # A module about some libraries names their extras.
        extras = getattr(metafunc.module, "EXTRAS", None)
        chosen = [one for one in CHOSEN if extras is None or one.extra in extras]
        metafunc.parametrize("library", chosen, ids=lambda one: one.name, scope="session")


@pytest.fixture(scope="session")
def size():
    """How much of everything: the short form, or the one that was promised."""
    return (500, 60, 60) if FULL else (40, 10, 20)


@pytest.fixture(scope="session")
def moments_s():
    """How long after a job has run the next one rings."""
    return [0.06 * number for number in range(20)] if FULL else [0.0, 0.05, 0.3]


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """`servers(kind)`: a server that is started when it is first needed, and lasts as long as the tests."""
    with contextlib.ExitStack() as stack:
        started = {}

        def get(kind):
            if kind not in started:
                started[kind] = stack.enter_context(serving(kind, str(_open_folder(tmp_path_factory, kind))))
            return started[kind]

        yield get


def _open_folder(tmp_path_factory, kind):
    """A folder that a server may use which runs as somebody else."""
    folder = tmp_path_factory.mktemp(kind)
    for above in (folder, *folder.parents[:2]):
        above.chmod(above.stat().st_mode | 0o011)
    return folder


@pytest.fixture
def bench(library, servers, tmp_path):
    """The library, its environment, and an empty place on its server."""
    try:
        made = Bench(library, for_library(library.extra, library.pins), servers(library.server), str(tmp_path))
    except Unavailable as why:
        SKIPPED[library.name] = str(why)
        pytest.skip(f"{library.name}: {why}")
    yield made
    made.close()


def pytest_terminal_summary(terminalreporter):
    """What ran, and what did not and why: a skipped library is said, not overlooked."""
    names = [one.name for one in CHOSEN if one.name not in SKIPPED]
    terminalreporter.write_line(
        f"queue contract, {'full' if FULL else 'short'}: {len(names)} libraries ({', '.join(names)}); "
        f"{len(SKIPPED)} skipped{': ' if SKIPPED else ''}{'; '.join(SKIPPED.values())}"
    )


@pytest.fixture(scope="session")
def python_of(library):
    """Run a line of Python in the library's environment; returns what it printed."""

    def run(code, **env):
        venv = for_library(library.extra, library.pins)
        done = subprocess.run([f"{venv}/bin/python", "-c", code], cwd=APPS, env={**os.environ, **library.env, **env},
                              capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
