"""Any command that drains its queue and exits by itself: `worker up -- php artisan queue:work --stop-when-empty`."""

import signal
import subprocess
import threading
from collections.abc import Sequence

from . import Backlog, Pulse

__all__ = ["Drain"]


class Drain:
    """Runs the command once a pass. Its queue cannot be read, so a pass is the only way to know."""

    broker_errors: tuple[type[BaseException], ...] = ()

    def __init__(self, target: Sequence[str], pulse: Pulse) -> None:
        self._command = list(target)
        self._pulse = pulse
        # Guards _process against a stop that arrives while it is being started.
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def backlog(self) -> Backlog | None:
        return None

    def work(self, stop: threading.Event) -> int:
        """Run the command to its end; a stop signal is passed on to it. Returns its exit code, 128+n for signal n."""
        with self._lock:
            if stop.is_set():
                return 0
            try:
                # It stays in the drainer's process group: the parent ends what is left of that group.
                self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)
            except OSError as error:
                print(f"cannot run {self._command[0]!r}: {error.strerror}", flush=True)
                return 127 if isinstance(error, FileNotFoundError) else 126
        watch = threading.Thread(target=self._pass_stop_on, args=(stop,), daemon=True)
        watch.start()
        self._pulse.running = 1
        try:
            code = self._process.wait()
        finally:
            self._pulse.running = 0
            self._pulse.done += 1
        return code if code >= 0 else 128 - code

    def release(self) -> None:
        """A command that does not stop is killed; what it held is its own queue's affair."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.kill()

    def _pass_stop_on(self, stop: threading.Event) -> None:
        stop.wait()
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
