"""A one-off job on this machine: for development, without an account. Its output goes where ours does."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from .errors import JobNotRun
from .records import Exit

__all__ = ["LocalRun", "run_here"]

KILL_AFTER_S = 5.0


class LocalRun:
    """How a run on this machine went. Times are unix times."""

    def __init__(self, ended: Exit, started_at: float, *, timed_out: bool) -> None:
        self.exit = ended
        self.started_at = started_at
        self.timed_out = timed_out


async def run_here(
    command: Sequence[str], env: Mapping[str, str], timeout_s: float | None, started: Callable[[], None]
) -> LocalRun:
    """Run *command* with *env* as its whole environment; what runs longer than *timeout_s* is terminated, then killed.

    Raises JobNotRun if there is no such program.
    """
    try:
        process = await asyncio.create_subprocess_exec(*command, env=dict(env))
    except OSError as error:
        raise JobNotRun(f"cannot run {command[0]!r} here: {error.strerror or error}") from None
    began, timed_out = time.time(), False
    started()
    try:
        try:
            async with asyncio.timeout(timeout_s):
                await process.wait()
        except TimeoutError:
            timed_out = True
    finally:
        if process.returncode is None:
            await _end(process)
    code = process.returncode
    assert code is not None  # noqa: S101 - it was waited for
    signal = -code if code < 0 else None
    ended = Exit(128 + signal if signal else code, signal, requested_stop=timed_out, at=time.time())
    return LocalRun(ended, began, timed_out=timed_out)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Terminate it as the platform would, and kill it if that does not help."""
    for end, patience_s in ((process.terminate, KILL_AFTER_S), (process.kill, None)):
        try:
            end()
            async with asyncio.timeout(patience_s):
                await process.wait()
                return
        except ProcessLookupError:
            return
        except TimeoutError:
            continue
