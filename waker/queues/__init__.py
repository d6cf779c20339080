"""What the waker's side knows of each queue library: one module per library, with `backlog(queue) -> Backlog`.

Where a library can call somebody after an enqueue is committed, its module also has `nudge_on_enqueue(queue, waker)`.
A queue is recognised by the names of its classes, so that no library is imported to find out that it is not in use.
"""

from collections.abc import Callable
from importlib import import_module

from ..backlog import Backlog
from ..errors import UsageError

__all__ = ["KNOWN", "probe_for"]

# The module and name of a queue's class → our module for it.
KNOWN = {
    "waker.sqlite_queue.SqliteQueue": "sqlite",
}


def probe_for(queue: object) -> Callable[[], Backlog]:
    """Return what reads the backlog of *queue* afresh; by its class, or the first base class that is known.

    Raises UsageError for an object that is no known queue, and says which are.
    """
    for base in type(queue).__mro__:
        name = KNOWN.get(f"{base.__module__}.{base.__qualname__}")
        if name is not None:
            backlog: Callable[[object], Backlog] = import_module(f".{name}", __name__).backlog
            return lambda: backlog(queue)
    kind = f"{type(queue).__module__}.{type(queue).__qualname__}"
    raise UsageError(f"a {kind} is no queue that can be watched; these can: {', '.join(sorted(KNOWN))}")
