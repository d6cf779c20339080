"""What a machine costs from its start to its end, beside stock supervisord with the same two programs.

`python benchmarks/machine.py [--json] [--rounds N]`. Measures what is installed beside this interpreter, not the
checkout. Each measured process tree has one CPU, by affinity; this program stays on the others. Sides take turns in the
same run. Everything is byte-compiled, which is checked. Times are of CLOCK_MONOTONIC, from just before the exec.

The stock side is supervisord 4 as it comes, in the foreground, with LISTENER (a small aiohttp application) and DRAINER
(the embedded queue, run to its end). Where the machine has to end by itself, and where its memory is read, it has
LEAVER, too: the usual event listener, which stops supervisord when the drainer has exited. "Bare" is LISTENER alone.
Both sides run the same TASKS on a queue of their own.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

BIN = os.path.dirname(os.path.abspath(sys.executable))
PATIENCE_S = 60.0
CONNECT_AGAIN_S = 0.0005
# Longer than either side's listener takes to start, and a held answer to be sent.
LONG_JOB_S = 1.2
IDLE_S = 10.0
# The listener has a last look at the drainer ten seconds after a ring (a sixth of WORKER_WEDGE_S).
IDLE_AFTER_S = 12.0
# PSS is read when the dust of the start has settled.
SETTLED_S = 0.5
# The machine of a row that needs an idle one: both sides' names for it.
STAYING = {"WORKER_LINGER_S": "600", "STAY": "1"}
# What must not differ from an image, by the beginnings of its names.
COLOURED = ("PYTHON", "WORKER_", "WAKER_", "FLY_", "SSL_CERT_")
# Folders of the standard library that no start meets.
UNUSED = ("site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip")

TASKS = """
import os, time
from waker import SqliteQueue

queue = SqliteQueue("jobs.db")

def say(event):
    at = time.monotonic()
    events = os.open("events", os.O_WRONLY)
    os.write(events, f"{event} {at}\\n".encode())
    os.close(events)

@queue.task
def job(seconds):
    say("began")
    time.sleep(seconds)
    say("ended")
"""

LISTENER = """
import os
from aiohttp import web

async def answer(request):
    return web.Response(text="awake\\n")

app = web.Application()
app.router.add_route("*", "/{path:.*}", answer)
web.run_app(app, port=int(os.environ["WORKER_PORT"]), print=None, access_log=None)
"""

DRAINER = """
import os, threading
import tasks

tasks.queue.work(threading.Event())
if "STAY" in os.environ:
    threading.Event().wait()
"""

LEAVER = """
import os, signal, sys

while True:
    print("READY", flush=True)
    header = dict(word.split(":") for word in sys.stdin.readline().split())
    event = dict(word.split(":") for word in sys.stdin.read(int(header["len"])).split())
    print("RESULT 2\\nOK", end="", flush=True)
    if event["processname"] == "drainer":
        os.kill(os.getppid(), signal.SIGTERM)
"""

SUPERVISORD = """
[supervisord]
nodaemon=true
logfile=/dev/null
logfile_maxbytes=0
pidfile=supervisord.pid
{user}

[program:drainer]
command={python} drainer.py
startsecs=0
autorestart=false
stdout_logfile=/dev/fd/1
stdout_logfile_maxbytes=0
redirect_stderr=true

