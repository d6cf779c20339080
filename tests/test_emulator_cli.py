"""`waker emulate` in the foreground, and the pytest fixture that gives the same to users' tests."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest
from harness import BIN

from waker.emulator import Knobs

WAKER = os.path.join(os.path.dirname(sys.executable), "waker")

SERVER = """
import http.server, os, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = os.environ["FLY_MACHINE_ID"].encode() + b" " + os.environ.get("MINE", "").encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        print("served", flush=True)
if "stubborn" in sys.argv:
    signal.signal(signal.SIGINT, lambda *_: print("not yet", flush=True))
else:
    signal.signal(signal.SIGINT, lambda *_: os._exit(6))
http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


class Emulate:
    """`waker emulate …` as a process, its two outputs read line by line."""

    def __init__(self, *arguments, env=None):
        self.process = subprocess.Popen(
            [WAKER, "emulate", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.out, self.err = [], []
        self._news = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.out)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.err)),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream, lines):
        for line in stream:
            with self._news:
                lines.append(line.rstrip("\n"))
                self._news.notify_all()

    def wait_for(self, pattern, lines=None):
        """The first match of *pattern* in a line that was printed or is yet to come."""
        lines = self.out if lines is None else lines

        def found():
            return next((match for line in lines if (match := re.search(pattern, line))), None)

        with self._news:
            assert self._news.wait_for(found, timeout=30), (pattern, self.out, self.err)
            return found()

    def end(self, *signals):
        for number in signals:
            self.process.send_signal(number)
        code = self.process.wait(timeout=30)
        for reader in self._readers:
            reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@pytest.fixture
def emulate():
    running = []

    def start(*arguments, **options):
        running.append(Emulate(*arguments, **options))
        return running[-1]

    yield start
    for each in running:
        if each.process.poll() is None:
            each.end(signal.SIGKILL)


def get(url):
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - our own address
        return answer.read().decode()


def serving(*arguments):
    return [sys.executable, "-c", SERVER, *arguments]


def test_the_platform_runs_in_the_foreground_until_ctrl_c(emulate):
    """It says how to reach it, shows each state, and Ctrl-C stops the machines as the platform does."""
    running = emulate(
        "--machines", 2, "--knob", "time_scale=0.05", "--env", "MINE=yes", "--app", "thumbs", "--", *serving()
    )
    url = running.wait_for(r"curl (http://127\.0\.0\.1:\d+)/")[1]
    running.wait_for(f"WAKER_TARGET={url}")
    machine, mine = get(url).split()
    assert mine == "yes"
    running.wait_for(f"machine.started machine={machine}")
    running.wait_for(rf"^{machine} \| served", running.err)
    assert running.end(signal.SIGINT) == 0
    assert any(f"machine.stopping machine={machine} signal=SIGINT" in line for line in running.out)
    assert re.search(rf"{machine} stopped: 1 runs, .* exit codes: 6", "\n".join(running.out))
    assert not any("request." in line for line in running.out)


def test_a_second_ctrl_c_kills_what_does_not_stop(emulate):
    running = emulate("--knob", "time_scale=0.05", "--kill-timeout", 300, "--machines", 1, "--", *serving("stubborn"))
    get(running.wait_for(r"curl (http://127\.0\.0\.1:\d+)/")[1])
    running.process.send_signal(signal.SIGINT)
    running.wait_for("not yet", running.err)
    assert running.end(signal.SIGINT) == 0


def test_json_is_one_object_a_line(emulate):
    running = emulate("--json", "--knob", "time_scale=0.05", "--machines", 1, *serving())
    running.wait_for("platform.started")
    url = next(event["url"] for event in map(json.loads, running.out) if event["type"] == "platform.started")
    get(url)
    running.wait_for("request.answered")
    assert running.end(signal.SIGTERM) == 0
    events = [json.loads(line) for line in running.out]
    assert [event["type"] for event in events if event["type"].startswith("machine.")] == [
        "machine.created",
        "machine.starting",
        "machine.started",
        "machine.stopping",
        "machine.stopped",
    ]
    assert events[-1]["type"] == "platform.stopped"


