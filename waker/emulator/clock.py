"""A clock that only moves when everybody waits: an event loop whose time is the next timer's.

An hour of back-off takes as long as its callbacks. No sockets, processes or threads: what waits for those would wait
for ever, and that is an error here, not a hang.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["NobodyWillWakeUsError", "VirtualLoop", "run_virtual"]

T = TypeVar("T")


class NobodyWillWakeUsError(RuntimeError):
    """Every task waits and no timer is set: the story has stopped."""


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop on a virtual clock. With *shuffle*, what is ready at one moment runs in the seed's order."""

    def __init__(self, seed: int = 0, *, shuffle: bool = False) -> None:
        super().__init__()
        self._now = 0.0
        self._rng = random.Random(seed)
        self._shuffle = shuffle
        self._selector = self  # BaseEventLoop asks its selector once per turn how long to sleep

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """The one place where time passes."""
        if timeout is None:
            raise NobodyWillWakeUsError("every task waits, and no timer is set that could wake one")
        self._now += timeout
        ready = self._ready  # type: ignore[attr-defined]
        if self._shuffle and len(ready) > 1:
            handles = list(ready)
            self._rng.shuffle(handles)
            ready.clear()
            ready.extend(handles)
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass  # called for call_soon_threadsafe; the next turn comes anyway


def run_virtual(
    main: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T], seed: int = 0, *, shuffle: bool = False
) -> T:
    """Run *main* to its end on a virtual clock of its own and return what it returns."""
    loop = VirtualLoop(seed, shuffle=shuffle)
    try:
        return loop.run_until_complete(main() if callable(main) else main)
    finally:
        # Also after a story that stopped: a task left pending would clean up when it is collected, in another loop.
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True) if left else asyncio.sleep(0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
