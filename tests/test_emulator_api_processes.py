"""The emulator's Machines API with real machines: sockets, processes, files, and any client that is pointed at it."""

import base64
import json
import os
import socket
import sys
import threading

import httpx
import pytest

from waker.emulator import Faults, Knobs, LocalPlatform

QUICK = Knobs(
    time_scale=0.02, api_rate_per_s=1e6, api_burst=1_000_000, api_get_rate_per_s=1e6, api_get_burst=1_000_000,
    start_rate_per_s=1e6, start_burst=1_000_000,
)  # fmt: skip
PYTHON = [sys.executable, "-c"]
# Tells what it sees, serves its id at its port, ends with what it is asked for.
PROGRAM = """
import http.server, json, os, sys
seen = {"args": sys.argv[1:], "env": dict(os.environ)}
root = os.environ["TMPDIR"]
seen["files"] = {
    os.path.relpath(os.path.join(path, name), root): open(os.path.join(path, name)).read()
    for path, _, names in os.walk(root, followlinks=True) for name in names
}
if os.path.isdir(os.path.join(root, "data")):
    open(os.path.join(root, "data", "mark"), "a").write("x")
print(json.dumps(seen), flush=True)
if "leave" in sys.argv:
    sys.exit(int(sys.argv[-1]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = os.environ["FLY_MACHINE_ID"].encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.HTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
"""
IMAGES = {"registry.fly.io/jobs:v1": [*PYTHON, PROGRAM], "shell": ["sh"]}


@pytest.fixture
def platforms():
    started = []

    def start(command=None, **options):
        options = {"api": True, "images": IMAGES, "knobs": QUICK, "log": lambda *_: None, **options}
        started.append(LocalPlatform(command, **options).start())
        return started[-1]

    yield start
    while started:
        started.pop().close()


class Client:
    """What any client is told: the printed environment, and nothing else."""

    def __init__(self, platform):
        environment = platform.environment
        self.platform = platform
        self._http = httpx.Client(
            base_url=f"{environment['FLY_FLAPS_BASE_URL']}/v1/apps/{environment['FLY_APP_NAME']}",
            headers={"authorization": f"Bearer {environment['FLY_API_TOKEN']}"},
            timeout=70,
        )

    def __call__(self, method, path, body=None, **headers):
        reply = self._http.request(method, path, json=body, headers=headers)
        return reply.status_code, reply.json() if reply.content else None

    def run(self, words, *, image="registry.fly.io/jobs:v1", config=None, **request):
        """Create a machine that runs *words*; its id."""
        config = {"image": image, "init": {"cmd": words}, "restart": {"policy": "no"}, **(config or {})}
        status, machine = self("POST", "/machines", {"config": config, **request})
        assert status == 200, machine
        return machine["id"]

    def wait(self, machine, state):
        assert self("GET", f"/machines/{machine}/wait?state={state}&timeout=60")[0] == 200

    def exit_event(self, machine):
        events = self("GET", f"/machines/{machine}")[1]["events"]
        return next(event["request"]["exit_event"] for event in events if event["type"] == "exit")

    def seen(self, machine):
        return json.loads(self.platform.logs(machine)[-1])

    def close(self):
        self._http.close()


@pytest.fixture
def clients(platforms):
    made = []

    def make(command=None, **options):
        made.append(Client(platforms(command, **options)))
        return made[-1]

    yield make
    for client in made:
        client.close()


def test_a_job_runs_once_with_its_words_environment_and_files_and_tells_its_code(clients):
    client = clients()
    files = [{"guest_path": "/etc/job.json", "raw_value": base64.b64encode(b"{}").decode(), "mode": 0o600}]
    machine = client.run(
        None, config={"init": {"exec": [*PYTHON, PROGRAM, "leave", "7"]}, "files": files, "env": {"A": "1"}}
    )
    client.wait(machine, "stopped")
    exit_event, seen = client.exit_event(machine), client.seen(machine)
    assert (exit_event["exit_code"], exit_event["signal"], exit_event["requested_stop"]) == (7, -1, False)
    assert seen["args"] == ["leave", "7"]
    assert seen["files"] == {"etc/job.json": "{}"}
    assert (seen["env"]["A"], seen["env"]["FLY_MACHINE_ID"]) == ("1", machine)
    assert seen["env"]["FLY_IMAGE_REF"] == "registry.fly.io/jobs:v1"


