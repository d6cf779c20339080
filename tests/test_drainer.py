"""The drainer's loop: every interleaving over the real loop and the real door, and the rules that need no socket."""

import itertools
import threading

import pytest

from waker.backlog import Backlog
from worker.baton import EXIT_JOBS_LEFT
from worker.config import from_environ
from worker.door import LEFT, OPEN, SHUT, Door
from worker.doorway import Left, LineLostError, Rung, Wait
from worker.drainer import Drainer
from worker.drains import Pulse

CONFIG = from_environ({"WORKER_LINGER_S": "0", "WORKER_BROKER_RETRY_S": "10"})


class World:
    """One machine, one queue, one app, in one thread. Each step of the drainer is a place where something may happen.

    `plan` maps the number of a place to what happens there, by name. The line below calls the real door directly; a
    crash of the listener replaces it, with the mark as the only memory.
    """

    def __init__(self, plan, *, sticky=True, command=False):
        self.plan = plan
        self.sticky = sticky
        self.command = command  # its queue cannot be read
        self.place = 0
        self.ready = 0
        self.mark = OPEN
        self.door = Door("0")
        self.boots = 0
        self.accepted = False
        self.stop = threading.Event()
        self.depth = 0

    def happen(self):
        for what in self.plan.get(self.place, ()):
            getattr(self, what)()
        self.place += 1

    # -- what may happen

    def commit(self):
        self.ready += 1

    def ring(self):
        if self.door.ring() is not None:
            self.accepted = True

    def crash(self):
        self.boots += 1
        self.door = Door(str(self.boots), self.mark if self.sticky else OPEN)

    def signal(self):
        self.door.shut()
        self.mark = SHUT
        self.stop.set()

    # -- the drain

    broker_errors = ()

    def backlog(self):
        self.happen()
        reading = None if self.command else Backlog(self.ready)
        self.happen()
        return reading

    def work(self, _stop):
        while self.ready and not self.stop.is_set():
            self.happen()
            self.ready -= 1
            self.pulse.done += 1
        self.happen()
        return 0

    # -- the line

    def look(self):
        self.happen()
        token = self.door.look()
        if self.door.state == OPEN:
            self.mark = OPEN
        self.happen()
        return token

    def leave(self, token):
        self.happen()
        closed = self.door.leave(token)
        if closed and self.mark == OPEN:
            self.mark = self.door.state
        self.happen()
        # The answer may be lost with the listener: then the drainer looks again.
        return Left() if closed and self.door.boot == token.boot else Rung()

    def wait(self, _seconds):
        return True

    def report(self):
        pass

    def run(self, baton=""):
        self.pulse = Pulse()
        drainer = Drainer(CONFIG, self, self.pulse, self, self.stop, pass_baton=lambda *_: baton, now=lambda: 0.0)
        return drainer.run()


def _plans(names, places):
    """Every way to put *names*, in their order where they are the app's, on so many places."""
    for spots in itertools.product(range(places), repeat=len(names)):
        by_name = dict(zip(names, spots, strict=True))
        if by_name["commit"] > by_name["ring"]:
            continue  # rule 15: enqueue, commit, then wake
        plan: dict[int, list[str]] = {}
        for name, spot in zip(names, spots, strict=True):
            plan.setdefault(spot, []).append(name)
        yield plan


def _lost(names, places, **options):
    """The plans in which the machine ended with 0 although a job was left whose wake had been accepted."""
    lost = []
    for plan in _plans(names, places):
        world = World(plan, **options)
        outcome = world.run()
        # What the plan holds for later happens between the drainer's last answer and the end of the machine.
        for place in sorted(place for place in plan if place >= world.place):
            world.place = place
            world.happen()
        if outcome.code == 0 and world.accepted and world.ready:
            lost.append(plan)
    return lost


@pytest.mark.parametrize(("names", "places"), [
    (("commit", "ring"), 20),
    (("commit", "ring", "crash"), 14),
    (("commit", "ring", "signal"), 14),
    (("commit", "ring", "crash", "crash"), 9),
    (("commit", "ring", "crash", "signal"), 9),
])  # fmt: skip
def test_no_interleaving_loses_a_promised_job(names, places):
    """If the wake was accepted and the machine ends with 0, the job was run: listener crashes and stop signals
    anywhere.
    """
    assert _lost(names, places) == []


