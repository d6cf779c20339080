"""Machines whose VM is a tree of real processes on this host."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from .guest import Boot, GuestFile, Outcome
from .wire import HttpConnection

__all__ = ["PortClaim", "ProcessGuest", "ProcessRunner"]

INIT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "init.py")
LOOPBACK = "127.0.0.1"
# Below the range that the kernel gives to connections and to port 0, so that nobody gets a stopped machine's port.
PORTS = range(20_000, 32_000)
MAX_LINE = 8_192
LAST_WORDS_S = 1.0


class PortClaim:
    """A port that is this machine's as long as the platform lives, bound or not.

    The claim is an abstract unix socket of that name: the kernel gives it up with the process, whatever ends it. Every
    emulator on the host asks for it, and nobody else uses the range by chance.
    """

    def __init__(self, first: int) -> None:
        """Claim the first free port, counting from *first* and around."""
        for offset in range(len(PORTS)):
            port = PORTS[(first + offset) % len(PORTS)]
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                claim.bind(f"\0wake-on-request/emulator/port/{port}")
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("0.0.0.0", port))
            except OSError:
                claim.close()
                continue
            self.port = port
            self._claim = claim
            return
        raise OSError(f"no port is free between {PORTS.start} and {PORTS.stop - 1}")

    def release(self) -> None:
        """Give the port back."""
        self._claim.close()


class ProcessRunner:
    """Starts the machine's commands under an init of their own (init.py)."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        *,
        on_failure: str,
        cwd: str | None,
        log: Callable[[str, str], None],
        process_exited: Callable[[str, int, int], None],
    ) -> None:
        self._commands = [[os.fspath(word) for word in command] for command in commands]
        self._on_failure = on_failure
        self._cwd = cwd
        self._log = log
        self._process_exited = process_exited

    async def boot(self, boot: Boot) -> "ProcessGuest":
        """Wipe the private temporary directory, put the machine's files and volumes there, then start."""
        root = boot.env["TMPDIR"]
        shutil.rmtree(root, ignore_errors=True)
        os.makedirs(root, mode=0o700)
        for path, folder in boot.mounts:
            place = os.path.join(root, path.lstrip("/"))
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.symlink(folder, place)
        for file in boot.files:
            _write(os.path.join(root, file.path.lstrip("/")), file)
        guest = ProcessGuest(boot.machine, boot.port, self._log, self._process_exited)
        await guest.start(self._commands, self._on_failure, dict(boot.env), self._cwd)
        return guest


