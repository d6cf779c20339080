"""The embedded queue, `waker.SqliteQueue`. It runs its own jobs; there is nothing to set and nothing to wait for."""

import sys
import threading
from typing import Any

from . import Backlog, Options, Pulse

__all__ = ["Drain"]


class Drain:
    """Runs the jobs of one SqliteQueue in this process, with the queue's own concurrency."""

    def __init__(self, target: Any, pulse: Pulse, _options: Options) -> None:
        self._queue = target
        self._pulse = pulse
        self._before = 0
        pulse.slots = target.concurrency
        self.broker_errors: tuple[type[BaseException], ...] = (target.Error,)

    def backlog(self) -> Backlog:
        reading: Backlog = self._queue.backlog()
        return reading

    def work(self, stop: threading.Event) -> int:
        self._before = self._pulse.done
        try:
            self._queue.work(stop, self._progress)
        except self._queue.Overran as error:
            # Only the end of this process ends that job; the restart that a non-zero code brings takes up the rest.
            print(f"{error}", file=sys.stderr, flush=True)
            return int(error.exit_code)
        finally:
            self._pulse.running = 0
        return 0

    def release(self) -> None:
        self._queue.release()

    def _progress(self, running: int, done: int) -> None:
        self._pulse.running = running
        self._pulse.done = self._before + done
        self._pulse.failed = self._queue.failed
