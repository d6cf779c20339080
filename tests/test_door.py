"""The door: each operation, and every interleaving of a whole run over the real door and the real drainer."""

import itertools

import pytest

from worker.door import LEFT, OPEN, SHUT, Door


def test_a_ring_during_the_last_look_keeps_the_door_open():
    """Look, ring, leave: the ring came after the token, so the queue has to be read again."""
    door = Door("a")
    token = door.look()
    assert door.ring() == 1
    assert not door.leave(token)
    assert door.state == OPEN


def test_a_door_nobody_rang_closes_and_refuses():
    """After a leave no wake is accepted, and none is counted."""
    door = Door("a")
    assert door.leave(door.look())
    assert door.state == LEFT
    assert door.ring() is None
    assert door.rung == 0


def test_a_look_opens_a_door_that_was_left():
    """The drainer gave up on leaving (it did not get the answer) and works on: wakes are welcome again."""
    door = Door("a")
    door.leave(door.look())
    door.look()
    assert door.ring() == 1


def test_a_look_never_opens_a_door_that_was_shut():
    """Rule 2: a stop is for good."""
    door = Door("a")
    door.shut()
    door.look()
    assert door.state == SHUT
    assert door.ring() is None


def test_leave_on_a_shut_door_still_compares():
    """Rule 3: a ring before the shut was promised a reading after it."""
    door = Door("a")
    token = door.look()
    door.ring()
    door.shut()
    assert not door.leave(token)
    assert door.leave(door.look())


def test_a_token_of_an_earlier_listener_never_closes_this_door():
    """A restarted listener has another boot id; what the old one promised is not known here."""
    old, new = Door("a"), Door("b")
    token = old.look()
    assert not new.leave(token)
    assert new.state == OPEN


def test_a_listener_that_finds_the_mark_starts_closed():
    """Rule 2: otherwise it would promise what no drainer keeps."""
    assert Door("b", LEFT).ring() is None
    assert Door("b", SHUT).ring() is None


def test_an_unknown_state_is_refused():
    """The mark is a file; what it says is checked."""
    with pytest.raises(ValueError, match="'ajar'"):
        Door("a", "ajar")


# Every interleaving of one app (commit, ring) and one drainer, for each order that a drainer could keep. The steps are
# the drainer's; the app's two steps land anywhere between them, in their own order. A lost job: the ring was accepted,
# the drainer left with 0, and the job is still there.


def _loses_a_job(order):
    drainer_steps = list(order) * 2  # twice: a refused leave is followed by another pass
    app_steps = ("commit", "ring")
    places = range(len(drainer_steps) + 1)
    for commit_at, ring_at in itertools.combinations_with_replacement(places, len(app_steps)):
        door, jobs, token, empty, accepted, left = Door("a"), 0, None, False, False, False
        for index in range(len(drainer_steps) + 1):
            if index == commit_at:
                jobs += 1
            if index == ring_at:
                accepted = door.ring() is not None
            if index == len(drainer_steps) or left:
                continue
            step = drainer_steps[index]
            if step == "look":
                token = door.look()
            elif step == "work":
                jobs = 0
            elif step == "backlog":
                empty = jobs == 0
            elif step == "leave" and empty and token is not None:
                left = door.leave(token)
        if left and accepted and jobs:
            return commit_at, ring_at
    return None


ORDERS = [(*order, "leave") for order in itertools.permutations(("look", "work", "backlog"))]


@pytest.mark.parametrize("order", [order for order in ORDERS if order[2] != "look"])
def test_a_queue_read_after_the_look_loses_nothing_in_any_interleaving(order):
    """What rang before the token was taken is in the reading; what rings later is compared."""
    assert _loses_a_job(order) is None


@pytest.mark.parametrize("order", [order for order in ORDERS if order[2] == "look"])
def test_a_look_after_the_last_reading_loses_a_job(order):
    """What rings between the reading and the token is neither read nor compared."""
    assert _loses_a_job(order) is not None


def test_without_the_comparison_a_job_is_lost(monkeypatch):
    """A door that closes whatever the token says is everybody else's version of this pattern."""

    def leave_anyway(self, _token):
        self.state = LEFT
        return True

    monkeypatch.setattr(Door, "leave", leave_anyway)
    assert _loses_a_job(("look", "work", "backlog", "leave")) is not None