class ProcessGuest:
    """One run of a machine: its init, and whatever that starts."""

    def __init__(
        self,
        machine: str,
        port: int,
        log: Callable[[str, str], None],
        process_exited: Callable[[str, int, int], None],
    ) -> None:
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.ended_by = 0
        self._env: Mapping[str, str] = {}
        self._cwd: str | None = None
        self._machine = machine
        self._port = port
        self._log = log
        self._process_exited = process_exited
        self._pids: dict[int, int] = {}
        self._spawned = asyncio.Event()

    @property
    def pids(self) -> Sequence[int]:
        """The main processes', in the order of the commands."""
        return tuple(self._pids[index] for index in sorted(self._pids))

    async def start(self, commands: list[list[str]], on_failure: str, env: dict[str, str], cwd: str | None) -> None:
        """Start the init; return when it has started the commands."""
        self._env, self._cwd = env, cwd
        ours, theirs = socket.socketpair()
        arguments = [word for command in commands for word in (str(len(command)), *command)]
        try:
            self._init = subprocess.Popen(  # noqa: ASYNC220 - a few milliseconds; asyncio's own would need a watcher thread
                [sys.executable, "-I", "-S", INIT, str(theirs.fileno()), on_failure, *arguments],
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            self._control, self._orders = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()  # the init ends with it
            self._init.wait()
            raise
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._copy_output())]
        try:
            await self._spawned.wait()
        except asyncio.CancelledError:
            # The platform ends while a machine boots: what was started is not left behind.
            self.kill()
            await self.exited
            raise

    async def connect(self) -> HttpConnection:
        """Connect to the machine's port."""
        return await HttpConnection.open(LOOPBACK, self._port)

    def signal(self, number: int) -> None:
        """Send it to the main processes alone, not to their groups."""
        self._order(f"signal {number}\n")

    def kill(self) -> None:
        """The init kills everything that was ever started in this machine, then ends."""
        self._order("kill\n")

    async def execute(self, command: Sequence[str], stdin: bytes, timeout_s: float) -> Outcome:
        """Run *command* under an init of its own, which leaves nothing behind; it ends with the machine."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", INIT, str(theirs.fileno()), "stop", str(len(command)), *command,
                env=dict(self._env),
                cwd=self._cwd,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        talk = asyncio.ensure_future(process.communicate(stdin))
        tale = asyncio.ensure_future(reader.read())
        try:
            either: set[asyncio.Future[Any]] = {talk, self.exited}
            await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            in_time = talk.done()
            if not in_time:
                writer.write(b"kill\n")
            out, err = await talk
            code, ended_by = _ending((await tale).decode())
        finally:
            writer.close()  # a caller that left: the init kills what runs when this end is closed
            tale.cancel()
        if not in_time and not self.exited.done():
            raise TimeoutError
        return Outcome(code, ended_by, out, err)

    def _order(self, line: str) -> None:
        if not self._orders.is_closing():
            self._orders.write(line.encode())

    async def _follow(self) -> None:
        """Read what the init tells until it has ended."""
        code, self.ended_by = 128 + signal.SIGKILL, int(signal.SIGKILL)  # if somebody killed the init itself
        with suppress(ConnectionError):
            while line := await self._control.readline():
                word, *numbers = line.decode().split()
                if word == "spawned":
                    self._pids[int(numbers[0])] = int(numbers[1])
                    self._spawned.set()
                elif word == "exited":
                    self._pids.pop(int(numbers[0]), None)
                    self._process_exited(self._machine, int(numbers[0]), int(numbers[1]))
                elif word == "ended":
                    code, self.ended_by = int(numbers[0]), int(numbers[1])
        self._orders.close()
        # The control socket closes a moment before the process is gone: this returns at once.
        if self._init.wait() != 0:
            _kill_session(self._init.pid)
        self._spawned.set()
        # What it printed is passed on first; a killed init may have left somebody who still holds the pipe.
        await asyncio.wait([self._tasks[1]], timeout=LAST_WORDS_S)
        self._tasks[1].cancel()
        self.exited.set_result(code)

    async def _copy_output(self) -> None:
        """Pass on what the machine prints, line by line, a long line in pieces."""
        reader = asyncio.StreamReader(limit=MAX_LINE)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), self._init.stdout)
        rest = b""
        try:
            while chunk := await reader.read(MAX_LINE):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) >= MAX_LINE:
                    lines.append(rest)
                    rest = b""
                for line in lines:
                    self._log(self._machine, line.decode(errors="replace"))
            if rest:
                self._log(self._machine, rest.decode(errors="replace"))
        finally:
            transport.close()


def _write(place: str, file: GuestFile) -> None:
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with open(place, "wb") as opened:
        opened.write(file.content)
    os.chmod(place, file.mode)


def _ending(tale: str) -> tuple[int, int]:
    """Exit code and signal, from what an init told in its life."""
    last = tale.split("\n")[-2:-1]
    words = last[0].split() if last else []
    return (int(words[1]), int(words[2])) if words[:1] == ["ended"] else (128 + signal.SIGKILL, int(signal.SIGKILL))


def _kill_session(session: int) -> None:
    """Kill what is left of a session whose leader, the init, was killed by somebody."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                if os.getsid(int(name)) == session:
                    os.kill(int(name), signal.SIGKILL)
