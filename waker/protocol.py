"""The words on the wire between a waker and a worker, and nothing else.

App and image are deployed at different times, so both sides send a version, ignore headers they do not know, and treat
an absent one as its default. This file does not know which side it is on; it imports nothing but names.
"""

from collections.abc import Mapping
from typing import NamedTuple

__all__ = [
    "AUTHORIZATION",
    "BOOT",
    "BUSY",
    "DEPTH",
    "EXCEPT",
    "HOLD",
    "MACHINE",
    "MAX_BATON_DEPTH",
    "MAX_HOLD_S",
    "RETRY_AFTER",
    "RING",
    "STATE",
    "UP",
    "VERSION",
    "WIRE_VERSION",
    "Receipt",
    "receipt_from",
]

WIRE_VERSION = "1"

# Both ways.
VERSION = "wake-version"

# From the waker. HOLD: seconds it would like its answer to be held, so that the proxy sees the machine occupied.
# EXCEPT: the id of the machine that must not answer (it is passing the baton). DEPTH: how often the baton was passed.
HOLD = "wake-hold"
EXCEPT = "wake-except"
DEPTH = "wake-depth"
AUTHORIZATION = "authorization"

# From the worker. A 200 with MACHINE, BOOT and RING is a receipt; a 200 without them is somebody else's server.
# UP: seconds since this run of the machine bound its port; a machine younger than the call was started by it.
MACHINE = "wake-machine"
BOOT = "wake-boot"
RING = "wake-ring"
STATE = "wake-state"
BUSY = "wake-busy"
UP = "wake-up"
RETRY_AFTER = "retry-after"

MAX_HOLD_S = 10.0
MAX_BATON_DEPTH = 3


class Receipt(NamedTuple):
    """What a 200 promises: a drainer of *machine* reads its queue after this wake arrived, or exits non-zero."""

    machine: str
    boot: str
    ring: int
    state: str  # "starting" before the first reading of the queue, then "working" or "lingering"
    busy: bool  # every slot is taken: the job waits for a slot unless another machine comes
    up_s: float


def receipt_from(headers: Mapping[str, str]) -> Receipt | None:
    """Read a receipt from answer *headers* (lower-case or case-insensitive keys); None if they hold none."""
    machine, boot, ring = headers.get(MACHINE), headers.get(BOOT), headers.get(RING)
    if not machine or not boot or ring is None or not ring.isdigit():
        return None
    try:
        up_s = float(headers.get(UP, "inf"))
    except ValueError:
        up_s = float("inf")
    return Receipt(machine, boot, int(ring), headers.get(STATE, ""), headers.get(BUSY, "") == "yes", up_s)
