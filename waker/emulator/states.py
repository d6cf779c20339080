"""What a machine may become, as one table; and what its restart policy makes of an exit.

            Start          Booted         Stop           Exited
    created ─────▶ starting ─────▶ started ─────▶ stopping ─────▶ stopped ──Start──▶ starting
                      │               │
           BootFailed │               ├──Exited─────▶ stopped       (exit 0, a used-up budget, policy "no")
                      ▼               └──Failed─────▶ restarting ──Start──▶ starting
                   stopped                               │
                                                         └──Stop──▶ stopped

    created, started, stopped ──Replace──▶ replacing ──Start──▶ starting, or ──Replaced──▶ stopped
    created, stopped ──Remove──▶ destroying ──Destroyed──▶ destroyed

Rule 1: a pair that is not in the table raises and changes nothing.
Rule 2: this file knows no clock, no process and no socket.

The states' names are the platform's own (Fly docs: machines/machine-states). Suspending is not
emulated.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum

__all__ = [
    "ALIVE",
    "POLICIES",
    "SETTLED",
    "STARTABLE",
    "TABLE",
    "ImpossibleStepError",
    "State",
    "Step",
    "restart_granted",
    "step",
]


class State(StrEnum):
    """Where a machine is in its life."""

    CREATED = "created"  # it exists and never ran
    STARTING = "starting"  # its VM is being booted
    STARTED = "started"  # its VM runs; whether the program listens yet is another question
    STOPPING = "stopping"  # a stop was asked for; the program has until the kill timeout
    STOPPED = "stopped"  # nothing runs, nothing is billed
    RESTARTING = "restarting"  # the program failed and the restart policy will start it again
    REPLACING = "replacing"  # its config is being changed; it may have to end first
    DESTROYING = "destroying"  # nothing of it runs any more, and it is being removed
    DESTROYED = "destroyed"  # gone for good


class Step(StrEnum):
    """What can happen to a machine."""

    START = "start"
    BOOTED = "booted"
    BOOT_FAILED = "boot failed"
    STOP = "stop"
    EXITED = "exited"
    FAILED = "failed"
    REPLACE = "replace"
    REPLACED = "replaced"
    REMOVE = "remove"
    DESTROY = "destroy"


TABLE: Mapping[State, Mapping[Step, State]] = {
    State.CREATED: {Step.START: State.STARTING, Step.REPLACE: State.REPLACING, Step.REMOVE: State.DESTROYING},
    State.STARTING: {Step.BOOTED: State.STARTED, Step.BOOT_FAILED: State.STOPPED, Step.STOP: State.STOPPING},
    State.STARTED: {
        Step.STOP: State.STOPPING,
        Step.EXITED: State.STOPPED,
        Step.FAILED: State.RESTARTING,
        Step.REPLACE: State.REPLACING,
    },
    State.STOPPING: {Step.EXITED: State.STOPPED, Step.FAILED: State.RESTARTING},
    State.STOPPED: {Step.START: State.STARTING, Step.REPLACE: State.REPLACING, Step.REMOVE: State.DESTROYING},
    State.RESTARTING: {Step.START: State.STARTING, Step.STOP: State.STOPPED},
    State.REPLACING: {Step.START: State.STARTING, Step.REPLACED: State.STOPPED},
    State.DESTROYING: {Step.DESTROY: State.DESTROYED},
    State.DESTROYED: {},
}

# By what may be done in them: a start is accepted; something of the machine is up or on its way.
STARTABLE = frozenset({State.CREATED, State.STOPPED})
ALIVE = frozenset({State.STARTING, State.STARTED, State.STOPPING, State.RESTARTING, State.REPLACING})
SETTLED = frozenset({State.CREATED, State.STARTED, State.STOPPED, State.DESTROYED})

POLICIES = ("on-failure", "always", "no")
RESTART_WINDOW_S = 300.0  # the budget counts restarts of the last five minutes
MAX_RESTARTS = 10


class ImpossibleStepError(Exception):
    """The step is not in the table for this state: a mistake in the emulator, never the platform's answer."""


def step(state: State, happening: Step) -> State:
    """The state after *happening*; raise ImpossibleStepError for a pair that is not in the table."""
    try:
        return TABLE[state][happening]
    except KeyError:
        raise ImpossibleStepError(f"a machine that is {state} cannot see {happening!s}") from None


def restart_granted(
    policy: str,
    exit_code: int,
    *,
    requested_stop: bool,
    restarts: Sequence[float],
    now: float,
    max_retries: int = MAX_RESTARTS,
    window_s: float = RESTART_WINDOW_S,
) -> bool:
    """Whether the platform starts the machine again after this exit (Fly docs: machine-restart-policy).

    *restarts*: when it was restarted so far. `on-failure` has *max_retries* within *window_s*; `always` has no budget.
    """
    if requested_stop or policy == "no":
        return False
    if policy == "always":
        return True
    return exit_code != 0 and sum(now - at < window_s for at in restarts) < max_retries
