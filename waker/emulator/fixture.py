"""pytest plugin: the fixture `fly_platform`, the platform on this machine for a test of yours.

Installed as `_wake_on_request_pytest`, a name that nobody else has. It imports the emulator when the fixture is used.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from waker.emulator import LocalPlatform

ROOT = os.path.dirname(os.path.abspath(__file__))
ALIAS = "_wake_on_request_waker"


@pytest.fixture
def fly_platform() -> "Iterator[Callable[..., LocalPlatform]]":
    """Make platforms: `platform = fly_platform(["worker", "up", "app.tasks:queue"], machines=3)`.

    Arguments are those of `waker.emulator.Platform`. The machines inherit this process's environment unless *env* is
    given; everything is killed when the test ends.
    """
    platforms: list[LocalPlatform] = []

    def make(command: Any = None, **options: Any) -> "LocalPlatform":
        options.setdefault("env", dict(os.environ))
        platform = _emulator().LocalPlatform(command, **options)
        platforms.append(platform)
        started: LocalPlatform = platform.start()
        return started

    yield make
    while platforms:
        platforms.pop().close()


def _emulator() -> Any:
    """`waker.emulator`, also where `waker` is a module of the user's own."""
    spec = importlib.util.find_spec("waker")
    folders = (spec.submodule_search_locations if spec else None) or ()
    if any(os.path.exists(os.path.join(folder, "emulator", "fixture.py")) for folder in folders):
        return importlib.import_module("waker.emulator")
    if ALIAS not in sys.modules:
        folder = os.path.join(ROOT, "waker")
        spec = importlib.util.spec_from_file_location(
            ALIAS, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )
        assert spec is not None  # noqa: S101 - it names a file and a loader
        assert spec.loader is not None  # noqa: S101
        sys.modules[ALIAS] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return importlib.import_module(f"{ALIAS}.emulator")
