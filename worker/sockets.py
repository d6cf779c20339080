"""The two sockets of a machine, and the stop signals: what has to be there before anything heavy is imported."""

import errno
import os
import signal
import socket
import stat

__all__ = ["LIFELINE", "STOP_SIGNALS", "Signals", "bind", "bind_doorway", "let_signals_in"]

BACKLOG = 1024
# The drainer's end of a pipe from its parent: nothing is ever written, and its end is the end of the machine.
LIFELINE = 3
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)


class Signals:
    """Notes signals from the first millisecond on; supervisor takes them from here when it is ready.

    Fly's pages disagree on the default stop signal (SIGINT or SIGTERM), and a parent may have left SIGINT ignored:
    every stop signal is caught.
    """

    def __init__(self) -> None:
        self.noted: list[int] = []

    def catch(self) -> None:
        for signum in STOP_SIGNALS:
            signal.signal(signum, self.receive)

    def receive(self, signum: int, _frame: object) -> None:
        if signum not in self.noted:
            self.noted.append(signum)

    def get_signal(self) -> int | None:
        return self.noted.pop(0) if self.noted else None


def let_signals_in() -> None:
    """Receive stop signals that were blocked until the handlers stood."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def bind(port: int) -> socket.socket:
    """Bind and listen on *port*, IPv4 and IPv6 in one socket where the host has IPv6. Raises OSError."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    return socket.create_server(("", port), backlog=BACKLOG)


def bind_doorway(path: str) -> socket.socket:
    """Bind the unix socket between listener and drainer, in a folder that only we can enter.

    What an earlier run left is replaced; a socket that somebody listens on, or another file, is not. Raises OSError.
    """
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "it is a file, and no socket of ours", path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(path) == 0:
                raise OSError(errno.EADDRINUSE, "another worker uses it", path)
        os.unlink(path)
    except FileNotFoundError:
        pass
    doorway = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        doorway.bind(path)
        os.chmod(path, 0o600)
        doorway.listen(8)
    except OSError:
        doorway.close()
        raise
    return doorway
