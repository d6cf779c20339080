"""The drainer's line to the door: one connection for its whole life, over a unix socket, stdlib only.

The words, one line each. The drainer says, and the listener answers in order:

    attach                                  attached | refused WHY
    look                                    token BOOT RUNG
    leave BOOT RUNG                         left | rung | wait SECONDS WHY
    shut                                    shut DEPTH
    state RUNNING SLOTS DONE FAILED PHASE   (no answer)

At any time the listener says `!ring N` (answer with a state, and read the queue), `!ask` (answer with a state) or
`!stop`. The end of the connection without a leave means shut. A listener that was restarted has another boot id, so
that an old token never closes its door; the line is made again by itself, and the drainer looks again.
"""

import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from .door import Token

__all__ = ["Left", "Line", "LineLostError", "Rung", "Wait"]

# How long a new listener may take to answer; supervisor restarts one within a few seconds or gives up.
RECONNECT_S = 15.0
RETRY_S = 0.05
# While a pass is on, how often a change of what is running is told without being asked.
REPORT_S = 5.0


class LineLostError(Exception):
    """There is no listener any more, or it does not want this drainer."""


class Left(NamedTuple):
    """The door is closed: go."""


class Rung(NamedTuple):
    """Somebody rang since the token was taken, or the listener is another one: read again."""


class Wait(NamedTuple):
    """Not now; ask again in so many seconds, or as soon as somebody rings."""

    seconds: float
    why: str