@pytest.mark.parametrize(("names", "places"), [
    (("commit", "ring"), 20),
    (("commit", "ring", "crash"), 12),
    (("commit", "ring", "crash", "crash"), 8),
])  # fmt: skip
def test_no_interleaving_loses_a_promised_job_of_a_command(names, places):
    """The same for a queue that cannot be read: a pass for every ring, or no 0."""
    assert _lost(names, places, command=True) == []


def test_a_command_stopped_before_a_pass_never_says_that_its_queue_is_empty():
    """Rung, or only just started, and then told to stop: nobody has read the queue."""
    for place in range(4):
        outcome = World({0: ["commit", "ring"], place: ["commit", "ring", "signal"]}, command=True).run()
        assert outcome.code == 0 if place > 3 else "empty" not in outcome.why


def test_without_the_mark_a_respawned_listener_promises_what_nobody_keeps():
    """Rule 2: the drainer has its answer and is on its way out, and a new listener opens a new door."""
    assert _lost(("commit", "ring", "crash"), 14, sticky=False)


def test_without_the_comparison_on_a_shut_door_a_promised_job_is_lost(monkeypatch):
    """Rule 3: rung after the look, then told to stop, and the leave is waved through."""
    compare = Door.leave
    monkeypatch.setattr(Door, "leave", lambda door, token: door.state == SHUT or compare(door, token))
    assert _lost(("commit", "ring", "signal"), 14)


def test_without_the_token_a_promised_job_is_lost(monkeypatch):
    """Everybody else's version of this pattern."""
    monkeypatch.setattr(Door, "leave", lambda door, _token: setattr(door, "state", LEFT) or True)
    assert _lost(("commit", "ring"), 20)


class ScriptedDrain:
    """A drain that answers as told."""

    broker_errors = (ConnectionError,)

    def __init__(self, readings, *, runs=()):
        self.readings = list(readings)
        self.runs = list(runs)
        self.worked = 0
        self.pulse = Pulse()

    def backlog(self):
        reading = self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]
        if isinstance(reading, Exception):
            raise reading
        return reading

    def work(self, _stop):
        self.worked += 1
        ran = self.runs.pop(0) if self.runs else 0
        if isinstance(ran, Exception):
            raise ran
        self.pulse.done += ran
        return 0


class OpenLine:
    """A line to a door that nobody rings, with answers to leave that can be told in advance."""

    depth = 0

    def __init__(self, *verdicts):
        self.door = Door("a")
        self.verdicts = list(verdicts)
        self.waited = []

    def look(self):
        return self.door.look()

    def leave(self, token):
        if self.verdicts:
            return self.verdicts.pop(0)
        return Left() if self.door.leave(token) else Rung()

    def wait(self, seconds):
        self.waited.append(seconds)
        return False

    def report(self):
        pass


class Impatient(threading.Event):
    """A stop that never comes, and never lets anybody wait."""

    def wait(self, timeout=None):
        return self.is_set()


def _run(drain, line=None, config=CONFIG, now=lambda: 0.0, stop=None, baton=""):
    stop = stop or Impatient()
    drainer = Drainer(config, drain, drain.pulse, line or OpenLine(), stop, pass_baton=lambda *_: baton, now=now)
    return drainer.run()


def test_an_empty_queue_never_starts_the_library():
    """The backlog is probed first."""
    drain = ScriptedDrain([Backlog(0)])
    assert _run(drain).code == 0
    assert drain.worked == 0


def test_delayed_and_running_jobs_do_not_keep_a_drainer():
    """Rules 10 and 11: ready means due and runnable; what runs elsewhere is somebody else's."""
    drain = ScriptedDrain([Backlog(0, running=3, due_at=1.0)])
    assert _run(drain).code == 0


