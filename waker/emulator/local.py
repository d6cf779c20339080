"""The platform for code that is not async: it runs in a thread of its own."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from .events import Event, EventLog
from .faults import Faults
from .message import Reply
from .platform import MachineInfo, Platform
from .virtual import Program

__all__ = ["LocalPlatform"]

T = TypeVar("T")


class LocalPlatform:
    """`with LocalPlatform(["worker", "up", "app.tasks:queue"], machines=3) as platform: …`; arguments as for Platform.

    Its methods may be called from any thread but the platform's own, where event callbacks run.
    """

    def __init__(self, command: Sequence[str] | Program | None = None, **options: Any) -> None:
        self._platform = Platform(command, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> "LocalPlatform":
        """Bring the platform up; raise what prevented it."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="emulated-platform", daemon=True)
        self._thread.start()
        try:
            self._call(self._platform.__aenter__())
        except BaseException:
            self._end_thread()
            raise
        return self

    def close(self) -> None:
        """Kill every machine and take the platform down; harmless when called again."""
        if self._thread is None:
            return
        try:
            self._call(self._platform.close())
        finally:
            self._end_thread()

    def _end_thread(self) -> None:
        assert self._loop is not None  # noqa: S101
        assert self._thread is not None  # noqa: S101
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        self._thread = None

    def __enter__(self) -> "LocalPlatform":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None or self._thread is None:
            work.close()
            raise RuntimeError("the platform is not running; use it inside `with LocalPlatform(…)`")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _read(self, look: Callable[[], T]) -> T:
        return look()

    @property
    def url(self) -> str:
        """The proxy's address: what the Flycast address is on the platform."""
        return self._platform.url

    @property
    def api_url(self) -> str:
        """The Machines API's address, for FLY_FLAPS_BASE_URL; empty unless `api=True`."""
        return self._platform.api_url

    @property
    def api_token(self) -> str:
        """The token that the Machines API accepts."""
        return self._platform.api_token

    @property
    def environment(self) -> dict[str, str]:
        """What points any client at this platform."""
        return self._platform.environment

    @property
    def epoch(self) -> float:
        """Unix time at which the platform began."""
        return self._platform.epoch

    @property
    def now(self) -> float:
        """Seconds since the platform began."""
        return self._platform.now

    @property
    def machines(self) -> tuple[MachineInfo, ...]:
        """All machines as they are now."""
        return self._call(self._read(lambda: self._platform.machines))

    def machine(self, machine_id: str) -> MachineInfo:
        """One machine as it is now."""
        return self._call(self._read(lambda: self._platform.machine(machine_id)))

    @property
    def events(self) -> list[Event]:
        """Everything that happened, oldest first."""
        return self._platform.events

    @property
    def event_log(self) -> EventLog:
        """The log itself."""
        return self._platform.event_log

    def on_event(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call *callback* with each event from now on, in the platform's thread; return what ends that."""
        return self._platform.on_event(callback)

    def logs(self, machine_id: str) -> list[str]:
        """The last lines that a machine printed."""
        return self._platform.logs(machine_id)

    def set_faults(self, faults: Faults) -> None:
        """Switch to other faults from now on."""
        self._call(self._read(lambda: self._platform.set_faults(faults)))

    def request(
        self, method: str = "GET", target: str = "/", *, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Reply:
        """Send a request through the proxy and read its answer to the end."""
        return self._call(self._platform.request(method, target, headers=headers, body=body))

    def start_machine(self, machine_id: str) -> None:
        """Start one as the Machines API does; raise RefusedError if the platform refuses."""
        self._call(self._platform.start_machine(machine_id))

    def stop_machine(self, machine_id: str, signal: str | int | None = None, timeout_s: float | None = None) -> None:
        """Ask one to stop; do not wait for it."""
        self._call(self._platform.stop_machine(machine_id, signal, timeout_s))

    def stop_all(self, timeout_s: float | None = None) -> None:
        """Stop every machine as the platform does, and wait until all have stopped."""
        self._call(self._platform.stop_all(timeout_s))

    def kill(self, machine_id: str) -> None:
        """Kill everything in its VM at once, as a lost host does."""
        self._call(self._platform.kill(machine_id))

    def signal(self, machine_id: str, signal: str | int) -> None:
        """Send a signal to its main process, without asking it to stop."""
        self._call(self._platform.signal(machine_id, signal))

    def destroy(self, machine_id: str) -> None:
        """Remove a machine for good."""
        self._call(self._platform.destroy(machine_id))

    def wait_for(self, condition: Callable[[], Any] | str, timeout_s: float = 30.0, *, since: int = 0) -> Any:
        """Wait for a condition or an event type, as Platform.wait_for. A condition runs in the platform's thread."""
        return self._call(self._platform.wait_for(condition, timeout_s, since=since))

    def wait_all_stopped(self, timeout_s: float = 60.0) -> None:
        """Wait until no machine is up, on its way up, or to be restarted, and no request could start one."""
        self._call(self._platform.wait_all_stopped(timeout_s))