class Line:
    """The drainer's end. The main thread asks; a thread of our own reads, hears stop signals, and reports.

    *report* gives (running, slots, done, failed, phase). *on_stop* is called once, on the line's thread, when the
    machine is to stop: because of `signalled`, or because the listener said so. Every field below is written by the
    line's thread alone, except `_socket` and `_wanted`, which are guarded by `_lock`.
    """

    def __init__(self, path: str, report: Callable[[], tuple[int, int, int, int, str]], on_stop: Callable[[], None],
                 *, first_s: float) -> None:  # fmt: skip
        self._path = path
        self._report = report
        self._on_stop = on_stop
        self._first_s = first_s
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._wanted = 0  # answers still to come on this connection that a caller waits for
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None: the connection broke
        self._news = threading.Event()  # rung, stopped, lost, or connected again: have another look
        self._attached = threading.Event()
        self._lost = ""
        self._ready = False
        self._closed = False
        self._stopping = False
        self.depth = 0
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_w, False)
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._run, name="doorway", daemon=True)

    # -- for the main thread -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to hear signals; they come while user code is still being imported, too."""
        self._thread.start()

    def attach(self) -> None:
        """Tell the listener that a drainer is alive and user code imported. Does not wait for it."""
        self._ready = True
        self._poke(b"a")

    def signalled(self) -> None:
        """From a signal handler: one write to a pipe, nothing else."""
        self._poke(b"s")

    def look(self) -> Token:
        """Take the token. Raises LineLostError if there is no listener to take it from."""
        answer = None
        while answer is None:
            self._stand()
            # Before the question: a ring that lands behind the token must stay news.
            self._news.clear()
            answer = self._ask("look")
        _, boot, rung = answer.split()
        return Token(boot, int(rung))

    def leave(self, token: Token) -> Left | Rung | Wait:
        """Ask the door to close behind us."""
        answer = self._ask(f"leave {token.boot} {token.rung}")
        if answer == "left":
            return Left()
        if answer is None or answer == "rung":
            return Rung()
        _, seconds, why = answer.split()
        return Wait(float(seconds), why)

    def wait(self, seconds: float) -> bool:
        """Wait until there is news (a ring, a stop, another listener) or *seconds* have passed; True for news."""
        return self._news.wait(max(0.0, seconds))

    def report(self) -> None:
        """Tell what is running, without being asked: a pass begins or ends."""
        self._poke(b"r")

    def close(self) -> None:
        """Give the line up (the listener takes it as shut unless the door was left)."""
        self._closed = True
        with self._lock:
            if self._socket is not None:
                self._socket.close()
        self._poke(b"c")

    def _poke(self, why: bytes) -> None:
        try:
            os.write(self._wake_w, why)
        except OSError:
            pass  # full: the line's thread has enough to wake up for

    def _ask(self, question: str) -> str | None:
        """Send *question* and return its answer; None if the connection broke before it came."""
        self._stand()
        with self._lock:
            if self._socket is None:
                return None
            self._wanted += 1
            try:
                self._socket.sendall(question.encode() + b"\n")
            except OSError:
                self._wanted -= 1
                self._attached.clear()
                return None
        return self._answers.get()

    def _stand(self) -> None:
        """Wait until the line stands."""
        if not self._attached.wait(self._first_s + RECONNECT_S) or self._lost:
            raise LineLostError(self._lost or f"no listener answered on {self._path} within {self._first_s:g} s")

    def _send(self, line: str) -> None:
        with self._lock:
            try:
                if self._socket is not None:
                    self._socket.sendall(line.encode() + b"\n")
            except OSError:
                pass  # the reading side notices

    # -- the line's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ready:
            if self._pause(None):
                return
        deadline = time.monotonic() + self._first_s
        while not self._closed:
            try:
                connection = self._connect(deadline)
                self._talk(connection)
            except LineLostError as error:
                self._lost = str(error)
            self._break()
            if self._lost:
                self._attached.set()  # whoever waits for a listener learns that there will be none
                self._news.set()
                # Signals still have to be heard: the main thread may be in a job.
                self._serve_signals()
                return
            deadline = time.monotonic() + RECONNECT_S

    def _connect(self, deadline: float) -> socket.socket:
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(self._path)
                connection.sendall(b"attach\n")
                return connection
            except OSError as error:
                connection.close()
                if time.monotonic() >= deadline:
                    raise LineLostError(f"no listener on {self._path}: {error.strerror}") from error
            if self._pause(RETRY_S):
                raise LineLostError("closed")

    def _pause(self, seconds: float | None) -> bool:
        """Wait, hearing signals; True if the line was closed meanwhile."""
        readable, _, _ = select.select([self._wake_r], [], [], seconds)
        if readable:
            self._heard()
        return self._closed

    def _talk(self, connection: socket.socket) -> None:
        buffer = b""
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        poll.register(self._wake_r, select.POLLIN)
        reported: tuple[int, int, int, int, str] | None = None
        while not self._closed:
            # While jobs run, changes are reported now and then; a drainer that lingers costs nothing.
            running = self._report()[0] > 0
            ready = poll.poll(REPORT_S * 1000 if running else None)
            if any(fd == self._wake_r for fd, _ in ready):
                self._heard()
            if not ready and reported != (now := self._report()):
                reported = now
                self._tell()
            if not any(fd == connection.fileno() for fd, _ in ready):
                continue
            try:
                data = connection.recv(4096)
            except OSError:
                data = b""
            if not data:
                connection.close()
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._hear(connection, line.decode())

    def _hear(self, connection: socket.socket, line: str) -> None:
        if line == "attached":
            with self._lock:
                self._socket = connection
            # We may have begun before there was a listener, and whoever rang meanwhile waits to hear how busy we are.
            self._tell()
            if self._stopping:
                self._send("shut")
            self._attached.set()
            self._news.set()
        elif line.startswith("refused"):
            raise LineLostError(line.replace("refused", "the listener refused:", 1))
        elif line.startswith("!ring"):
            self._tell()  # first: how busy we are as the wake arrives, not with the work that it brings
            self._news.set()
        elif line == "!ask":
            self._tell()
        elif line == "!stop":
            self._stop()
        elif line.startswith("shut"):
            self.depth = int(line.split()[1])
        else:
            with self._lock:
                self._wanted -= 1
            self._answers.put(line)

    def _heard(self) -> None:
        heard = os.read(self._wake_r, 64)
        if b"s" in heard:
            self._stop()
        if b"r" in heard:
            self._tell()

    def _tell(self) -> None:
        self._send("state {} {} {} {} {}".format(*self._report()))

    def _stop(self) -> None:
        """The machine is to stop: close the door at once, also while the main thread is in a job."""
        if self._stopping:
            return
        self._stopping = True
        self._send("shut")
        self._on_stop()
        self._news.set()

    def _break(self) -> None:
        """The connection is gone: whoever waits for an answer gets None and asks the next listener."""
        self._attached.clear()
        with self._lock:
            self._socket = None
            waiting, self._wanted = self._wanted, 0
        for _ in range(waiting):
            self._answers.put(None)
        self._news.set()

    def _serve_signals(self) -> None:
        while not self._closed:
            self._pause(None)

    def _forget(self) -> None:
        """In a forked child: the line belongs to the drainer; a copy of it would keep the door from seeing its end."""
        self._closed = True
        if self._socket is not None:
            self._socket.close()
        os.close(self._wake_r)
        os.close(self._wake_w)