def test_it_ends_when_nobody_reads_what_it_prints():
    """`waker emulate … | head`: the machines are stopped in order, and nothing complains."""
    arguments = ["--json", "--knob", "time_scale=0.05", "--machines", "1", *serving()]
    with subprocess.Popen([WAKER, "emulate", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        try:
            url = next(event["url"] for event in map(json.loads, running.stdout) if event["type"] == "platform.started")
            running.stdout.close()
            with contextlib.suppress(OSError):
                get(url)  # it is on its way out as soon as it has something to print
            assert running.wait(timeout=30) == 0
            assert b"Traceback" not in running.stderr.read()
        finally:
            running.kill()


def test_several_processes_in_each_machine(emulate):
    quoted = f"{sys.executable} -c 'import time; time.sleep(600)'"
    running = emulate(
        "--process", quoted, "--process", f"{sys.executable} -c 'raise SystemExit(3)'", "--knob", "time_scale=0.05",
        "--knob", "process_failure=stop", "--machines", 1,
    )  # fmt: skip
    url = running.wait_for(r"curl (http://127\.0\.0\.1:\d+)/")[1]
    with pytest.raises(OSError, match="503"):
        get(url)
    running.wait_for(r"machine.process_exited .* process=1 exit_code=3")
    assert running.end(signal.SIGINT) == 0


def run(*arguments):
    done = subprocess.run([WAKER, "emulate", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def api(environment, method, path, body=None):
    """A request by what was printed alone."""
    request = urllib.request.Request(  # noqa: S310 - our own address
        f"{environment['FLY_FLAPS_BASE_URL']}/v1/apps/{environment['FLY_APP_NAME']}{path}",
        method=method,
        headers={"authorization": f"Bearer {environment['FLY_API_TOKEN']}"},
        data=None if body is None else json.dumps(body).encode(),
    )
    with urllib.request.urlopen(request, timeout=70) as answer:  # noqa: S310
        return json.loads(answer.read())


def test_the_printed_environment_points_any_client_at_the_api_and_the_proxy(emulate):
    running = emulate(
        "--machines", 0, "--app", "jobs", "--knob", "time_scale=0.02", "--image", "shell=sh -c 'echo ran; exit 3'"
    )
    running.wait_for("Ctrl-C")
    lines = [line.split() for line in running.out if line.strip().startswith("export ")]
    environment = dict(line[1].split("=", 1) for line in lines)
    assert set(environment) == {"FLY_APP_NAME", "FLY_API_TOKEN", "FLY_FLAPS_BASE_URL", "WAKER_TARGET"}
    machine = api(environment, "POST", "/machines", {"config": {"image": "shell", "restart": {"policy": "no"}}})
    running.wait_for(rf"^{machine['id']} \| ran", running.err)
    assert api(environment, "GET", f"/machines/{machine['id']}/wait?state=stopped")["ok"] is True
    events = api(environment, "GET", f"/machines/{machine['id']}")["events"]
    assert events[0]["request"]["exit_event"]["exit_code"] == 3
    assert running.end(signal.SIGINT) == 0


def test_json_begins_with_the_environment(emulate):
    running = emulate("--machines", 1, "--json", "--", "sleep", "600")
    line = running.wait_for(r"^.*environment.*$")[0]
    environment = json.loads(line)
    assert environment["type"] == "environment"
    assert [machine["state"] for machine in api(environment, "GET", "/machines")] == ["stopped"]
    assert running.end(signal.SIGINT) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a command, or processes"),
        (["--machines", "-1", "--restart", "never", "--", "true"], r"machines=-1.*restart='never'"),
        (["--knob", "colour=red", "--knob", "boot_s=soon", "--", "true"], r"colour.*boot_s='soon'"),
        (["--fault", "drop_connect=often", "--", "true"], "drop_connect='often': expected a probability like"),
        (["--env", "nothing", "--", "true"], "expected NAME=VALUE"),
        (["--process", "'", "--process", "x"], "quotation"),
        (["--port", "1", "--host", "203.0.113.1", "--", "true"], "cannot listen"),
    ],
)
def test_bad_input_is_a_sentence_and_2(arguments, said):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.search(said, err)


def test_knobs_and_faults_are_listed_with_what_they_mean():
    _, knobs, _ = run("--list-knobs")
    for knob in Knobs():
        assert f"\n{knob.name}=" in f"\n{knobs}"
        assert knob.doc in knobs
    assert "soft_limit_reading=above (above | at-or-above)" in knobs
    assert "drop_connect\n    a connect to a machine fails" in run("--list-faults")[1]


# The fixture


def test_the_fixture_gives_a_platform_to_a_test(fly_platform):
    platform = fly_platform(serving(), machines=1, knobs=Knobs(time_scale=0.05))
    assert get(platform.url).split() == [platform.machines[0].id]


def test_the_plugin_also_works_beside_a_waker_of_the_users_own(tmp_path):
    """Users have a `waker.py` in the working directory; the plugin reaches ours all the same."""
    (tmp_path / "waker.py").write_text("raise SystemExit('the user's waker was imported')\n")
    (tmp_path / "test_mine.py").write_text(
        "import sys\n"
        "def test_mine(fly_platform):\n"
        "    platform = fly_platform([sys.executable, '-c', ''], machines=1)\n"
        "    platform.start_machine(platform.machines[0].id)\n"
        "    platform.wait_all_stopped()\n"
        "    assert platform.machines[0].exit_code == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_plugin_imports_nothing_until_it_is_used(tmp_path):
    (tmp_path / "test_none.py").write_text(
        "import sys\ndef test_none():\n    assert not {'waker', 'aiohttp', 'httpx'} & set(sys.modules)\n"
    )
    # pytest-aiohttp, where it is installed, imports aiohttp itself.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:aiohttp", "test_none.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_a_port_that_is_none_is_a_sentence() -> None:
    """Neither a traceback nor the free one."""
    for port in ("99999", "-1", "http"):
        done = subprocess.run(
            [f"{BIN}/waker", "emulate", "--port", port, "--", "true"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "expected" in done.stderr
        assert "Traceback" not in done.stderr
