"""What a machine's VM must offer, whether real processes run in it or a callable."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .message import Answer, Request

__all__ = ["Boot", "Connection", "Guest", "Runner"]


@dataclass(frozen=True, slots=True)
class Boot:
    """What a VM is booted with."""

    machine: str
    port: int
    env: Mapping[str, str]


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


class Runner(Protocol):
    """Boots VMs."""

    async def boot(self, boot: Boot) -> Guest:
        """Begin the machine's program with a fresh root file system."""
        ...
