"""Our two package names are common ones: this is how they get out of the way of the user's own modules.

A drainer imports all it needs of ours, calls `step_aside`, and only then imports user code. From there on
`import worker` and `import waker` mean whatever they mean to the user. The few modules of ours that are chosen by what
the user's code turned out to be come in through `late`, under a name that nobody else has.
"""

import importlib
import os
import sys
from types import ModuleType

__all__ = ["late", "step_aside"]

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PRIVATE = "_wake_on_request_late"


def step_aside(cwd: str) -> None:
    """Take our packages out of `sys.modules` and our folder off the front of the path; *cwd* comes first instead."""
    for name in list(sys.modules):
        if name in ("worker", "waker") or name.startswith(("worker.", "waker.")):
            del sys.modules[name]
    while sys.path and sys.path[0] == ROOT:
        del sys.path[0]
    if ROOT not in sys.path:  # started from a folder that is not on the path by itself, like a zip of dependencies
        sys.path.append(ROOT)
    sys.path.insert(0, cwd)
    importlib.invalidate_caches()


def late(name: str) -> ModuleType:
    """Import one of our modules, like "worker.drains.rq", after stepping aside. It may only import relatively."""
    if PRIVATE not in sys.modules:
        package = ModuleType(PRIVATE)
        package.__path__ = [ROOT]
        sys.modules[PRIVATE] = package
    return importlib.import_module(f"{PRIVATE}.{name}")
