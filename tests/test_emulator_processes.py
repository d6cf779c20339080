"""The emulated platform with real machines: processes, sockets, signals, and nothing left behind."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from waker.emulator import Faults, Knobs, LocalPlatform, RefusedError

QUICK = Knobs(time_scale=0.05, connect_attempts=100)

# A machine's program: an HTTP server whose answers and end are asked for in the request's path.
SERVER = """
import http.server, json, os, signal, subprocess, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    connections = 0

    def setup(self):
        super().setup()
        Handler.connections += 1

    def do_GET(self):
        word, _, rest = self.path[1:].partition("/")
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        status, headers = 200, {"wake-machine": os.environ["FLY_MACHINE_ID"], "connections": str(Handler.connections)}
        if word == "hold":
            time.sleep(float(rest))
        elif word == "env":
            body = json.dumps(dict(os.environ)).encode()
        elif word == "size":
            body = b"x" * int(rest)
        elif word == "exit":
            os._exit(int(rest))
        elif word == "abort":
            os.abort()
        elif word == "fork":
            body = fork()
        elif word == "touch":
            left = os.listdir(os.environ["TMPDIR"])
            open(os.path.join(os.environ["TMPDIR"], "mark"), "w").close()
            body = json.dumps(left).encode()
        elif word == "replay" and "fly-replay-src" not in self.headers:
            headers["fly-replay"] = rest
        elif word == "garbage":
            self.wfile.write(b"this is not HTTP\\r\\n\\r\\n")
            self.close_connection = True
            return
        elif word == "old":
            self.wfile.write(b"HTTP/1.0 200 OK\\r\\n\\r\\nuntil the end")
            self.close_connection = True
            return
        elif word == "half":
            self.wfile.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: 100\\r\\n\\r\\nhalf")
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_POST = do_PUT = do_DELETE = do_HEAD = do_PURGE = do_GET

    def log_message(self, *_):
        pass

def fork():
    # A child, a grandchild in a session of its own, and a daemon that has lost its parent.
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(sleep)
    session = subprocess.Popen(sleep, start_new_session=True)
    code = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], stdout=-3, start_new_session=True).pid)"
    daemon = int(subprocess.run([sys.executable, "-c", code, *sleep[:3]], stdout=subprocess.PIPE).stdout)
    return json.dumps([child.pid, session.pid, daemon]).encode()

print("listening", flush=True)
signal.signal(signal.SIGTERM, lambda *_: os._exit(5))
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler)
server.serve_forever()
"""


def serving():
    return [sys.executable, "-c", SERVER]


def program(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


@pytest.fixture
def platforms():
    """`platforms(command, …)` brings a quick platform up; everything is killed with the test."""
    with contextlib.ExitStack() as stack:

        def start(command=None, **options):
            options.setdefault("knobs", QUICK)
            options.setdefault("log", lambda machine, line: None)
            return stack.enter_context(LocalPlatform(command, **options))

        yield start


def ask(platform, path="/", *, method="GET", body=None, headers=None, timeout=30):
    """One request over a real socket: (status, headers, body)."""
    address = urlsplit(platform.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=timeout)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, timeout_s=20):
    """Wait for what nobody announces; a deadline, not a measurement."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


# The loop


def test_a_request_starts_a_stopped_machine_which_serves_and_stops(platforms):
    platform = platforms(serving(), machines=1)
    assert [machine.state for machine in platform.machines] == ["stopped"]
    status, headers, _ = ask(platform)
    assert ask(platform, "/exit/0")[0] == 502
    platform.wait_for("machine.stopped")
    machine = platform.machines[0]
    assert (status, headers["wake-machine"]) == (200, machine.id)
    assert (machine.state, machine.exit_code, len(machine.runs)) == ("stopped", 0, 1)
    assert machine.billed_s == machine.runs[0].stopped_at - machine.runs[0].started_at
    assert platform.logs(machine.id) == ["listening"]


def test_requests_held_at_the_same_time_start_several_machines(platforms):
    platform = platforms(serving(), machines=3, knobs=Knobs(time_scale=0.05, soft_limit_reading="at-or-above"))
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: ask(platform, "/hold/0.5"), range(3)))
    assert len({headers["wake-machine"] for _, headers, _ in answers}) == 3


