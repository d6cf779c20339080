"""Wake queue workers on Fly.io Machines that are stopped while there is no work.

Importing this costs next to nothing: each name below is imported when it is first used.
"""

from importlib import import_module

# Type checkers take it for typing.TYPE_CHECKING, whose import would cost as much as all the rest here.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from .backlog import Backlog
    from .client import AsyncWaker, Waker, WakeReport, WokenMachine
    from .errors import LoadError, NotWoken, QueueError, Unauthorized, UsageError, WakeError
    from .sqlite_queue import SqliteQueue
    from .watch import Look, Watch

    __version__: str

__all__ = [
    "AsyncWaker",
    "Backlog",
    "LoadError",
    "Look",
    "NotWoken",
    "QueueError",
    "SqliteQueue",
    "Unauthorized",
    "UsageError",
    "WakeError",
    "WakeReport",
    "Waker",
    "Watch",
    "WokenMachine",
    "__version__",
]

_HOMES = {
    "AsyncWaker": "client",
    "Backlog": "backlog",
    "LoadError": "errors",
    "Look": "watch",
    "NotWoken": "errors",
    "QueueError": "errors",
    "SqliteQueue": "sqlite_queue",
    "Unauthorized": "errors",
    "UsageError": "errors",
    "WakeError": "errors",
    "WakeReport": "client",
    "Waker": "client",
    "Watch": "watch",
    "WokenMachine": "client",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("wake-on-request")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