def test_signals_end_a_machine_and_the_exit_says_which(clients):
    client = clients()
    machine = client.run(None, config={"init": {"exec": ["sh", "-c", "kill -9 $$"]}})
    client.wait(machine, "stopped")
    killed = client.exit_event(machine)
    assert (killed["exit_code"], killed["signal"], killed["requested_stop"]) == (137, 9, False)
    machine = client.run(None, config={"init": {"exec": ["sleep", "600"]}, "stop_config": {"signal": "SIGTERM"}})
    client.wait(machine, "started")
    assert client("POST", f"/machines/{machine}/stop", {"signal": "SIGTERM"})[0] == 200
    client.wait(machine, "stopped")
    stopped = client.exit_event(machine)
    assert (stopped["exit_code"], stopped["signal"], stopped["requested_stop"]) == (143, 15, True)


def test_a_machine_is_reached_at_its_private_address_and_internal_port_while_it_runs(clients):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    client = clients()
    service = {"internal_port": port, "autostart": True, "ports": [{"port": 80, "handlers": ["http"]}]}
    machine = client.run([], config={"init": {}, "services": [service]}, skip_launch=True)
    address = client("GET", f"/machines/{machine}")[1]["private_ip"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{address}:{port}/", timeout=5)
    # Through the proxy, which starts it; that is refused until the machine is ready.
    for _ in range(100):
        reply = httpx.get(client.platform.url, timeout=30)
        if reply.status_code == 200:
            break
    assert reply.text == machine
    assert httpx.get(f"http://{address}:{port}/", timeout=5).text == machine
    client("POST", f"/machines/{machine}/stop", {"signal": "SIGKILL"})
    client.wait(machine, "stopped")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{address}:{port}/", timeout=5)


def test_exec_runs_one_more_command_and_leaves_nothing(clients):
    client = clients()
    machine = client.run(None, config={"init": {"exec": ["sleep", "600"]}, "env": {"A": "1"}})
    client.wait(machine, "started")

    def execute(**body):
        return client("POST", f"/machines/{machine}/exec", body)

    status, done = execute(command=["sh", "-c", "cat; echo $A >&2; exit 3"], stdin="hi")
    assert (status, done) == (200, {"exit_code": 3, "exit_signal": 0, "stdout": "hi", "stderr": "1\n"})
    assert execute(cmd="printf 'a b'")[1]["stdout"] == "a b"
    assert execute(command=["nobody-has-this"])[1]["exit_code"] == 127
    assert execute(command=["sh", "-c", "kill -9 $$"])[1]["exit_signal"] == 9
    # A command that takes too long, and what it started beside.
    status, late = execute(command=["sh", "-c", "sleep 600 & echo $! > $TMPDIR/pid; wait"], timeout=1)
    assert status == 408
    assert "deadline_exceeded" in late["error"]
    pid = int(execute(command=["sh", "-c", "cat $TMPDIR/pid"])[1]["stdout"])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    for body in ({}, {"command": []}, {"cmd": "'"}, {"command": ["true"], "timeout": -1}):
        assert execute(**body)[0] == 400
    client("POST", f"/machines/{machine}/stop", {"signal": "SIGKILL"})
    client.wait(machine, "stopped")
    assert execute(command=["true"])[0] == 412


def test_a_volume_outlives_a_machine_that_is_started_again(clients):
    client = clients()
    volume = client("POST", "/volumes", {"name": "data", "size_gb": 1})[1]["id"]
    config = {
        "init": {"exec": [*PYTHON, PROGRAM, "leave", "0"]},
        "mounts": [{"volume": volume, "path": "/data"}],
    }
    machine = client.run(None, config=config)
    client.wait(machine, "stopped")
    count = client.platform.event_log.count
    while client("POST", f"/machines/{machine}/start")[0] == 412:
        pass
    client.platform.wait_for("machine.stopped", since=count)
    assert client.seen(machine)["files"] == {"data/mark": "x"}


def test_several_processes_and_their_own_environment(clients):
    client = clients()
    processes = [
        {"exec": ["sh", "-c", "echo $NAME; sleep 600"], "env": {"NAME": "one"}},
        {"exec": ["sh", "-c", "sleep 0.1; exit 0"]},
    ]
    machine = client.run(None, config={"processes": processes})
    client.wait(machine, "stopped")
    assert client.exit_event(machine)["exit_code"] == 0
    assert client.platform.logs(machine) == ["one"]


def test_what_a_machine_leaves_is_gone_with_it_and_with_the_platform(platforms):
    platform = platforms(["sleep", "600"], machines=2)
    client = Client(platform)
    one, two = (machine["id"] for machine in client("GET", "/machines")[1])
    assert client("POST", f"/machines/{one}/start")[0] == client("POST", f"/machines/{two}/start")[0] == 200
    client.wait(one, "started")
    client.wait(two, "started")
    pids = [*platform.machine(one).pids, *platform.machine(two).pids]
    assert client("DELETE", f"/machines/{one}?force=true")[0] == 200
    client.wait(one, "destroyed")
    client.close()
    platform.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_connections_break_as_the_faults_say(clients):
    client = clients()
    body = {"config": {"image": "shell", "init": {"exec": ["true"]}}}
    for fault, count in [("api_drop", 0), ("api_reset_before_answer", 1), ("api_reset_mid_answer", 2)]:
        client.platform.set_faults(Faults(**{fault: "1x1"}))
        with pytest.raises(httpx.TransportError):
            client("POST", "/machines", body)
        assert len(client("GET", "/machines?include_deleted=true")[1]) == count
    client.platform.set_faults(Faults(api_bad_gateway="1x1"))
    reply = httpx.get(f"{client.platform.api_url}/v1/apps/my-worker")
    assert (reply.status_code, reply.headers["content-type"]) == (502, "text/html")


def test_the_token_is_not_guessed_and_not_told_to_machines(clients):
    client, other = clients(), clients()
    assert client.platform.api_token != other.platform.api_token
    assert len(client.platform.api_token) >= 32
    reply = httpx.get(
        f"{client.platform.api_url}/v1/apps/my-worker", headers={"authorization": f"Bearer {other.platform.api_token}"}
    )
    assert (reply.status_code, reply.json()) == (401, {"error": "Authenticate: token validation error"})
    machine = client.run(None, config={"init": {"exec": [*PYTHON, PROGRAM, "leave", "0"]}})
    client.wait(machine, "stopped")
    assert client.platform.api_token not in json.dumps(client.seen(machine))
    assert not any(client.platform.api_token in str(event) for event in client.platform.events)


def test_a_second_app_has_an_address_of_its_own(clients):
    client = clients()
    http = httpx.Client(
        base_url=f"{client.platform.api_url}/v1", headers={"authorization": f"Bearer {client.platform.api_token}"}
    )
    with http:
        assert http.post("/apps", json={"name": "second", "org_slug": "personal"}).status_code == 201
        url = client.platform.wait_for("app.created").fields["url"]
        assert url != client.platform.url
        assert httpx.get(url).status_code == 503  # it has no machines
        assert http.delete("/apps/second").status_code == 202
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


def test_waiting_ends_with_the_platform(platforms):
    """A long poll does not keep the platform up."""
    platform = platforms(["sleep", "600"], machines=1)
    client, other = Client(platform), Client(platform)
    outcome = []

    def wait():
        try:
            outcome.append(client("GET", f"/machines/{platform.machines[0].id}/wait?state=destroyed"))
        except httpx.TransportError:
            outcome.append("broken off")

    waiting = threading.Thread(target=wait)
    waiting.start()
    other("GET", "/machines")  # answered while the wait is under way, or about to be
    other.close()
    platform.close()
    waiting.join(timeout=30)
    client.close()
    assert outcome == ["broken off"]
