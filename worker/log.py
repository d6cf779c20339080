"""Logs are events: one line, past tense, key=value, on stderr. Nothing is imported for them."""

import sys

__all__ = ["log"]


def log(event: str, **facts: object) -> None:
    """Write one event, as in `wake.accepted ring=3 held_s=0.25`."""
    words = " ".join([event, *(f"{key}={value}" for key, value in facts.items())])
    # One write: lines of the machine's processes do not run into each other.
    sys.stderr.write(words + "\n")
    sys.stderr.flush()
