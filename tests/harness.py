"""What several tests need: machines as real processes whose events can be waited for, and free ports."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence

BIN = os.path.dirname(sys.executable)
PATIENCE_S = 60.0
# On a machine that is shared a stop takes longer than the five seconds that Fly gives.
PATIENT = {"WORKER_STOP_TIMEOUT_S": "30"}


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket(socket.AF_INET6) as probe:
        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def until(true: Callable[[], object], what: str, *, within_s: float = PATIENCE_S) -> object:
    """Wait for a condition that nothing announces, like a file that appears; AssertionError if it never holds."""
    deadline = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)
    return found


class Answer:
    """One HTTP answer: status, headers with lower-case names, text."""

    def __init__(self, status: int, headers: Mapping[str, str], text: str) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.text = text


def ask(port: int, path: str = "/", *, method: str = "GET", headers: Mapping[str, str] | None = None) -> Answer:
    """One request to a port of this machine; HTTP errors are answers, a refused or broken connection raises OSError."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method, headers=dict(headers or {}))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=PATIENCE_S) as answer:
            return Answer(answer.status, dict(answer.headers), answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), error.read().decode())
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else OSError(error.reason) from error


class Process:
    """A real process whose lines of stderr can be waited for, as they come."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None,
                 preexec: Callable[[], object] | None = None) -> None:  # fmt: skip
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WORKER_", "WAKER_", "FLY_"))}
        self.popen = subprocess.Popen(
            command, env={**inherited, **(env or {})}, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True, preexec_fn=preexec,
        )  # fmt: skip
        self.pid = self.popen.pid
        self._changed = threading.Condition()
        self.lines: list[str] = []  # guarded by _changed
        self.out: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(self.popen.stderr, self.lines), daemon=True),
            threading.Thread(target=self._read, args=(self.popen.stdout, self.out), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream, into: list[str]) -> None:
        for line in stream:
            with self._changed:
                into.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def saw(self, *words: str, within_s: float = PATIENCE_S, times: int = 1) -> str:
        """Wait for a line of stderr or stdout that contains all *words*; returns the last of so many *times*."""

        def found() -> list[str]:
            return [line for line in [*self.lines, *self.out] if all(word in line for word in words)]

        with self._changed:
            ok = self._changed.wait_for(lambda: len(found()) >= times or not self._reading(), within_s)
            assert ok, f"no line with {words} within {within_s} s; there were:\n" + self.text()
            assert len(found()) >= times, f"no line with {words} before the end; there were:\n" + self.text()
            return found()[-1]

    def _reading(self) -> bool:
        return any(reader.is_alive() and reader is not threading.current_thread() for reader in self._readers)

    def text(self) -> str:
        return "\n".join([*self.lines, *self.out])

    def wait(self, within_s: float = PATIENCE_S) -> int:
        """Wait for the end; returns the exit code, negative for a signal."""
        try:
            code = self.popen.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError("did not end; it said:\n" + self.text()) from None
        for reader in self._readers:
            reader.join(5)
        return code

    def signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def end(self) -> None:
        """Kill the whole session, whatever state it is in."""
        # Again until nobody is left: one that we kill may just have started another, which would keep our pipes open.
        while pids := session_pids(self.pid):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(5)
        for reader in self._readers:
            reader.join(5)
        self.popen.stdout.close()
        self.popen.stderr.close()


class Machine(Process):
    """`worker up …` on a port of its own."""

    def __init__(self, *arguments: str, env: Mapping[str, str] | None = None, cwd: str | None = None, folder: str = BIN,
                 port: int | None = None, preexec: Callable[[], object] | None = None) -> None:  # fmt: skip
        self.port = port or free_port()
        environ = {
            "WORKER_PORT": str(self.port),
            "WORKER_GREET_S": "0",
            "WORKER_LINGER_S": "0",
            **PATIENT,
            **(env or {}),
        }
        super().__init__([f"{folder}/worker", "up", *arguments], env=environ, cwd=cwd, preexec=preexec)

    def ask(self, path: str = "/", **options) -> Answer:
        return ask(self.port, path, **options)

    def pid_of(self, program: str) -> int:
        """The pid of "listener" or "drainer"; waits until it runs."""
        word = {"listener": "listen", "drainer": "drain"}[program]

        def find() -> int:
            for pid in session_pids(self.pid):
                words = cmdline(pid)
                if len(words) > 2 and words[1].endswith("_wake_on_request.py") and words[2] == word:
                    return pid
            return 0

        return int(until(find, f"{program} of {self.pid} runs"))


def cmdline(pid: int) -> list[str]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().decode(errors="replace").split("\0")
    except OSError:
        return []


def session_pids(session: int) -> list[int]:
    """Every process of a session, zombies left out."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                    fields = file.read().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(name))
    return found


@contextlib.contextmanager
def running(process: Process) -> Iterator[Process]:
    """End *process* whatever happens, and show what it said when the test fails."""
    try:
        yield process
    except BaseException:
        print(process.text())
        raise
    finally:
        process.end()
