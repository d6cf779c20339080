"""What every library's hook does with an enqueue: nudge, whatever happens."""

from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Nudges", "nudge_after", "nudge_with"]


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
