"""The first process of an emulated machine: starts the machine's processes, and leaves none behind.

Run as a script of its own, with the standard library alone:  init.py CONTROL_FD ON_FAILURE N1 ARG… [N2 ARG…]

It speaks lines on the control socket. Out: `spawned INDEX PID`, `exited INDEX CODE`, `ended CODE SIGNAL`.
In: `signal NUMBER` (to the main processes alone, as the platform does) and `kill`. When the machine ends, or the
emulator does (the control socket closes), everything that was ever started here is killed, daemons and all: this
process is the subreaper of its descendants, so nothing escapes by forking twice or by leaving the session.
"""

import ctypes
import os
import select
import signal
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
KILLED = 128 + signal.SIGKILL
RESPAWN_S = 1.0  # a process that fails at once must not keep the processor busy


def main(argv: list[str]) -> None:
    """Be the init of one run of one machine."""
    control, on_failure, commands = int(argv[0]), argv[1], []
    rest = argv[2:]
    while rest:
        count = int(rest[0])
        commands.append(rest[1 : 1 + count])
        rest = rest[1 + count :]

    os.set_inheritable(control, False)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(ignored, signal.SIG_IGN)

    running = {}
    for index, command in enumerate(commands):
        running[spawn(command)] = index
    report(control, *(f"spawned {index} {pid}" for pid, index in running.items()))

    code = None
    last = ended_by = 0
    due: list[tuple[float, int]] = []
    received = b""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while code is None:
        ready = {fd for fd, _ in poll.poll(1000 * max(0.0, due[0][0] - time.monotonic()) if due else None)}
        while due and due[0][0] <= time.monotonic():
            index = due.pop(0)[1]
            pid = spawn(commands[index])
            running[pid] = index
            report(control, f"spawned {index} {pid}")
        if woken in ready:
            os.read(woken, 4096)
            for pid, status in reaped():
                if pid not in running:
                    continue
                index, last = running.pop(pid), exit_code(status)
                ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
                if len(commands) > 1:
                    report(control, f"exited {index} {last}")
                if code is not None:
                    continue
                if last == 0 or on_failure in ("restart-machine", "stop") or len(commands) == 1:
                    code = last  # a machine stops when any of its processes ends without an error
                elif on_failure == "restart-process":
                    due.append((time.monotonic() + RESPAWN_S, index))
                elif not running:
                    code = last
        if control in ready and code is None:
            chunk = os.read(control, 4096)
            received += chunk
            *lines, received = received.split(b"\n")
            for line in lines:
                word, _, number = line.decode().partition(" ")
                if word == "signal":
                    for pid in running:
                        os.kill(pid, int(number))
                else:
                    code, ended_by = KILLED, signal.SIGKILL
            if not chunk:
                code = KILLED
    kill_everything()
    report(control, f"ended {code} {int(ended_by)}")
    os._exit(0)


def spawn(command: list[str]) -> int:
    """Start *command* with the signal handling of a fresh machine; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], command)  # noqa: S606 - the user's command
    except OSError as error:
        os.write(
            2, f"cannot run {command[0]!r}: {error.strerror}; is it installed, and on the machine's PATH?\n".encode()
        )
    finally:
        os._exit(127)


def reaped() -> list[tuple[int, int]]:
    """Every child that has ended by now, adopted ones too."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not pid:
            return ended
        ended.append((pid, status))


def exit_code(status: int) -> int:
    """128 + the signal for what a signal ended."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def kill_everything() -> None:
    """Kill all descendants. What forks meanwhile is adopted and killed in the next turn; ends when no child is left."""
    while True:
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        for pid in descendants():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        os.waitpid(-1, 0)
        reaped()


def descendants() -> list[int]:
    """All processes below this one, parents first."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # The command's name is in brackets and may hold anything.
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(name))
    found = list(children.get(os.getpid(), ()))
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def report(control: int, *lines: str) -> None:
    """Tell the emulator; it may be gone."""
    try:
        os.write(control, "".join(f"{line}\n" for line in lines).encode())
    except OSError:
        pass


if __name__ == "__main__":
    main(sys.argv[1:])
