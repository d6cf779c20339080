"""The policy against a small pure model of the proxy, under both readings of soft_limit."""

import itertools
import random
from collections import Counter

import pytest

from waker.policy import BARREN_ROUNDS_WITH_FAILURES, PROBE_GAP_MAX_S, Answer, Done, Pressure, Send, Spread
from waker.protocol import Receipt

READINGS = ("above", "at or above")


class Proxy:
    """Machines at soft_limit 1: the least occupied with room, else a stopped one is started, else the least."""

    def __init__(self, reading: str, *, idle: int, busy: int, stopped: int, others: int = 0) -> None:
        self.room = 2 if reading == "above" else 1
        self.busy = {f"busy{i}" for i in range(busy)}
        self.up = [*sorted(self.busy), *(f"idle{i}" for i in range(idle))]
        self.stopped = [f"cold{i}" for i in range(stopped)]
        self.held: Counter[str] = Counter()
        self.started: list[str] = []
        self.others = Counter(self.route() for _ in range(others)) if self.up or stopped else Counter()
        self.started.clear()

    def route(self) -> str:
        with_room = [machine for machine in self.up if self.held[machine] < self.room]
        if not with_room and self.stopped:
            with_room = [self.stopped.pop(0)]
            self.up.append(with_room[0])
            self.started.append(with_room[0])
        machine = min(with_room or self.up, key=lambda name: self.held[name])
        self.held[machine] += 1
        return machine

    def round(self, send: Send) -> list[Answer]:
        """All wakes of a round at once; held ones occupy their machine for its length, others do not."""
        self.held = Counter(self.others)
        answers = []
        for _ in range(send.count):
            machine = self.route()
            if not send.held:
                self.held[machine] -= 1
            answers.append(receipt(machine, busy=machine in self.busy, cold=machine in self.started))
        return answers


def receipt(machine: str, *, busy: bool = False, cold: bool = False) -> Answer:
    return Answer(Receipt(machine, "boot", 1, "working", busy, 0.0), "200 with a receipt", 200, cold=cold)


def refused(**more: float) -> Answer:
    return Answer(None, "503 from a worker, closed", 503, **more)


def play(spread: Spread, proxy: Proxy, chance: float = 0.5) -> tuple[Done, int]:
    action, rounds = spread.first(), 0
    while isinstance(action, Send):
        rounds += 1
        answers = proxy.round(action)
        for answer in answers:
            spread.take(answer)
        action = spread.next(answers, chance)
    return action, rounds


@pytest.mark.parametrize("reading", READINGS)
def test_exactly_as_many_machines_as_asked_for_and_none_started_in_vain(reading: str) -> None:
    for wanted, idle, busy, spare in itertools.product(range(1, 8), range(4), range(4), range(3)):
        needed = max(0, wanted - idle)
        proxy = Proxy(reading, idle=idle, busy=busy, stopped=needed + spare)
        spread = Spread(wanted)
        done, _ = play(spread, proxy)
        case = f"{wanted} wanted, {idle} idle, {busy} busy, {spare} to spare"
        assert done.complete, case
        assert not spread.missing, case
        assert len(proxy.started) == needed, case


@pytest.mark.parametrize("reading", READINGS)
def test_other_peoples_requests_do_not_keep_a_machine_from_being_found(reading: str) -> None:
    for wanted, idle, busy, others in itertools.product(range(1, 6), range(3), range(3), range(4)):
        proxy = Proxy(reading, idle=idle, busy=busy, stopped=wanted + others, others=others)
        spread = Spread(wanted)
        done, _ = play(spread, proxy)
        assert done.complete, f"{wanted} wanted, {idle} idle, {busy} busy, {others} other requests"
        # Nobody sees the places that strangers take: a wake meant for one of them may start a machine too many.
        assert len(proxy.started) <= wanted + (others + 1) // 2


@pytest.mark.parametrize("reading", READINGS)
def test_asking_for_more_than_exist_ends_after_two_rounds_without_a_new_machine(reading: str) -> None:
    for wanted, idle, busy, stopped in itertools.product(range(1, 8), range(3), range(3), range(3)):
        if idle + busy + stopped == 0 or idle + stopped >= wanted:
            continue
        spread = Spread(wanted)
        done, rounds = play(spread, Proxy(reading, idle=idle, busy=busy, stopped=stopped))
        assert not done.complete
        assert spread.missing == wanted - idle - stopped
        assert rounds <= 2 + idle + busy + stopped


def test_one_machine_in_a_long_job_does_not_swallow_every_wake() -> None:
    """Rule 17: the single wake lands on the busy machine; what follows is held, and fills it."""
    for reading in READINGS:
        proxy = Proxy(reading, idle=0, busy=1, stopped=3)
        spread = Spread(1)
        assert spread.first() == Send(1, held=False)
        play(spread, proxy)
        assert proxy.started == ["cold0"]


