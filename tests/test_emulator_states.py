"""The emulator's pure parts: a machine's states, restart policy, routing, fly-replay, knobs, faults, events."""

import random
from itertools import product

import pytest

from waker.emulator.events import MAX_EVENTS, Event, EventLog
from waker.emulator.faults import FAULTS, Dice, Faults
from waker.emulator.knobs import Knobs
from waker.emulator.replay import InvalidReplayError, NotEmulatedError, Replay, from_header, from_json, source_header
from waker.emulator.routing import Forward, Full, Limits, Nobody, Start, View, Wish, route
from waker.emulator.states import (
    POLICIES,
    TABLE,
    ImpossibleStepError,
    State,
    Step,
    restart_granted,
    step,
)


def test_an_unknown_pair_raises_and_names_both():
    """Every pair is either in the table or refused; there is no silent third way."""
    for state, happening in product(State, Step):
        if happening in TABLE[state]:
            assert step(state, happening) is TABLE[state][happening]
        else:
            with pytest.raises(ImpossibleStepError, match=rf"{state.value}.*{happening.value}"):
                step(state, happening)


def test_every_state_can_be_reached_and_only_destroyed_is_final():
    reached, todo = set(), [State.CREATED]
    while todo:
        state = todo.pop()
        reached.add(state)
        todo += [after for after in TABLE[state].values() if after not in reached]
    assert reached == set(State)
    assert [state for state in State if not TABLE[state]] == [State.DESTROYED]


def granted(policy, code, restarts=(), now=1000.0, requested=False):
    return restart_granted(policy, code, requested_stop=requested, restarts=restarts, now=now)


def test_the_restart_policy_looks_at_the_exit_code_and_at_who_asked():
    assert not granted("on-failure", 0)
    assert granted("on-failure", 3)
    assert granted("always", 0)
    assert not granted("no", 3)
    assert not any(granted(policy, 3, requested=True) for policy in POLICIES)


def test_ten_restarts_in_five_minutes_use_the_budget_up_and_time_gives_it_back():
    ten = [700.1 + n for n in range(10)]
    assert not granted("on-failure", 1, ten, now=1000.0)
    assert granted("on-failure", 1, ten, now=1000.2)
    assert granted("always", 1, ten, now=1000.0)


# Routing


def choose(views, *, soft=1, hard=None, wish=Wish(), seed=0, **knobs):  # noqa: B008 - frozen
    return route(views, wish, Limits(soft, hard), Knobs(**knobs), random.Random(seed))


def up(name, in_flight=0, **more):
    return View(name, State.STARTED, in_flight, **more)


def down(name, **more):
    return View(name, State.STOPPED, 0, **more)


def starts(requests, machines=8, running=0, **knobs):
    """How many machines *requests* in flight at once start, when *running* ones are up and idle."""
    load = {f"m{n}": 0 for n in range(machines)}
    states = {name: State.STARTED if n < running else State.STOPPED for n, name in enumerate(load)}
    started = 0
    for _ in range(requests):
        choice = choose([View(name, states[name], load[name]) for name in load], **knobs)
        started += isinstance(choice, Start)
        states[choice.machine] = State.STARTING
        load[choice.machine] += 1
    return started


