"""A reading that only an event loop can do, for a probe that is called from anywhere."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["read_now"]

Answer = TypeVar("Answer")


def read_now(reading: Coroutine[Any, Any, Answer]) -> Answer:
    """Run *reading* in an event loop of its own, also where this thread has one that runs. Raises what it raises."""
    if asyncio._get_running_loop() is None:
        return asyncio.run(reading)
    outcome: list[Answer | BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(reading))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    answer = outcome[0]
    if isinstance(answer, BaseException):
        raise answer
    return answer
