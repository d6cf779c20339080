"""What every library's hook does with an enqueue: nudge, whatever happens."""

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Nudges", "nudge_after", "nudge_after_transaction", "nudge_with"]

COMMIT_POLL_S = 0.02
COMMIT_WAIT_S = 300.0


class Nudges(Protocol):
    """A Waker or an AsyncWaker, as far as an enqueue needs it."""

    def nudge(self) -> None: ...


def nudge_with(waker: Nudges | None) -> Callable[[], None]:
    """Return a function that nudges, and never raises; the `Waker()` from the environment is made when first needed."""
    nudges = waker

    def nudge() -> None:
        nonlocal nudges
        try:
            if nudges is None:
                from ..client import Waker

                nudges = Waker()
            nudges.nudge()
        except Exception as error:
            import logging

            # The job is in the queue all the same; the watch finds it.
            logging.getLogger("waker").error("nudge.failed error=%s", error)  # noqa: TRY400 - an event, in one line

    return nudge


def nudge_after(owner: Any, name: str, nudge: Callable[[], None]) -> None:
    """Wrap the method *name* of the object *owner*: when a call of it has returned, nudge."""
    method = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        answer = method(*args, **kwargs)
        nudge()
        return answer

    wrapped.__wrapped__ = method  # type: ignore[attr-defined]  # as functools.wraps does, for a bound method
    setattr(owner, name, wrapped)


def nudge_after_transaction(is_open: Callable[[], bool], nudge: Callable[[], None]) -> None:
    """Nudge when the caller's transaction has ended, which no PostgreSQL driver tells of; returns at once.

    *is_open* looks at what the driver knows of the connection, and asks no server. It is looked at for COMMIT_WAIT_S at
    most, and not at all if it is false now.
    """
    try:
        if not is_open():
            nudge()
            return
    except Exception:  # a connection that has been closed
        nudge()
        return

    def wait() -> None:
        deadline = time.monotonic() + COMMIT_WAIT_S
        try:
            while is_open() and time.monotonic() < deadline:
                time.sleep(COMMIT_POLL_S)
        finally:
            nudge()

    threading.Thread(target=wait, name="wake-on-request-commit", daemon=True).start()