def test_a_machine_sees_the_environment_of_the_platform(platforms):
    platform = platforms(serving(), machines=2, app="thumbs", region="fra", env={"FLY_REGION": "forged", "MINE": "1"})
    seen = json.loads(ask(platform, "/env")[2])
    machine = platform.machine(seen["FLY_MACHINE_ID"])
    assert len(machine.id) == 14
    assert int(machine.id, 16)
    assert seen["FLY_ALLOC_ID"] == machine.id
    assert (seen["FLY_APP_NAME"], seen["FLY_REGION"], seen["PRIMARY_REGION"]) == ("thumbs", "fra", "fra")
    assert seen["PORT"] == seen["WORKER_PORT"] == str(machine.port)
    assert seen["WORKER_BATON"] == platform.url
    assert seen["MINE"] == "1"
    names = ("PRIVATE_IP", "PUBLIC_IP", "IMAGE_REF", "MACHINE_VERSION", "VM_MEMORY_MB", "PROCESS_GROUP")
    assert all(seen[f"FLY_{name}"] for name in names)


def test_the_temporary_directory_is_the_machines_own_and_wiped_at_each_start(platforms):
    platform = platforms(serving(), machines=1)
    assert json.loads(ask(platform, "/touch")[2]) == []
    assert json.loads(ask(platform, "/touch")[2]) == ["mark"]
    platform.kill(platform.machines[0].id)
    platform.wait_for("machine.restarting")
    assert json.loads(ask(platform, "/touch")[2]) == []


# Exits


@pytest.mark.parametrize(("path", "code"), [("/exit/0", 0), ("/exit/3", 3), ("/abort", 128 + signal.SIGABRT)])
def test_the_exit_code_is_the_main_processes(platforms, path, code):
    platform = platforms(serving(), machines=1, restart="no")
    status, _, body = ask(platform, path)
    platform.wait_for("machine.stopped")
    assert (status, body[:6]) == (502, b"[PC03]")
    assert platform.machines[0].exit_code == code


def test_a_machine_that_fails_is_restarted_and_its_next_run_serves(platforms):
    platform = platforms(serving(), machines=1)
    assert ask(platform, "/exit/3")[0] == 502
    assert platform.wait_for("machine.restarting").fields["exit_code"] == 3
    assert ask(platform)[0] == 200
    assert [run.source for run in platform.machines[0].runs] == ["proxy", "restart-policy"]


def test_when_the_main_process_ends_everything_in_the_machine_ends(platforms):
    """A child, a session of its own, a daemon: the VM is gone, and so are they."""
    platform = platforms(serving(), machines=1)
    pids = json.loads(ask(platform, "/fork")[2])
    assert len(pids) == 3
    assert all(alive(pid) for pid in pids)
    ask(platform, "/exit/0")
    platform.wait_for("machine.stopped")
    assert not any(alive(pid) for pid in pids)


def test_nothing_is_left_when_the_platform_ends(platforms):
    platform = platforms(serving(), machines=1)
    pids = json.loads(ask(platform, "/fork")[2])
    pids += platform.machines[0].pids
    folder = os.path.dirname(json.loads(ask(platform, "/env")[2])["TMPDIR"])
    platform.close()
    assert not any(alive(pid) for pid in pids)
    assert not os.path.exists(folder)
    platform.close()
    with pytest.raises(RuntimeError, match="not running"):
        platform.machine("x")


def test_nothing_is_left_when_the_emulator_is_killed(platforms, tmp_path):
    script = tmp_path / "emulator.py"
    script.write_text(
        "import sys\n"
        "from waker.emulator import Knobs, LocalPlatform\n"
        "command = [sys.executable, '-c', sys.argv[1]]\n"
        "with LocalPlatform(command, machines=1, knobs=Knobs(time_scale=0.05)) as platform:\n"
        "    print(platform.request('GET', '/fork').body.decode(), platform.machines[0].pids[0], flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script), SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"TMPDIR": str(tmp_path)},
    ) as emulator:
        children, _, main = emulator.stdout.readline().decode().rpartition(" ")
        pids = [*json.loads(children), int(main)]
        assert all(alive(pid) for pid in pids)
        emulator.kill()
    until(lambda: not any(alive(pid) for pid in pids))


def test_a_machine_whose_init_is_killed_has_ended(platforms):
    platform = platforms(serving(), machines=1, restart="no")
    ask(platform)
    pid = platform.machines[0].pids[0]
    os.kill(os.getsid(pid), signal.SIGKILL)
    platform.wait_all_stopped()
    assert platform.machines[0].exit_code == 137
    until(lambda: not alive(pid))


