"""What a machine's VM must offer, whether real processes run in it or a callable."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .message import Answer, Request

__all__ = ["Boot", "Connection", "Guest", "GuestFile", "Outcome", "Runner"]


@dataclass(frozen=True, slots=True)
class GuestFile:
    """A file that is there before the program begins. *path* is absolute in the machine."""

    path: str
    content: bytes = field(repr=False)
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command in a running machine came to. *signal*: what ended it, or 0."""

    exit_code: int
    signal: int
    out: bytes
    err: bytes


@dataclass(frozen=True, slots=True)
class Boot:
    """What a VM is booted with."""

    machine: str
    port: int
    env: Mapping[str, str]
    command: tuple[str, ...] = ()  # for a callable: the words that would be run
    files: tuple["GuestFile", ...] = ()
    mounts: tuple[tuple[str, str], ...] = ()  # a path in the machine, and the volume's folder


class Connection(Protocol):
    """One connection to the program in the machine: one request at a time."""

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent on it, as far as we know."""
        ...

    async def send(self, request: Request) -> Answer:
        """Deliver *request*; ConnectionError if the machine breaks off before the answer's head."""
        ...

    def close(self) -> None:
        """End it at once."""
        ...


class Guest(Protocol):
    """A VM that runs."""

    @property
    def pids(self) -> Sequence[int]:
        """The process ids of its main processes, as far as there are any."""
        ...

    @property
    def ended_by(self) -> int:
        """The signal that ended its main process; 0 if none did, or it still runs."""
        ...

    @property
    def exited(self) -> "asyncio.Future[int]":
        """The exit code, once nothing of the machine is left; shield it from whoever waits."""
        ...

    def signal(self, number: int) -> None:
        """Send a signal to the main process; nothing happens if it has ended."""
        ...

    def kill(self) -> None:
        """End everything in it at once."""
        ...

    async def connect(self) -> Connection:
        """Connect to the port; OSError if nothing listens."""
        ...

    async def execute(self, command: Sequence[str], stdin: bytes, timeout_s: float) -> Outcome:
        """Run one more command in it; TimeoutError, NotImplementedError if it cannot."""
        ...


class Runner(Protocol):
    """Boots VMs."""

    async def boot(self, boot: Boot) -> Guest:
        """Begin the machine's program with a fresh root file system."""
        ...
