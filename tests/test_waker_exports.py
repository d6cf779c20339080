"""The public names of `waker`, and what importing it costs."""

import subprocess
import sys

import pytest

import waker


def loaded_by(code: str, *names: str) -> list[str]:
    """Which of *names* are imported after *code* ran in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split()


def test_every_public_name_is_there_and_listed() -> None:
    assert len(waker.__all__) == len(set(waker.__all__))
    for name in waker.__all__:
        assert getattr(waker, name) is not None, name
    assert set(waker.__all__) <= set(dir(waker))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Wacker'"):
        _ = waker.Wacker


def test_importing_waker_imports_nothing_heavy() -> None:
    assert loaded_by("import waker", "httpx", "asyncio", "dataclasses", "typing", "logging", "sqlite3") == []


def test_making_a_waker_does_not_import_httpx_or_asyncio() -> None:
    """An app pays for them with its first wake, not with its start."""
    assert loaded_by("import waker; waker.Waker('my-worker.flycast')", "httpx", "asyncio", "h11", "ssl") == []


def test_the_queue_alone_does_not_bring_the_waker() -> None:
    assert loaded_by("from waker import SqliteQueue", "httpx", "asyncio", "dataclasses", "waker.client") == []


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert waker.__version__ == version("wake-on-request")