[program:listener]
command={python} listener.py
autorestart=true
stdout_logfile=/dev/fd/1
stdout_logfile_maxbytes=0
redirect_stderr=true
"""

SUPERVISORD_LEAVER = """
[eventlistener:leaver]
command={python} leaver.py
events=PROCESS_STATE_EXITED
"""


class Side:
    """One way to run a machine: a command, in a folder with the programs and the queue."""

    def __init__(self, name: str, folder: str, command: Sequence[str], environ: Mapping[str, str], cpu: int) -> None:
        self.name = name
        self.folder = folder
        self.command = command
        self.environ = environ
        self.cpu = cpu

    @contextlib.contextmanager
    def started(self, jobs: Sequence[float] = (), environ: Mapping[str, str] | None = None) -> Iterator["Run"]:
        """Start it with *jobs* (seconds each) on the queue; whatever is left is killed at the end."""
        for name in os.listdir(self.folder):
            if name.startswith("jobs.db"):
                os.unlink(os.path.join(self.folder, name))
        if jobs:
            code = "import sys, tasks\nfor seconds in sys.argv[1:]: tasks.job.enqueue(float(seconds))"
            command = [sys.executable, "-c", code, *map(str, jobs)]
            subprocess.run(command, cwd=self.folder, env=self.environ, check=True, timeout=PATIENCE_S)
        run = Run(self, {**self.environ, **(environ or {})})
        try:
            yield run
        except Exception as error:
            with open(os.path.join(self.folder, "log"), encoding="utf-8", errors="replace") as log:
                error.add_note(f"{self.name} said:\n{log.read()}")
            raise
        finally:
            run.end()


class Run:
    """One run of a side, from just before its exec."""

    def __init__(self, side: Side, environ: Mapping[str, str]) -> None:
        self.port = _free_port()
        self._cpu_at: dict[str, float] = {}
        self._at: dict[str, float] = {}
        self._said = threading.Condition()  # guards the two above
        # Opened for writing, too, so that the writers need not wait for us nor we for them.
        self._events = os.open(os.path.join(side.folder, "events"), os.O_RDWR)
        self._reader = threading.Thread(target=self._read, daemon=True)
        everywhere = os.sched_getaffinity(0)
        with open(os.path.join(side.folder, "log"), "wb") as log:
            # The child inherits the affinity of the thread that starts it.
            os.sched_setaffinity(0, {side.cpu})
            self.began = time.monotonic()
            self.process = subprocess.Popen(
                side.command, cwd=side.folder, env={**environ, "WORKER_PORT": str(self.port)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            os.sched_setaffinity(0, everywhere)
        # Where we may, as root, the tree goes before what else this host does: the group of its session weighs most.
        with contextlib.suppress(OSError), open(f"/proc/{self.process.pid}/autogroup", "w", encoding="ascii") as group:
            group.write("-20")
        self._reader.start()

    def _read(self) -> None:
        with open(self._events, "rb", buffering=0) as events:
            while (line := events.readline().decode().split()) and line[0] != "over":
                event, at = line
                cpu_ms = self.cpu_ms()
                with self._said:
                    self._at.setdefault(event, float(at))
                    self._cpu_at.setdefault(event, cpu_ms)
                    self._said.notify_all()

    def since_start_ms(self, at: float | None = None) -> float:
        return ((time.monotonic() if at is None else at) - self.began) * 1000

    def event(self, event: str) -> float:
        """Wait until a job says *event* for the first time; when it said so."""
        with self._said:
            if not self._said.wait_for(lambda: event in self._at, PATIENCE_S):
                raise TimeoutError(f"no job {event} within {PATIENCE_S:g} s")
            return self._at[event]

    def cpu_until_ms(self, event: str) -> float:
        """CPU time that the tree had used when a job said *event*."""
        self.event(event)
        return self._cpu_at[event]

    def connect(self) -> socket.socket:
        """Connect as soon as that is possible."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            connection = socket.socket()
            try:
                connection.connect(("127.0.0.1", self.port))
                return connection
            except ConnectionRefusedError:
                connection.close()
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise
            time.sleep(CONNECT_AGAIN_S)

    def ask(self, connection: socket.socket) -> None:
        """Send one request, as a proxy would; returns when the first bytes of a 200 have come."""
        connection.settimeout(PATIENCE_S)
        with connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: machine\r\n\r\n")
            got = connection.recv(4096)
        if not got.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"expected a 200, got {got[:80]!r}")

    def ended(self) -> float:
        """Wait for the end; when that was."""
        # Not wait(timeout): that looks again every 50 ms at last.
        pidfd = os.pidfd_open(self.process.pid)
        ended, _, _ = select.select([pidfd], [], [], PATIENCE_S)
        at = time.monotonic()
        os.close(pidfd)
        if not ended:
            raise TimeoutError(f"still there after {PATIENCE_S:g} s")
        code = self.process.wait()
        if code != 0:
            raise RuntimeError(f"expected exit code 0, got {code}")
        return at

    def pids(self) -> list[int]:
        """The living processes of the tree: each run is a session of its own."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                with (
                    contextlib.suppress(OSError),
                    open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file,
                ):
                    fields = file.read().rpartition(")")[2].split()
                    if int(fields[3]) == self.process.pid and fields[0] != "Z":
                        found.append(int(name))
        return found

    def cpu_ms(self) -> float:
        """CPU time, user and system, that the living processes of the tree have used so far."""
        total_s = 0.0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                total_s += time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) returns for *pid*
        return total_s * 1000

    def pss_mb(self) -> float:
        """Proportional set size of the tree, in MB of 10^6 bytes."""
        return sum(_field(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in self.pids()) * 1024 / 1e6

    def switches(self) -> int:
        """How often a thread of the tree has gone to sleep so far: after so many wake-ups, less one each."""
        count = 0
        for pid in self.pids():
            for thread in os.listdir(f"/proc/{pid}/task"):
                count += _field(f"/proc/{pid}/task/{thread}/status", "voluntary_ctxt_switches:")
        return count

    def end(self) -> None:
        while pids := self.pids():  # again: a supervisor may just have started another one
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        os.write(self._events, b"over\n")
        self._reader.join()


class Start(NamedTuple):
    """One start, ms since just before the exec: port accepts, first job begins, first 200; and the CPU time by then."""

    accepts: float
    job: float
    answer: float
    cpu_at_job: float
    cpu_at_answer: float


def start(side: Side, *, job: bool = True) -> Start:
    """From the start to the first 200, with one short *job* ready, or with no queue at all."""
    with side.started([0.0] if job else []) as run:
        connection = run.connect()
        accepts = run.since_start_ms()
        run.ask(connection)
        answer, cpu_at_answer = run.since_start_ms(), run.cpu_ms()
        if not job:
            return Start(accepts, 0.0, answer, 0.0, cpu_at_answer)
        return Start(accepts, run.since_start_ms(run.event("began")), answer, run.cpu_until_ms("began"), cpu_at_answer)


def leave(side: Side) -> float:
    """From the end of the last job to the end of the first process, in ms; woken by a request, the job a long one."""
    with side.started([LONG_JOB_S]) as run:
        run.ask(run.connect())
        return (run.ended() - run.event("ended")) * 1000


def idle(side: Side) -> float:
    """PSS of the tree in MB, after a job and a request, with the queue still open."""
    with side.started([0.0], STAYING) as run:
        run.ask(run.connect())
        run.event("ended")
        time.sleep(SETTLED_S)
        return run.pss_mb()


def wakeups(side: Side) -> float:
    """Wake-ups a second of the whole tree while it stays with nothing to do."""
    with side.started([0.0], STAYING) as run:
        run.ask(run.connect())
        run.event("ended")
        time.sleep(IDLE_AFTER_S)
        before = run.switches()
        time.sleep(IDLE_S)
        return (run.switches() - before) / IDLE_S


def measure(rounds: int, folder: str, cpu: int) -> tuple[list[dict[str, object]], dict[str, object]]:
    """The rows of the table, and what was measured besides."""
    environ = _environ(folder)
    ours = Side("worker up", _folder(folder, "ours"), [f"{BIN}/worker", "up", "tasks:queue"], environ, cpu)
    stock = Side("supervisord", _folder(folder, "stock"), [f"{BIN}/supervisord", "-c", "two.conf"], environ, cpu)
    leaver = Side("supervisord", stock.folder, [f"{BIN}/supervisord", "-c", "three.conf"], environ, cpu)
    bare = Side("bare aiohttp", stock.folder, [sys.executable, "listener.py"], environ, cpu)
    for side in (ours, stock, leaver, bare):  # files into the page cache, .pyc of what is ours
        start(side, job=side is not bare)

    starts: dict[str, list[Start]] = {"ours": [], "stock": [], "bare": []}
    leaves: dict[str, list[float]] = {"ours": [], "stock": []}
    idles: dict[str, list[float]] = {"ours": [], "stock": [], "two": []}
    for turn in range(rounds):
        _progress(f"round {turn + 1} of {rounds}")
        starts["ours"].append(start(ours))
        starts["stock"].append(start(stock))
        starts["bare"].append(start(bare, job=False))
        leaves["ours"].append(leave(ours))
        leaves["stock"].append(leave(leaver))
        idles["ours"].append(idle(ours))
        idles["stock"].append(idle(leaver))
        idles["two"].append(idle(stock))
    _progress("wake-ups while idle")
    a_second = {"ours": wakeups(ours), "stock": wakeups(leaver)}
    _progress("")

    def column(side: str, field: str) -> list[float]:
        return [getattr(one, field) for one in starts[side]]

    rows = [
        row("start → port accepts", "ms", column("ours", "accepts"), column("stock", "accepts"), most=35, sooner=20),
        row("start → first job begins", "ms", column("ours", "job"), column("stock", "job"), most=200, sooner=6),
        row("start → first 200", "ms", column("ours", "answer"), column("bare", "answer"),
            beside_name="bare aiohttp", most=330, times=1.6),
        row("last job ends → machine has exited", "ms", leaves["ours"], leaves["stock"], most=50, sooner=20),
        row("memory of the idle tree (PSS)", "MB", idles["ours"], idles["stock"], most=52),
        row("CPU time until the first job begins", "ms", column("ours", "cpu_at_job"), column("stock", "cpu_at_job")),
        row("CPU time until the first 200", "ms", column("ours", "cpu_at_answer"), column("stock", "cpu_at_answer")),
        row("wake-ups a second while idle", "", [a_second["ours"]], [a_second["stock"]]),
    ]  # fmt: skip
    return rows, {"pss_of_stock_without_its_event_listener_mb": round(statistics.median(idles["two"]), 1)}


def row(
    what: str, unit: str, ours: list[float], beside: list[float], *, beside_name: str = "stock supervisord",
    most: float | None = None, sooner: float | None = None, times: float | None = None,
) -> dict[str, object]:  # fmt: skip
    """One line of the table. At most so much; *sooner* than the other by this factor; at most *times* the other."""
    mine, other = statistics.median(ours), statistics.median(beside)
    ratio = mine / other if times else other / mine if mine else None
    met = [] if most is None else [mine <= most]
    targets = [] if most is None else [f"≤ {most:g} {unit}"]
    if sooner is not None:
        met.append(other / mine >= sooner)
        targets.append(f"{sooner:g}× sooner")
    if times is not None:
        met.append(mine / other <= times)
        targets.append(f"≤ {times:g}×")
    return {
        "what": what,
        "unit": unit,
        "ours": round(mine, 1),
        "beside": {beside_name: round(other, 1)},
        "ratio": None if ratio is None else round(ratio, 2),
        "ratio_is": "ours to theirs" if times else "theirs to ours",
        "target": ", ".join(targets),
        "met": all(met) if met else None,
        "runs": {"ours": [round(one, 1) for one in ours], beside_name: [round(one, 1) for one in beside]},
    }


def not_compiled() -> list[str]:
    """Modules of the standard library and of site-packages that have no .pyc."""
    missing = []
    for top in {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for folder, folders, files in os.walk(top):
            folders[:] = [name for name in folders if name not in UNUSED and not name.startswith("config-")]
            sources = [os.path.join(folder, name) for name in files if name.endswith(".py")]
            missing += [path for path in sources if not os.path.exists(importlib.util.cache_from_source(path))]
    # A script is not imported, so nobody looks for its .pyc.
    return [path for path in missing if os.path.basename(path) != "_wake_on_request.py"]


def _environ(folder: str) -> dict[str, str]:
    """The environment of what is measured: ours without what would slow down or colour one side.

    PYTHONDONTWRITEBYTECODE is among it, so that user code is compiled once, as in an image; a certificate file named by
    the environment, too, which every import of aiohttp would read.
    """
    mine = {name: value for name, value in os.environ.items() if not name.startswith(COLOURED)}
    return {**mine, "WORKER_LINGER_S": "0", "TMPDIR": folder}


def _folder(parent: str, name: str) -> str:
    """A folder with the programs, as both sides get them."""
    folder = os.path.join(parent, name)
    os.mkdir(folder)
    os.mkfifo(os.path.join(folder, "events"))
    user = "user=root" if os.getuid() == 0 else ""
    two = SUPERVISORD.format(python=sys.executable, user=user)
    files = {
        "tasks.py": TASKS,
        "listener.py": LISTENER,
        "drainer.py": DRAINER,
        "leaver.py": LEAVER,
        "two.conf": two,
        "three.conf": two + SUPERVISORD_LEAVER.format(python=sys.executable),
    }
    for file_name, text in files.items():
        with open(os.path.join(folder, file_name), "w", encoding="utf-8") as file:
            file.write(text)
    return folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _field(path: str, name: str) -> int:
    with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[1])
    return 0  # it has ended meanwhile


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=11, help="runs per number (default: %(default)s)")
    args = parser.parse_args()
    if missing := not_compiled():
        print(
            f"{len(missing)} modules have no .pyc, like {missing[0]}: each start would compile them again. First:\n"
            f"    {sys.executable} -m compileall -q {sysconfig.get_path('stdlib')} {sysconfig.get_path('purelib')}",
            file=sys.stderr,
        )
        return 2
    cpus = os.sched_getaffinity(0)
    cpu = max(cpus)
    os.sched_setaffinity(0, cpus - {cpu} or cpus)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        rows, besides = measure(args.rounds, folder, cpu)
    if args.json:
        print(json.dumps({"rows": rows, **besides}))
        return 0
    for one in rows:
        met = {True: "met", False: "NOT MET", None: ""}[one["met"]]
        print(
            f"{one['what']}: {one['ours']} {one['unit']}, {one['beside']}, ratio {one['ratio']}, {one['target']} {met}"
        )
    print(besides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
