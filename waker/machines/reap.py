"""What callers that died have left: which job machines are to be deleted, and why the others are not."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from .client import Machines
from .errors import MachinesError
from .jobs import JOB, NEVER_RAN, OWNER, UNTIL
from .records import Machine

__all__ = ["GRACE_S", "KEEP_FAILED_S", "Reaped", "Verdict", "judge", "reap"]

# A caller that lives reads the exit code and deletes the machine within seconds of its end.
GRACE_S = 300.0
# A failed job's machine is kept so long for a look.
KEEP_FAILED_S = 86_400.0

Action = Literal["delete", "leave"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to become of a job's machine, and why."""

    action: Action
    why: str


@dataclass(frozen=True, slots=True)
class Reaped:
    """A job's machine, and what became of it. *error*: it should have been deleted, and could not be."""

    machine: str
    job: str
    owner: str
    state: str
    exit_code: int | None
    action: Action
    why: str
    error: str = ""


def judge(
    machine: Machine, now: float, *, grace_s: float = GRACE_S, keep_failed_s: float = KEEP_FAILED_S
) -> Verdict | None:
    """Decide over one machine at *now*, a unix time; None if it is no job's. Pure."""
    if JOB not in machine.metadata:
        return None
    last = machine.last_exit
    if machine.state in ("destroyed", "destroying"):
        return Verdict("leave", "it is being deleted already")
    if machine.state == "stopped" and last is not None:
        age_s = now - (last.at or 0.0)
        if last.exit_code != 0 or last.oom_killed or last.requested_stop:
            if age_s >= keep_failed_s:
                return Verdict("delete", f"failed {_ago(age_s)} ago")
            return Verdict("leave", f"failed {_ago(age_s)} ago, kept for a look")
        if age_s >= grace_s:
            return Verdict("delete", f"succeeded {_ago(age_s)} ago, and nobody deleted it")
        return Verdict("leave", f"succeeded {_ago(age_s)} ago; its caller may be about to delete it")
    until = _number(machine.metadata.get(UNTIL, ""))
    if until is not None and now >= until + grace_s:
        return Verdict("delete", f"{machine.state}, its time was over {_ago(now - until)} ago")
    if machine.state in ("stopped", "created", *NEVER_RAN):
        made_at = min((event.at for event in machine.events if event.at is not None), default=None)
        if made_at is not None and now - made_at >= max(grace_s, keep_failed_s):
            return Verdict("delete", f"made {_ago(now - made_at)} ago, and never ran")
    return Verdict("leave", f"{machine.state}: it ends by itself" if until is None else f"{machine.state}: has time")


def reap(
    machines: Machines,
    *,
    grace_s: float = GRACE_S,
    keep_failed_s: float = KEEP_FAILED_S,
    dry_run: bool = False,
    now: Callable[[], float] = time.time,
) -> list[Reaped]:
    """Delete the job machines of an app whose callers are gone; return every job machine, and what became of it."""
    return [
        _done(machines, machine, verdict, dry_run=dry_run)
        for machine, verdict in _judged(machines.list(), now(), grace_s, keep_failed_s)
    ]


def _judged(
    found: Iterable[Machine], now: float, grace_s: float, keep_failed_s: float
) -> Iterable[tuple[Machine, Verdict]]:
    for machine in found:
        verdict = judge(machine, now, grace_s=grace_s, keep_failed_s=keep_failed_s)
        if verdict is not None:
            yield machine, verdict


def _done(machines: Machines, machine: Machine, verdict: Verdict, *, dry_run: bool) -> Reaped:
    error = ""
    if verdict.action == "delete" and not dry_run:
        try:
            machines.delete(machine.id, force=True)
        except MachinesError as failed:
            error = str(failed)
    last = machine.last_exit
    return Reaped(
        machine.id,
        machine.metadata[JOB],
        machine.metadata.get(OWNER, ""),
        machine.state,
        last.exit_code if last else None,
        verdict.action,
        verdict.why,
        error,
    )


def _ago(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.0f} h"
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
