"""`waker demo`, through the installed command: what it counts is true, and it leaves nothing behind."""

import fcntl
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import termios
import uuid

import pytest
from harness import BIN, cmdline, until

MARK = "DEMO_TEST_MARK"


class Demo:
    """`waker demo` as a process of a test, and everything that it starts, found by a mark in the environment."""

    def __init__(self, processes, tmp_path):
        self._processes = processes
        self._mark = f"{MARK}={uuid.uuid4()}"
        self.tmp = tmp_path / "tmp"
        self.tmp.mkdir()

    def start(self, *arguments, env=None, **options):
        return self._processes([f"{BIN}/waker", "demo", *arguments], env=self.env(**(env or {})), **options)

    def env(self, **more):
        name, _, value = self._mark.partition("=")
        return {"TMPDIR": str(self.tmp), name: value, **more}

    def pids(self, *words):
        """Every process with the mark, whatever its session, whose command line contains all *words*."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if self._mark.encode() in file.read().split(b"\0") and set(words) <= set(cmdline(int(name))):
                        found.append(int(name))
            except OSError:
                continue
        return found

    def files(self):
        return os.listdir(self.tmp)


@pytest.fixture
def demo(processes, tmp_path):
    made = Demo(processes, tmp_path)
    yield made
    for pid in made.pids():
        os.kill(pid, signal.SIGKILL)


def test_three_machines_wake_drain_and_stop_and_json_is_one_object(demo):
    # The user's own settings are not the machines'.
    process = demo.start(
        "--json", "--jobs", "9", "--seed", "5", env={"WORKER_TOKENS": "secret", "WAKER_TOKEN": "other"}
    )
    assert process.wait() == 0, process.text()
    assert process.lines == []
    (line,) = process.out
    result = json.loads(line)
    assert list(result) == ["jobs", "wake", "machines"]
    assert result["jobs"] == {"enqueued": 9, "done": 9, "lost": 0, "duplicated": 0}
    assert list(result["wake"]) == ["requested", "distinct", "cold", "rounds", "elapsed_s"]
    assert [result["wake"][name] for name in ("requested", "distinct", "cold")] == [3, 3, 3]
    machines = result["machines"]
    assert [list(machine) for machine in machines] == [
        ["id", "exit_code", "jobs", "started_s", "billed_s", "useful_s"] for _ in range(3)
    ]
    assert [machine["exit_code"] for machine in machines] == [0, 0, 0]
    assert sum(machine["jobs"] for machine in machines) == 9
    assert all(machine["billed_s"] >= machine["useful_s"] for machine in machines)
    assert (demo.files(), demo.pids()) == ([], [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_everything_that_it_started(demo, number):
    process = demo.start("--jobs", "6", "--machines", "2")
    process.saw(" started")
    assert len(demo.pids()) > 1
    process.signal(number)
    assert process.wait() == 128 + number
    assert process.lines == ["waker demo: interrupted; every machine was ended, and the temporary files are gone"]
    assert (demo.files(), demo.pids()) == ([], [])


def test_a_signal_while_the_pictures_are_made_ends_it_too(demo):
    process = demo.start("--jobs", "5000")
    until(demo.files, "it has begun")
    process.signal(signal.SIGHUP)
    assert process.wait() == 128 + signal.SIGHUP
    assert (demo.files(), demo.pids()) == ([], [])


def test_no_machine_outlives_a_demo_that_was_killed(demo):
    process = demo.start("--jobs", "6", "--machines", "2")
    process.saw(" started")
    process.signal(signal.SIGKILL)
    process.wait()
    until(lambda: not demo.pids(), "all processes are gone")


def test_it_ends_when_nobody_reads_what_it_prints(demo):
    command = f"{BIN}/waker demo --jobs 3 --machines 1 | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env={**os.environ, **demo.env()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    assert (demo.files(), demo.pids()) == ([], [])


def test_what_is_lost_or_run_twice_is_counted(demo, tmp_path):
    """A job whose picture is gone leaves no result; one that wrote down twice that it ran was run twice."""
    process = demo.start("--jobs", "4", "--machines", "1", "--keep", "here")
    process.saw("machine, stopped")  # a machine takes half a second to boot
    (tmp_path / "here/pictures/0003.jpg").unlink()
    (tmp_path / "here/ran/earlier.jsonl").write_text('{"picture": "0001.jpg", "sha256": "", "useful_s": 1}\n')
    assert process.wait() == 1
    process.saw("jobs", "3 done, 1 lost, 1 run twice")
    process.saw("failed", "1 job left no right result: 0003.jpg")
    process.saw("failed", "the job for 0003.jpg is delayed: FileNotFoundError")
    assert sorted(os.listdir(tmp_path / "here")) == sorted(["jobs.db", "machines.log", "pictures", "ran", "thumbnails"])
    assert sorted(os.listdir(tmp_path / "here/thumbnails")) == ["0001.jpg", "0002.jpg", "0004.jpg"]


def test_a_machine_that_fails_makes_the_demo_fail_though_nothing_is_lost(demo):
    """Its drainer is killed: the machine leaves with 137, the platform starts it again, and all jobs are done."""
    process = demo.start("--jobs", "8", "--machines", "1")
    process.saw("1 of 8 jobs")
    (drainer,) = demo.pids("drain")
    os.kill(drainer, signal.SIGKILL)
    assert process.wait() == 1
    process.saw("jobs", "8 done, 0 lost")
    process.saw("failed", "left with 137, 0; its last lines")
    assert (demo.files(), demo.pids()) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "0", "--machines", "99"], "--jobs 0: expected a number from 1 to.*\n.*--machines 99: expected"),
        (["--jobs", "many"], "--jobs: invalid int value: 'many'"),
        (["--keep", "."], "there is something in that folder"),
        (["--keep", "/proc/nowhere"], "cannot make a folder at /proc/nowhere: "),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_options_are_a_sentence_and_2(demo, arguments, said):
    process = demo.start(*arguments)
    assert process.wait() == 2
    assert re.search(said, "\n".join(process.lines))
    assert process.out == []
    assert "Traceback" not in process.text()


def test_without_pillow_it_says_what_to_install(demo, tmp_path):
    (tmp_path / "PIL.py").write_text("raise ModuleNotFoundError\n")
    process = demo.start(env={"PYTHONPATH": str(tmp_path)})
    assert process.wait() == 2
    process.saw("Pillow", "pip install 'wake-on-request[demo]'")


def test_a_full_disk_is_a_sentence_and_leaves_nothing(demo):
    process = demo.start("--jobs", "3", preexec=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    assert process.wait() == 1
    (line,) = process.lines
    assert re.fullmatch(r"waker demo: cannot use .*waker-demo-.*: File too large", line)
    assert (demo.files(), demo.pids()) == ([], [])


class Terminal:
    """A command in a terminal of *columns* columns, read to its end."""

    def __init__(self, command, columns, env):
        pid, screen = pty.fork()
        if not pid:
            os.execve(command[0], command, env)  # noqa: S606
        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        read = b""
        try:
            while chunk := os.read(screen, 65536):
                read += chunk
        except OSError:  # the other side is closed
            pass
        finally:
            os.close(screen)
            self.code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.text = read.decode()
        self.lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text).replace("\r", "\n").split("\n")


def terminal(demo, tmp_path, **env):
    environ = {**os.environ, "TERM": "xterm-256color", **demo.env(**env)}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        environ.pop(name, None)
    return Terminal([f"{BIN}/waker", "demo", "--jobs", "3", "--machines", "1"], 80, environ)


def test_a_terminal_shows_a_table_and_a_bar_in_place(demo, tmp_path):
    pytest.importorskip("rich", reason="rich is not installed, and draws the table")
    shown = terminal(demo, tmp_path)
    assert shown.code == 0
    for words in ("making pictures", "jobs .*3/3", "started +[0-9]", "stopped +3 .* 0", "woken +1 of 1 machine"):
        assert any(re.search(words, line) for line in shown.lines), words
    assert max(map(len, shown.lines)) <= 80
    # The cursor was hidden while it drew.
    assert shown.text.rindex("\x1b[?25h") > shown.text.rindex("\x1b[?25l")


def test_without_rich_the_same_is_told_in_plain_lines(demo, tmp_path):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich/__init__.py").write_text("raise ModuleNotFoundError\n")
    shown = terminal(demo, tmp_path, PYTHONPATH=str(tmp_path))
    assert shown.code == 0
    assert "\x1b" not in shown.text
    for words in ("e[0-9a-f]{13} started$", "3 of 3 jobs", "stopped with 0 after 3 jobs", "woken +1 of 1 machine"):
        assert any(re.search(words, line) for line in shown.lines), words
    assert max(map(len, shown.lines)) <= 80
