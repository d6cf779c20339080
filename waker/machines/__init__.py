"""The Machines API: typed calls, one-off jobs on machines of their own, schedules, and a fleet to wake.

Importing this costs next to nothing: each name below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import AsyncMachines, Machines
    from .errors import (
        JobNotRun,
        JobUnknown,
        MachineBusy,
        MachinesError,
        NoAnswer,
        NoCapacity,
        NotFound,
        OutcomeUnknown,
        PlatformError,
        RateLimited,
        RequestError,
        TokenRefused,
        Unreachable,
    )
    from .records import Address, App, Event, ExecResult, Exit, Lease, Machine, Waited

_HOMES = {
    "client": ("AsyncMachines", "Machines"),
    "errors": (
        "JobNotRun",
        "JobUnknown",
        "MachineBusy",
        "MachinesError",
        "NoAnswer",
        "NoCapacity",
        "NotFound",
        "OutcomeUnknown",
        "PlatformError",
        "RateLimited",
        "RequestError",
        "TokenRefused",
        "Unreachable",
    ),
    "records": ("Address", "App", "Event", "ExecResult", "Exit", "Lease", "Machine", "Waited"),
}

__all__ = [
    "Address",
    "App",
    "AsyncMachines",
    "Event",
    "ExecResult",
    "Exit",
    "JobNotRun",
    "JobUnknown",
    "Lease",
    "Machine",
    "MachineBusy",
    "Machines",
    "MachinesError",
    "NoAnswer",
    "NoCapacity",
    "NotFound",
    "OutcomeUnknown",
    "PlatformError",
    "RateLimited",
    "RequestError",
    "TokenRefused",
    "Unreachable",
    "Waited",
]


def __getattr__(name: str) -> object:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
