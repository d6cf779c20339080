"""Answers so far → how many wakes to send next. Pure: no clock, no socket; time and chance are arguments.

The proxy starts a stopped Machine only when every running one is occupied, and occupied is read in two ways: a Machine
at its soft limit, or one above it. So a Machine takes one wake in flight, or two, before the next one is started, and
we learn which from the receipts. A Spread asks for exactly enough wakes at once to occupy every Machine known and to
start those missing, no more. Pressure keeps a process from pressing on an address where nothing answers.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .protocol import Receipt

__all__ = ["Answer", "Done", "Pressure", "Send", "Spread"]

# Rounds that found no new machine before the spread is called complete: two if all their wakes were answered with a
# receipt, more if some failed, because a start that was refused just after an exit is granted seconds later.
BARREN_ROUNDS = 2
BARREN_ROUNDS_WITH_FAILURES = 5
MAX_ROUNDS = 64

PROBE_GAP_S = 1.0
PROBE_GAP_MAX_S = 8.0
# A failure this old says nothing about the address any more.
FORGET_S = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What one wake came to: a receipt, or what was seen instead (in words, for the report)."""

    receipt: Receipt | None
    seen: str
    status: int | None = None
    retry_after_s: float | None = None
    cold: bool = False  # the machine is younger than the call


@dataclass(frozen=True, slots=True)
class Send:
    """Send *count* wakes at once, *held* or not, after *pause_s*."""

    count: int
    held: bool
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing more to send: *complete* if as many machines as asked for gave a receipt."""

    complete: bool


class Spread:
    """One call's way to *machines* distinct machines.

    A receipt from a busy machine, whose slots are all taken, does not count towards the number, unless *busy_counts* or
    the machine is cold: it was started by this very call, and is busy with what it was woken for.
    """

    def __init__(self, machines: int, *, busy_counts: bool = False) -> None:
        self.machines = machines
        self._busy_counts = busy_counts
        self._counts: dict[str, bool] = {}  # machine id → whether it counts; once it did, it does
        self._up: set[str] = set()  # machines that answered in the last round: others may be gone
        self._capacity = 1  # wakes that one machine was seen to take at once
        self._barren = Counter[bool]()  # rounds without a new machine, by whether some wakes failed
        self._rounds = 0

    @property
    def known(self) -> int:
        """Machines that gave a receipt so far, busy ones included."""
        return len(self._counts)

    @property
    def missing(self) -> int:
        """How many machines are still to be found."""
        return max(0, self.machines - sum(self._counts.values()))

    def take(self, answer: Answer) -> None:
        """Count one answer as it arrives; the round may be ended early once nothing is missing."""
        receipt = answer.receipt
        if receipt is not None:
            counts = self._busy_counts or answer.cold or not receipt.busy
            self._counts[receipt.machine] = counts or self._counts.get(receipt.machine, False)

    def first(self) -> Send:
        """The first round: as many as asked for. A single wake is not held: nothing is to be spread."""
        return Send(self.machines, held=self.machines > 1)

    def next(self, answers: Iterable[Answer], chance: float) -> Send | Done:
        """Decide after a round from its *answers*, all of them taken.

        *chance* (0 to 1) is the jitter of the pause that follows a round in which some wakes failed.
        """
        answers = tuple(answers)
        self._rounds += 1
        if not self.missing:
            return Done(complete=True)
        failed = [answer for answer in answers if answer.receipt is None]
        if len(failed) == len(answers):
            # Nobody answered: when to ask again is Pressure's affair, and the number stays what it was.
            return self._send()
        taken = Counter(answer.receipt.machine for answer in answers if answer.receipt is not None)
        # One that was gone and came back was started as well as any other.
        fresh = not self._up.issuperset(taken)
        self._up = set(taken)
        self._capacity = max(self._capacity, *taken.values())
        if fresh:
            self._barren.clear()
        else:
            self._barren[bool(failed)] += 1
        complete = self._barren[False] >= BARREN_ROUNDS or self._barren[True] >= BARREN_ROUNDS_WITH_FAILURES
        if complete or self._rounds >= MAX_ROUNDS:
            return Done(complete=False)
        return self._send(pause_s=max(PROBE_GAP_S * (1 + chance), _retry_after_s(failed)) if failed else 0.0)

    def _send(self, *, pause_s: float = 0.0) -> Send:
        # Every machine that is up is filled, and so is every new one but the last, which needs just one wake.
        count = self._capacity * (len(self._up) + self.missing - 1) + 1
        return Send(count, held=self.machines > 1 or self.known > 0, pause_s=pause_s)


class Pressure:
    """What a process as a whole knows of an address where nothing answers: one probe at a time, ever more rarely.

    Shared by all calls to one address; the caller guards it with a lock.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._failed_at = 0.0
        self._probe_at = 0.0
        self.seen = ""  # what the last failed wake saw, for those who never got their turn

    def ask(self, now: float, patience_s: float) -> float | None:
        """None: send in full. 0: send one probe, then call note() or abandon(). Above 0: ask again in so many seconds.

        *patience_s* is how long the probe may take; nobody else gets a turn in that time.
        """
        if not self._failures or now - self._failed_at > FORGET_S:
            return None
        if now < self._probe_at:
            return self._probe_at - now
        self._probe_at = now + patience_s
        return 0.0

    def note(self, answers: Iterable[Answer], now: float, chance: float) -> None:
        """Learn from a round: a receipt ends the pressure, a round without one doubles the gap, fully jittered."""
        answers = tuple(answers)
        if any(answer.receipt is not None for answer in answers):
            self._failures = 0
            return
        self._failures += 1
        self._failed_at = now
        self.seen = answers[-1].seen if answers else ""
        ceiling_s = min(PROBE_GAP_MAX_S, PROBE_GAP_S * 2.0 ** min(self._failures, 10))
        gap_s = PROBE_GAP_S + chance * (ceiling_s - PROBE_GAP_S)
        self._probe_at = now + max(gap_s, _retry_after_s(answers))

    def abandon(self, now: float) -> None:
        """Give a turn back: its caller was cancelled before the probe came to anything."""
        self._probe_at = now + PROBE_GAP_S


def _retry_after_s(answers: Iterable[Answer]) -> float:
    """The longest wait that a refusal asked for, within what a waiter can bear."""
    return min(PROBE_GAP_MAX_S, max((answer.retry_after_s or 0.0 for answer in answers), default=0.0))
