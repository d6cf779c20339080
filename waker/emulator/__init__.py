"""The platform on this machine: proxy, Machines API, machines, faults, one clock and one log.

It follows Fly's documentation and what others have observed. Where sources disagree or say nothing, a knob chooses, and
the default is the less kind reading. What it cannot do it answers with 501, and says so. If it disagrees with the
platform, the platform is right.
"""

from .clock import NobodyWillWakeUsError, VirtualLoop, run_virtual
from .events import Event, EventLog, Run
from .faults import FAULTS, Fault, Faults
from .knobs import Knobs
from .local import LocalPlatform
from .machine import RefusedError
from .message import Reply
from .platform import MachineInfo, Platform
from .recipe import Image
from .virtual import CallableMachine, IncomingRequest

__all__ = [
    "FAULTS",
    "CallableMachine",
    "Event",
    "EventLog",
    "Fault",
    "Faults",
    "Image",
    "IncomingRequest",
    "Knobs",
    "LocalPlatform",
    "MachineInfo",
    "NobodyWillWakeUsError",
    "Platform",
    "RefusedError",
    "Reply",
    "Run",
    "VirtualLoop",
    "run_virtual",
]
