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
    from .jobs import AsyncJob, Job, JobOptions, JobResult, Progress, run, run_async, submit, submit_async
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
    "jobs": (
        "AsyncJob",
        "Job",
        "JobOptions",
        "JobResult",
        "Progress",
        "run",
        "run_async",
        "submit",
        "submit_async",
    ),
    "records": ("Address", "App", "Event", "ExecResult", "Exit", "Lease", "Machine", "Waited"),
}

__all__ = [
    "Address",
    "App",
    "AsyncJob",
    "AsyncMachines",
    "Event",
    "ExecResult",
    "Exit",
    "Job",
    "JobNotRun",
    "JobOptions",
    "JobResult",
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
    "Progress",
    "RateLimited",
    "RequestError",
    "TokenRefused",
    "Unreachable",
    "Waited",
    "run",
    "run_async",
    "submit",
    "submit_async",
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
