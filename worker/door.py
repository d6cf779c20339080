"""The door: how a drainer leaves without a wake falling into the gap behind it.

Pure: no clock, no socket, no await. Each operation is one step, so the check and the change cannot be torn apart.
The listener owns the only Door and calls it from one thread; nothing else guards it, and nothing else needs to.

The order that a drainer keeps, and the reason that it works:

    token = door.look()          # how often was rung before the queue is read …
    … read the queue …           # … and everything committed before those rings is in this reading
    door.leave(token)            # closes only if nobody rang since; else: read again
"""

from typing import NamedTuple

__all__ = ["LEFT", "OPEN", "SHUT", "Door", "Token"]

OPEN = "open"
LEFT = "left"  # closed by a drainer that has read an empty queue; a look opens it again
SHUT = "shut"  # closed for good: a stop signal, or the drainer is gone


class Token(NamedTuple):
    """What was true when the drainer looked: this boot of the listener, and how often it had been rung."""

    boot: str
    rung: int


class Door:
    """An open flag, a count of rings, and a boot id."""

    __slots__ = ("boot", "looked", "rung", "state")

    def __init__(self, boot: str, state: str = OPEN) -> None:
        """*boot* names this run of the listener. *state* is what the mark of an earlier run of it says."""
        if state not in (OPEN, LEFT, SHUT):
            raise ValueError(f"a door is open, left or shut, not {state!r}")
        self.boot = boot
        self.state = state
        self.rung = 0
        self.looked = 0

    def ring(self) -> int | None:
        """Count a wake and return its number; None if the door is closed, and then nothing was promised."""
        if self.state != OPEN:
            return None
        self.rung += 1
        return self.rung

    def look(self) -> Token:
        """Take the token that `leave` will be compared with. Opens a door that was left, never one that was shut."""
        if self.state == LEFT:
            self.state = OPEN
        self.looked = self.rung
        return Token(self.boot, self.rung)

    def leave(self, token: Token) -> bool:
        """Close if nobody rang since *token* was taken; False means that the queue has to be read again.

        A shut door compares too: the rings before it was shut were promised a reading.
        """
        if token != (self.boot, self.rung):
            return False
        if self.state == OPEN:
            self.state = LEFT
        return True

    def shut(self) -> None:
        """Close for good."""
        self.state = SHUT