def test_a_killed_machine_exits_with_137_and_is_restarted(platforms):
    platform = platforms(serving(), machines=1)
    ask(platform)
    platform.kill(platform.machines[0].id)
    event = platform.wait_for("machine.restarting")
    assert event.fields["exit_code"] == 137
    assert ask(platform)[0] == 200


def test_a_command_that_cannot_be_run_says_so_and_fails(platforms):
    platform = platforms(["no-such-command"], machines=1, restart="no")
    machine = platform.machines[0].id
    platform.start_machine(machine)
    platform.wait_all_stopped()
    assert platform.machine(machine).exit_code == 127
    assert platform.logs(machine) == [
        "cannot run 'no-such-command': No such file or directory; is it installed, and on the machine's PATH?"
    ]


# Stops

STUBBORN = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", '''
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: print("child got it", flush=True))
signal.signal(signal.SIGTERM, lambda *_: print("child got it", flush=True))
print("child ready", flush=True)
while True: time.sleep(60)
'''])
def got(number, frame):
    print("got", number, flush=True)
    if sys.argv[1] == "obeys":
        os._exit(9)
signal.signal(signal.SIGINT, got)
signal.signal(signal.SIGTERM, got)
while True: time.sleep(60)
"""


def started(platform):
    """Start the first machine and wait until its program says that it is ready."""
    machine = platform.machines[0].id
    platform.start_machine(machine)
    until(lambda: any("ready" in line for line in platform.logs(machine)))
    return machine


@pytest.mark.parametrize("kill_signal", ["SIGINT", "SIGTERM"])
def test_a_stop_signals_the_main_process_alone(platforms, kill_signal):
    platform = platforms(program(STUBBORN, "obeys"), machines=1, kill_signal=kill_signal, kill_timeout_s=60)
    machine = started(platform)
    platform.stop_machine(machine)
    platform.wait_all_stopped()
    assert platform.machine(machine).exit_code == 9
    assert platform.machine(machine).runs[-1].requested_stop
    assert platform.logs(machine) == ["child ready", f"got {int(signal.Signals[kill_signal])}"]


def test_who_does_not_stop_in_time_is_killed_with_everything(platforms):
    platform = platforms(program(STUBBORN, "ignores"), machines=1, kill_timeout_s=0.2)
    machine = started(platform)
    pids = platform.machine(machine).pids
    platform.stop_machine(machine)
    platform.wait_all_stopped()
    assert platform.machine(machine).exit_code == 137
    assert not any(alive(pid) for pid in pids)


def test_a_signal_that_nobody_handles_ends_the_machine_also_under_a_parent_that_ignores_it(tmp_path):
    """A shell's background job ignores SIGINT, and what it starts inherits that; a machine does not."""
    script = tmp_path / "emulator.py"
    script.write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from waker.emulator import Knobs, LocalPlatform\n"
        "command = [sys.executable, '-c', sys.argv[1]]\n"
        "with LocalPlatform(command, machines=1, knobs=Knobs(time_scale=0.05), kill_timeout_s=60) as platform:\n"
        "    platform.request()\n"
        "    platform.stop_machine(platform.machines[0].id, 'SIGINT')\n"
        "    platform.wait_all_stopped()\n"
        "    print(platform.machines[0].exit_code)\n"
    )
    done = subprocess.run([sys.executable, str(script), SERVER], capture_output=True, timeout=60, check=False)
    assert b"KeyboardInterrupt" in done.stderr, "Python's own handler was there"
    assert int(done.stdout) in (1, 130)


# Several processes in a machine

IDLE = "import time; time.sleep(600)"


def fails_once(tmp_path):
    """A program that exits with 4 the first time and then stays."""
    code = "import os, sys, time\ntry: os.mkdir(sys.argv[1])\nexcept OSError: time.sleep(600)\nsys.exit(4)"
    return program(code, tmp_path / "mark")


def test_a_machine_stops_when_one_of_its_processes_ends_well(platforms):
    platform = platforms(processes=[program(IDLE), program("")], machines=1)
    platform.start_machine(platform.machines[0].id)
    platform.wait_all_stopped()
    assert platform.machines[0].exit_code == 0


def test_what_follows_a_failing_process_is_a_knob(platforms, tmp_path):
    def run(choice):
        folder = tmp_path / choice
        folder.mkdir()
        knobs = Knobs(time_scale=0.05, process_failure=choice)
        platform = platforms(processes=[program(IDLE), fails_once(folder)], machines=1, knobs=knobs)
        platform.start_machine(platform.machines[0].id)
        return platform

    platform = run("nothing")
    event = platform.wait_for("machine.process_exited")
    assert (event.fields["process"], event.fields["exit_code"]) == (1, 4)
    assert (platform.machines[0].state, len(platform.machines[0].pids)) == ("started", 1)

    platform = run("restart-process")
    platform.wait_for("machine.process_exited")
    until(lambda: len(platform.machines[0].pids) == 2)
    assert len(platform.machines[0].runs) == 1

    platform = run("restart-machine")
    assert platform.wait_for("machine.restarting").fields["exit_code"] == 4
    until(lambda: len(platform.machines[0].runs) == 2 and len(platform.machines[0].pids) == 2)

    platform = run("stop")
    assert platform.wait_for("machine.stopped").fields["exit_code"] == 4


def test_with_nothing_as_the_reading_the_last_process_decides(platforms):
    platform = platforms(
        processes=[program("raise SystemExit(4)"), program("raise SystemExit(6)")], machines=1, restart="no"
    )
    platform.start_machine(platform.machines[0].id)
    platform.wait_all_stopped()
    assert platform.machines[0].exit_code in (4, 6)


# What machines print


def test_output_is_passed_on_line_by_line_and_a_long_line_in_pieces(platforms):
    lines = []
    code = "import sys; print('one'); print('x' * 20000); sys.stderr.write('no end of line')"
    platform = platforms(program(code), machines=1, log=lambda machine, line: lines.append((machine, line)))
    platform.start_machine(platform.machines[0].id)
    platform.wait_all_stopped()
    texts = [line for _, line in lines]
    assert {machine for machine, _ in lines} == {platform.machines[0].id}
    assert "".join(texts).count("x") == 20000
    assert max(map(len, texts)) <= 2 * 8192
    assert any(text.endswith("no end of line") for text in texts)


# HTTP


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PURGE", "HEAD"])
def test_every_method_and_path_reaches_the_machine(platforms, method):
    platform = platforms(serving(), machines=1)
    status, headers, body = ask(
        platform, "/any/%2Fpath?a=b%20c", method=method, body=b"x" if method == "POST" else None
    )
    assert status == 200
    assert headers["fly-request-id"]
    assert "fly.io" in headers["via"]
    assert body == (b"x" if method == "POST" else b"")
    arrived = next(event for event in platform.events if event.type == "request.arrived")
    assert arrived.fields["path"] == "/any/%2Fpath?a=b%20c"


def test_bodies_are_streamed_both_ways(platforms):
    platform = platforms(serving(), machines=1)
    assert ask(platform, "/echo", method="POST", body=b"y" * 5_000_000)[2] == b"y" * 5_000_000
    assert len(ask(platform, "/size/20000000")[2]) == 20_000_000


def test_a_connection_to_a_machine_is_used_again(platforms):
    platform = platforms(serving(), machines=1)
    assert [ask(platform)[1]["connections"] for _ in range(3)] == ["1", "1", "1"]
    other = platforms(serving(), machines=1, concurrency="connections")
    assert [ask(other)[1]["connections"] for _ in range(3)] == ["1", "2", "3"]


def test_what_a_machine_may_answer_and_what_it_may_not(platforms):
    platform = platforms(serving(), machines=1)
    assert ask(platform, "/old")[::2] == (200, b"until the end")
    status, _, body = ask(platform, "/garbage")
    assert status == 502
    assert b"does not answer in HTTP" in body
    with pytest.raises(http.client.IncompleteRead):
        ask(platform, "/half")
    assert ask(platform)[0] == 200


def test_an_answer_may_be_reset_in_the_middle(platforms):
    platform = platforms(serving(), machines=1, faults=Faults(reset_mid_answer="1x1"))
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        ask(platform, "/size/100000")
    assert len(ask(platform, "/size/100000")[2]) == 100_000


def test_what_is_not_emulated_answers_501_and_names_it(platforms):
    platform = platforms(serving(), machines=1)
    status, _, body = ask(platform, headers={"connection": "upgrade", "upgrade": "websocket"})
    assert (status, body) == (501, b"not emulated: websocket\n")
    assert platform.machines[0].runs == ()


def test_bad_requests_are_answered_and_start_nothing(platforms):
    platform = platforms(serving(), machines=1)
    address = urlsplit(platform.url)
    ask(platform)
    with socket.create_connection((address.hostname, address.port), timeout=10) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nnot a size\r\n")
        assert client.recv(100).startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
    runs = platform.machines[0].runs
    for bad in (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 20_000 + b"\r\n\r\n", b"what is this\r\n\r\n"):
        with socket.create_connection((address.hostname, address.port), timeout=10) as client:
            client.sendall(bad)
            assert client.recv(100).startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
    with socket.create_connection((address.hostname, address.port), timeout=10) as half_open:
        half_open.sendall(b"GET / HT")
        assert platform.machines[0].runs == runs


def test_a_caller_that_leaves_frees_its_place_at_the_machine(platforms):
    platform = platforms(serving(), machines=1)
    ask(platform)
    address = urlsplit(platform.url)
    with socket.create_connection((address.hostname, address.port)) as client:
        client.sendall(b"GET /hold/30 HTTP/1.1\r\nhost: a\r\n\r\n")
        platform.wait_for(lambda: platform._platform.machines[0].in_flight == 1)
    platform.wait_for("request.gone")
    assert platform.machines[0].in_flight == 0


def test_a_request_with_a_body_is_replayed_up_to_the_limit(platforms):
    knobs = Knobs(time_scale=0.05, replay_max_bytes=100_000)
    platform = platforms(serving(), machines=1, knobs=knobs)
    path = f"/replay/instance={platform.machines[0].id}"
    assert ask(platform, path, method="POST", body=b"z" * 100_000)[::2] == (200, b"z" * 100_000)
    status, _, body = ask(platform, path, method="POST", body=b"z" * 100_001)
    assert (status, body[:6]) == (502, b"[PA01]")


def test_a_hundred_requests_at_once_are_all_answered(platforms):
    platform = platforms(serving(), machines=4)
    with ThreadPoolExecutor(100) as pool:
        statuses = list(pool.map(lambda _: ask(platform, "/hold/0.1")[0], range(100)))
    assert statuses == [200] * 100
    assert [machine.in_flight for machine in platform.machines] == [0] * 4


# Around it


def test_a_callable_may_serve_real_requests_too(platforms):
    async def machine(machine):
        request = await anext(machine.requests)
        request.answer(200, {"wake-machine": machine.id}, request.body)

    platform = platforms(machine, machines=1)
    status, headers, body = ask(platform, method="POST", body=b"hello")
    platform.wait_all_stopped()
    assert (status, headers["wake-machine"], body) == (200, platform.machines[0].id, b"hello")


def test_a_callback_that_raises_disturbs_no_machine_and_is_heard_of():
    def broken(event):
        raise ValueError("broken callback")

    platform = LocalPlatform(program(""), machines=1, knobs=QUICK, log=lambda machine, line: None).start()
    platform.on_event(broken)
    platform.start_machine(platform.machines[0].id)
    platform.wait_all_stopped()
    assert platform.machines[0].exit_code == 0
    with pytest.raises(ValueError, match="broken callback"):
        platform.close()


def test_platforms_beside_each_other_never_share_a_port(platforms):
    ports = [machine.port for _ in range(4) for machine in platforms(serving(), machines=5).machines]
    assert len(set(ports)) == 20


def test_a_port_that_is_taken_is_an_error_and_leaves_no_thread():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="address already in use"):
            LocalPlatform(["true"], port=taken.getsockname()[1]).start()
    assert not [thread for thread in threading.enumerate() if thread.name == "emulated-platform"]


def test_events_arrive_as_they_happen(platforms):
    platform = platforms(program(""), machines=1)
    heard = []
    end = platform.on_event(lambda event: heard.append(event.type))
    platform.start_machine(platform.machines[0].id)
    platform.wait_all_stopped()
    assert heard == ["machine.starting", "machine.started", "machine.stopped"]
    end()
    count = platform.event_log.count
    platform.destroy(platform.machines[0].id)
    assert platform.wait_for("machine.destroyed", since=count).machine == platform.machines[0].id
    with pytest.raises(RefusedError):
        platform.start_machine(platform.machines[0].id)
    with pytest.raises(TimeoutError, match=r"not machine\.stopped"):
        platform.wait_for("machine.stopped", 0.01, since=count)
    assert heard[-1] == "machine.stopped"
