"""A machine's lease: who may change it for a while. Values in, values out; the time is an argument.

Fly docs: machines-resource, leases. While it is held, the proxy cannot start the machine either.
"""

from dataclasses import dataclass

__all__ = ["Lease"]


@dataclass(frozen=True, slots=True)
class Lease:
    """*until*: seconds on the platform's clock; *expires_at*: the same in Unix time, whole seconds."""

    nonce: str
    owner: str
    until: float
    expires_at: int
    version: str
    description: str = ""

    def blocks(self, nonce: str | None, now: float) -> bool:
        """Whether somebody who shows *nonce* must wait."""
        return now < self.until and nonce != self.nonce

    def refusal(self, machine: str, expires_at: str) -> str:
        """The platform's words."""
        return f"machine ID {machine} lease currently held by {self.owner}, expires at {expires_at}"