def test_two_passes_that_ran_nothing_with_the_same_backlog_end_the_run():
    """Rule 10: stuck is said, with a code that is not 0, instead of a machine that is paid for all night."""
    drain = ScriptedDrain([Backlog(4)])
    outcome = _run(drain)
    assert outcome.code == EXIT_JOBS_LEFT
    assert "stuck: 4 ready" in outcome.why
    assert drain.worked == 2


def test_a_pass_that_ran_nothing_is_forgiven_when_the_next_one_runs():
    """Another drainer may have been faster."""
    drain = ScriptedDrain([Backlog(4), Backlog(4), Backlog(4), Backlog(0)], runs=[0, 4, 0])
    assert _run(drain).code == 0


def test_a_broker_that_comes_back_is_waited_for():
    """Rule 12: within the process, so that the platform's restarts are kept for crashes."""
    drain = ScriptedDrain([ConnectionError("down"), ConnectionError("down"), Backlog(2), Backlog(0)], runs=[2])
    assert _run(drain).code == 0
    assert drain.pulse.done == 2


def test_a_broker_that_stays_down_ends_the_run_after_the_retry_time():
    """Rule 12: with a sentence and a code that is not 0; the clock is the test's."""
    clock = iter(range(1000))
    outcome = _run(ScriptedDrain([ConnectionError("no route")]), now=lambda: next(clock), config=CONFIG)
    assert outcome.code == EXIT_JOBS_LEFT
    assert "the broker is down since 10 s: ConnectionError: no route" in outcome.why


def test_a_broker_that_dies_during_a_pass_is_asked_again():
    """The pass is begun anew; what it had put back is found."""
    drain = ScriptedDrain([Backlog(2), Backlog(2), Backlog(0)], runs=[ConnectionError("gone"), 2])
    assert _run(drain).code == 0
    assert drain.pulse.done == 2


def test_a_ring_while_lingering_causes_a_reading_and_does_not_restart_the_linger():
    """Rule 7: the linger runs from the last job; a ring costs a reading, not a pass."""
    clock = iter([0.0, *(x / 4 for x in range(1, 100))])
    line = OpenLine()
    line.wait = lambda seconds: line.waited.append(seconds) or True  # a ring at once, always
    drain = ScriptedDrain([Backlog(1), Backlog(0)], runs=[1])
    outcome = _run(drain, line, CONFIG._replace(linger_s=2.0), now=lambda: next(clock))
    assert outcome.code == 0
    assert drain.worked == 1
    assert line.waited == sorted(line.waited, reverse=True)
    assert 1 < len(line.waited) < 10


def test_a_leave_that_is_put_off_is_tried_again():
    """Rules 5 and 6: the listener knows of somebody on the way."""
    line = OpenLine(Wait(0.5, "greet"), Wait(0.05, "arriving"))
    assert _run(ScriptedDrain([Backlog(0)]), line).code == 0
    assert line.waited == [0.5, 0.05]


def test_a_stop_with_jobs_left_passes_the_baton():
    """Rule 14: taken is 0, not taken is 75."""
    for baton, code in (("m2", 0), ("", EXIT_JOBS_LEFT)):
        stop = threading.Event()
        stop.set()
        outcome = _run(ScriptedDrain([Backlog(3)]), stop=stop, baton=baton)
        assert outcome.code == code
        assert "3 ready" in outcome.why


def test_a_stop_with_an_empty_queue_needs_no_baton():
    """Rule 13: only the reading after the stop may say so."""
    stop = threading.Event()
    stop.set()
    outcome = _run(ScriptedDrain([Backlog(0)]), stop=stop, baton="must not be asked for")
    assert outcome.code == 0
    assert "empty" in outcome.why


def test_a_lost_listener_ends_the_run_with_jobs_left():
    """Nobody can close the door for us, and what was rung may still be in the queue."""
    line = OpenLine()

    def lost():
        raise LineLostError("no listener on /x")

    line.look = lost
    outcome = _run(ScriptedDrain([Backlog(0)]), line)
    assert outcome.code == EXIT_JOBS_LEFT
    assert "no listener on /x" in outcome.why


def test_the_states_that_the_world_uses_are_the_doors():
    """The model above and the door speak of the same thing."""
    assert {OPEN, LEFT, SHUT} == {"open", "left", "shut"}