@pytest.mark.parametrize(("reading", "per_machine"), [("above", 2), ("at-or-above", 1)])
def test_requests_in_flight_start_machines_by_either_reading_of_the_soft_limit(reading, per_machine):
    """With a soft limit of 1, "above" lets a machine take two before the next is started, "at or above" one."""
    for requests in range(1, 9):
        expected = -(-requests // per_machine)
        assert starts(requests, soft_limit_reading=reading) == expected
        assert starts(requests, running=1, soft_limit_reading=reading) == expected - 1


def test_the_older_reading_starts_one_machine_and_no_more():
    assert starts(6, autostart_reach="zero-to-one") == 1


def test_a_start_only_at_the_hard_limit_is_a_reading_too():
    views = [up("a", 2), down("b")]
    assert choose(views, hard=3, start_threshold="hard-limit") == Forward("a")
    assert choose([up("a", 3), down("b")], hard=3, start_threshold="hard-limit") == Start("b")
    assert choose(views, hard=3) == Start("b")


def test_nothing_goes_to_a_machine_at_its_hard_limit():
    assert choose([up("a", 2)], hard=2) == Full()
    assert choose([up("a", 2), up("b", 1)], hard=2) == Forward("b")
    assert choose([]) == Nobody()


def test_a_stopped_machine_is_not_started_where_that_is_switched_off():
    assert route([down("a")], Wish(), Limits(), Knobs(), random.Random(0), auto_start=False) == Nobody()
    assert choose([down("a")], wish=Wish(may_start=False)) == Nobody()


def test_the_nearest_region_comes_first_and_soft_limits_do_not_push_traffic_away():
    near, far = up("near", 1, region="ams"), up("far", 0, region="fra", distance=1)
    assert choose([far, near]) == Forward("near")
    assert choose([down("far", distance=1), down("near")]) == Start("near")
    wish = Wish(prefer_regions=("fra",))
    assert choose([far, near], wish=wish) == Forward("far")
    assert choose([far, near], wish=Wish(regions=("lax",))) == Nobody()


def test_one_that_just_stopped_is_started_only_if_no_other_can_be():
    assert all(choose([down("a", recently_stopped=True), down("b")], seed=seed) == Start("b") for seed in range(20))
    assert choose([down("a", recently_stopped=True)]) == Start("a")


def test_load_is_seen_in_bands_or_exactly_or_not_at_all():
    views = [up("a", 3), up("b", 0)]
    picked = {choose(views, soft=5, seed=seed).machine for seed in range(40)}
    assert picked == {"a", "b"}, "two machines below the soft limit look the same to the proxy"
    assert {choose(views, soft=5, seed=seed, balance="least-loaded").machine for seed in range(40)} == {"b"}
    turns = [route(views, Wish(), Limits(5), Knobs(balance="round-robin"), random.Random(0), turn=n) for n in range(4)]
    assert [turn.machine for turn in turns] == ["a", "b", "a", "b"]


def test_a_forced_machine_has_no_substitute_and_a_preferred_one_does():
    views = [up("a"), down("b")]
    assert choose(views, wish=Wish(only="b")) == Start("b")
    assert choose(views, wish=Wish(only="c")) == Nobody()
    assert choose(views, wish=Wish(prefer="b")) == Start("b")
    assert choose(views, wish=Wish(prefer="c")) == Forward("a")
    assert choose(views, wish=Wish(besides=frozenset({"a"}))) == Start("b")


# fly-replay


def test_both_forms_of_fly_replay_are_read():
    value = 'region="fra,lhr"; instance=148e; prefer_instance=9080;app=other;state=x=1;elsewhere=true;timeout=800ms'
    assert from_header(value) == Replay(("fra", "lhr"), "148e", "9080", "other", "x=1", True, 0.8)
    assert from_json(b'{"region": ["fra"], "elsewhere": true, "timeout": "10s", "fallback": "force_self"}') == Replay(
        regions=("fra",), elsewhere=True, timeout_s=10.0, fallback="force_self"
    )
    assert from_header("region=any").regions == ()


@pytest.mark.parametrize("value", ["", "nonsense", "instance=a;colour=red", "timeout=soon;instance=a", "fallback=no"])
def test_a_replay_that_cannot_be_read_is_refused(value):
    with pytest.raises(InvalidReplayError):
        from_header(value)


def test_what_is_not_emulated_says_so():
    for body in (b'{"instance": "a", "transform": {"path": "/"}}', b'{"instance": "a", "cache": {"ttl": 10}}'):
        with pytest.raises(NotEmulatedError):
            from_json(body)
    with pytest.raises(NotEmulatedError):
        from_header("region=eu")
    with pytest.raises(InvalidReplayError):
        from_json(b"[]")


def test_the_source_of_a_replay_is_told_in_either_spelling():
    assert source_header("148e", "ams", 2.5, "s", ";") == (
        ("fly-replay-src", "instance=148e;region=ams;t=2500000;state=s"),
    )
    assert source_header("148e", "ams", 0.0, None, ",")[0][1] == "instance=148e,region=ams,t=0"


# Knobs and faults


def test_every_knob_says_what_it_does_and_where_it_comes_from():
    for knob in Knobs():
        assert knob.doc
        assert knob.source
        assert not knob.choices or knob.value in knob.choices


def test_knobs_are_read_from_text_and_all_errors_come_at_once():
    changed = Knobs().changed({"boot_s": "0.1..0.2", "gossip_s": "0.5", "elsewhere_starts": "true", "start_burst": "5"})
    assert (changed.boot_s, changed.gossip_s) == ((0.1, 0.2), (0.5, 0.5))
    assert (changed.elsewhere_starts, changed.start_burst) == (True, 5)
    with pytest.raises(ValueError, match=r"boot_s='soon'.*no knob is called 'colour'.*soft_limit_reading='x'"):
        Knobs().changed({"boot_s": "soon", "colour": "red", "soft_limit_reading": "x"})
    with pytest.raises(ValueError, match="in order"):
        Knobs(boot_s=(2.0, 1.0))
    with pytest.raises(ValueError, match="one of above, at-or-above"):
        Knobs(soft_limit_reading="below")
    with pytest.raises(ValueError, match="not negative"):
        Knobs(time_scale=-1.0)


def test_a_fault_strikes_by_its_own_seeded_dice():
    """The same seed gives the same story, and another fault beside it does not change it."""
    alone = Dice(Faults(drop_connect=0.3), seed=7)
    beside = Dice(Faults(drop_connect=0.3, slow_start=0.5), seed=7)
    story = [alone.strikes("drop_connect") for _ in range(200)]
    other = []
    for _ in range(200):
        beside.strikes("slow_start")
        other.append(beside.strikes("drop_connect"))
    assert story == other
    assert 30 < sum(story) < 90
    assert not alone.strikes("slow_start")


def test_a_fault_may_be_bounded_by_a_count():
    dice = Dice(Faults(drop_connect="1x2"), seed=0)
    assert [dice.strikes("drop_connect") for _ in range(4)] == [True, True, False, False]
    dice.set(Faults(drop_connect="1x1"))
    assert [dice.strikes("drop_connect") for _ in range(2)] == [True, False]


def test_wrong_faults_are_named_all_at_once():
    assert all(FAULTS.values())
    with pytest.raises(ValueError, match=r"no fault is called 'colour'.*drop_connect='2'"):
        Faults(colour=1, drop_connect="2")


# Events


def test_runs_and_their_cost_are_read_from_the_events():
    log = EventLog()
    for at, kind, fields in [
        (1.0, "machine.starting", {"source": "proxy"}),
        (2.0, "machine.started", {}),
        (5.0, "machine.restarting", {"exit_code": 3}),
        (6.0, "machine.starting", {"source": "restart-policy"}),
        (7.0, "machine.started", {}),
        (9.5, "machine.stopped", {"exit_code": 0, "requested": False}),
        (10.0, "machine.starting", {"source": "proxy"}),
        (11.0, "machine.started", {}),
    ]:
        log.append(Event(at, kind, "m", fields))
    assert [(run.source, run.exit_code) for run in log.runs("m")] == [
        ("proxy", 3),
        ("restart-policy", 0),
        ("proxy", None),
    ]
    assert [run.billed_s(12.0) for run in log.runs("m")] == [3.0, 2.5, 1.0]


def test_the_log_is_bounded_and_still_knows_what_is_new():
    log = EventLog(max_events=3)
    assert MAX_EVENTS > 1000
    heard = []
    end = log.listen(heard.append)
    for n in range(5):
        log.append(Event(float(n), "tick"))
    end()
    log.append(Event(5.0, "tick"))
    assert [event.at for event in log.since(0)] == [3.0, 4.0, 5.0]
    assert [event.at for event in log.since(5)] == [5.0]
    assert log.since(6) == []
    assert [event.at for event in heard] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert (
        str(Event(1.5, "machine.stopped", "m", {"exit_code": 0})) == "    1.500 machine.stopped machine=m exit_code=0"
    )
