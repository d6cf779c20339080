"""What can go wrong, named by whose fault it is.

WakeError               everything this package raises on purpose
├── UsageError          the caller's: a bad argument, address or configuration; nothing was sent
│   └── LoadError       `module:name` leads nowhere: not found, or its module raised while it was imported
├── NotWoken            nobody promised anything before the deadline; says what was tried and what was seen
│   └── Unauthorized    the worker knows the wake, but not its token
└── QueueError          the embedded queue's file cannot be used: locked, read-only, full, or not a database
"""

__all__ = ["LoadError", "NotWoken", "QueueError", "Unauthorized", "UsageError", "WakeError"]


class WakeError(Exception):
    """Base of all errors raised on purpose; *exit_code* is what a command ends with."""

    exit_code = 1


class UsageError(WakeError):
    """The caller asked for something that can never work; the message says what to use instead."""

    exit_code = 2


class LoadError(UsageError):
    """`module:name` could not be loaded; the message says which half failed, and where."""


class NotWoken(WakeError):  # noqa: N818 - what happened, in the words of the promise
    """No machine gave a receipt before the deadline."""


class Unauthorized(NotWoken):
    """A worker answered 401: it accepts none of our tokens."""


class QueueError(WakeError):
    """The embedded queue's file cannot be used; the message names the file and the remedy."""