def test_a_busy_machine_counts_for_those_who_say_so() -> None:
    proxy = Proxy("above", idle=0, busy=1, stopped=3)
    done, rounds = play(Spread(1, busy_counts=True), proxy)
    assert (done, rounds, proxy.started) == (Done(complete=True), 1, [])


def test_a_machine_that_this_call_started_counts_though_it_is_already_at_work() -> None:
    spread = Spread(2)
    spread.take(receipt("a", busy=True, cold=True))
    assert spread.missing == 1
    spread.take(receipt("b"))
    spread.take(receipt("b", busy=True))
    assert spread.missing == 0


def test_a_start_that_was_refused_is_asked_for_again_after_a_pause() -> None:
    """The race right after an exit: the machine starts seconds later, so one such round ends nothing."""
    spread = Spread(2)
    for _ in range(BARREN_ROUNDS_WITH_FAILURES):
        answers = [receipt("a"), refused(retry_after_s=3.0)]
        for answer in answers:
            spread.take(answer)
        action = spread.next(answers, 0.5)
        assert isinstance(action, Send)
        assert action.held
        assert action.pause_s == 3.0
    spread.take(receipt("b"))
    assert spread.next([receipt("a"), receipt("b")], 0.5) == Done(complete=True)


@pytest.mark.parametrize("reading", READINGS)
def test_refused_starts_at_random_still_come_out_right(reading: str) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        wanted, idle, busy = rng.randint(1, 6), rng.randint(0, 2), rng.randint(0, 2)
        proxy = Proxy(reading, idle=idle, busy=busy, stopped=wanted)
        spread = Spread(wanted)
        action: Send | Done = spread.first()
        failures = BARREN_ROUNDS_WITH_FAILURES - 1
        while isinstance(action, Send):
            answers = proxy.round(action)
            lost = [name for name in proxy.started if failures > 0 and rng.random() < 0.3]
            failures -= len(lost)
            for name in lost:
                proxy.up.remove(name)
                proxy.started.remove(name)
                proxy.stopped.append(name)
            answers = [refused() if a.receipt and a.receipt.machine in lost else a for a in answers]
            for answer in answers:
                spread.take(answer)
            action = spread.next(answers, rng.random())
        assert action.complete, f"seed {seed}: {wanted} wanted, {spread.missing} missing"


def test_instant_answers_end_in_bounded_rounds_and_bounded_wakes() -> None:
    """A worker that holds nothing swallows all wakes: the call gives up instead of sending ever more."""
    spread, sent = Spread(3), 0
    action: Send | Done = spread.first()
    while isinstance(action, Send):
        sent += action.count
        answers = [receipt("a")] * action.count
        spread.take(answers[0])
        action = spread.next(answers, 0.0)
    assert action == Done(complete=False)
    assert sent < 40


def test_after_a_round_without_a_receipt_the_process_sends_single_probes_ever_more_rarely() -> None:
    """Rule 18, at full jitter: each gap is at least a second, the ceiling doubles and is bounded."""
    pressure, now, gaps = Pressure(), 100.0, []
    assert pressure.ask(now, 20.0) is None
    for _ in range(6):
        pressure.note([refused()], now, chance=1.0)
        gap_s = pressure.ask(now, 20.0)
        assert gap_s is not None
        gaps.append(gap_s)
        now += gap_s
        assert pressure.ask(now, 20.0) == 0.0
        assert pressure.ask(now, 20.0) == 20.0, "there is one probe at a time"
    assert gaps == [2.0, 4.0, 8.0, PROBE_GAP_MAX_S, PROBE_GAP_MAX_S, PROBE_GAP_MAX_S]
    pressure.note([receipt("a")], now, chance=1.0)
    assert pressure.ask(now, 20.0) is None, "a receipt ends the pressure"


def test_without_jitter_a_probe_comes_after_a_second_and_never_sooner() -> None:
    pressure = Pressure()
    for _ in range(5):
        pressure.note([refused()], 0.0, chance=0.0)
        assert pressure.ask(0.0, 20.0) == 1.0


def test_retry_after_is_respected_within_bounds() -> None:
    pressure = Pressure()
    pressure.note([refused(retry_after_s=5.0)], 0.0, chance=0.0)
    assert pressure.ask(0.0, 20.0) == 5.0
    pressure.note([refused(retry_after_s=9_999.0)], 0.0, chance=0.0)
    assert pressure.ask(0.0, 20.0) == PROBE_GAP_MAX_S


def test_a_probe_that_was_given_up_lets_the_next_caller_have_its_turn() -> None:
    pressure = Pressure()
    pressure.note([refused()], 0.0, chance=0.0)
    assert pressure.ask(1.0, 20.0) == 0.0
    pressure.abandon(1.5)
    assert pressure.ask(1.5, 20.0) == 1.0


def test_an_old_failure_says_nothing_any_more() -> None:
    pressure = Pressure()
    pressure.note([refused()], 0.0, chance=1.0)
    assert pressure.ask(3_600.0, 20.0) is None
