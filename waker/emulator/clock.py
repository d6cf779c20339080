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
        return loop.run_until_complete(_with_cleanup(main() if callable(main) else main))
    finally:
        loop.close()


async def _with_cleanup(main: Coroutine[Any, Any, T]) -> T:
    try:
        return await main
    finally:
        this = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not this]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_asyncgens()
