"""`worker up` as real processes: exit codes, stop signals, a listener that dies, bad input."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from harness import BIN, ask, cmdline, free_port, session_pids, until

PYTHON = sys.executable


@pytest.mark.parametrize("code", [0, 3, 137])
def test_the_commands_exit_code_is_the_machines(machines, code):
    """Stock supervisord always exits 0; the platform's restart policy needs the truth."""
    machine = machines("--", "sh", "-c", f"exit {code}")
    assert machine.wait() == code


def test_a_command_killed_by_a_signal_exits_128_plus_its_number(machines):
    """As a shell says it, and as the platform's events do."""
    assert machines("--", "sh", "-c", "kill -9 $$").wait() == 137


def test_a_command_that_is_not_there_ends_the_machine_with_127(machines):
    """The sentence names the command."""
    machine = machines("--", "no-such-command")
    assert machine.wait() == 127
    assert "no-such-command" in machine.text()


GRACEFUL = """
import signal, sys, time
def stop(*_):
    print("stopping", flush=True); sys.exit(7)
signal.signal(signal.SIGTERM, stop)
print("working", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_stop_signal_reaches_the_command_and_its_code_comes_back(machines, signum, ignored):
    """SIGINT and SIGTERM stop gracefully, also where the parent of `worker up` had SIGINT ignored."""
    machine = machines("--", PYTHON, "-c", GRACEFUL,
                       preexec=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None)  # fmt: skip
    machine.saw("working")
    machine.signal(signum)
    machine.saw("stopping")
    assert machine.wait() == 7


def test_a_second_stop_signal_does_not_break_the_first(machines):
    """Impatient operators press Ctrl-C twice."""
    slow = GRACEFUL.replace("sys.exit(7)", "time.sleep(0.5); print('stopped', flush=True); sys.exit(7)")
    machine = machines("--", PYTHON, "-c", slow)
    machine.saw("working")
    machine.signal(signal.SIGINT)
    machine.saw("stopping")
    machine.signal(signal.SIGTERM)
    machine.signal(signal.SIGINT)
    machine.saw("stopped")
    assert machine.wait() == 7


def test_a_drainer_that_ignores_the_stop_is_killed_before_the_platform_does_it(machines):
    """The kill deadline is below the platform's; what the command started goes with it."""
    deaf = (
        "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "subprocess.Popen(['sleep', '60']); print('deaf', flush=True); time.sleep(60)"
    )
    machine = machines("--", PYTHON, "-c", deaf, env={"WORKER_STOP_TIMEOUT_S": "2"})
    machine.saw("deaf")
    machine.signal(signal.SIGTERM)
    assert machine.wait() == 137
    until(lambda: not session_pids(machine.pid), "everything the machine started has ended")


def test_a_signal_in_the_first_milliseconds_is_not_lost(machines):
    """The stop may come while supervisor is still being imported."""
    machine = machines("--", "sleep", "60")
    until(lambda: _listens(machine.port), "the port is bound")
    machine.signal(signal.SIGTERM)
    # Before the command was started nobody has read its queue; after that the code is the command's own.
    assert machine.wait() in (75, 143)
    assert "Traceback" not in machine.text()


def _listens(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_the_port_answers_on_ipv4_and_ipv6(machines):
    """The proxy comes by IPv4, other machines of the private network by IPv6."""
    machine = machines("--", "sleep", "60")
    machine.saw("drainer.attached")
    assert ask(machine.port, "/_worker/health").status == 200
    with socket.create_connection(("::1", machine.port)) as connection:
        connection.sendall(b"GET /_worker/health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(15) == b"HTTP/1.1 200 OK"


def test_a_wake_during_a_pass_causes_one_more_pass_however_many_rang(machines, tmp_path):
    """Rule 7: a command's queue cannot be read, so a pass is the only way to keep the promise; one keeps it for all."""
    go = tmp_path / "go"
    script = f"echo pass; while [ ! -e {go} ]; do sleep 0.02; done"
    machine = machines("--", "sh", "-c", script)
    machine.saw("pass")
    machine.saw("drainer.attached")
    for _ in range(5):
        assert machine.ask().status == 200
    go.touch()
    assert machine.wait() == 0
    assert machine.out.count("pass") == 2


def test_a_listener_that_dies_is_restarted_and_does_not_colour_the_code(machines):
    """The drainer attaches to the new one; the exit code stays the drainer's."""
    machine = machines("--", PYTHON, "-c", "input() if 0 else __import__('time').sleep(3); raise SystemExit(3)")
    machine.saw("drainer.attached")
    first = machine.ask("/_worker/status").text
    # Supervisor counts a listener as started after a second; one that dies sooner is started again with a pause.
    os.kill(machine.pid_of("listener"), signal.SIGKILL)
    machine.saw("drainer.attached", times=2)
    assert machine.ask("/_worker/status").text != first
    assert machine.wait() == 3


def test_a_listener_that_dies_later_is_restarted_too(machines):
    """Supervisor counts it as started after a second; then another path starts it again."""
    machine = machines("--", "sleep", "60")
    machine.saw("drainer.attached")
    time.sleep(1.5)  # not a synchronisation: what is looked at begins a second after the start
    os.kill(machine.pid_of("listener"), signal.SIGKILL)
    machine.saw("drainer.attached", times=2)
    assert machine.ask().status == 200


def test_a_listener_that_cannot_start_ends_the_machine_with_a_code_and_a_reason(machines, tmp_path):
    """It does not run on deaf."""
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nif 'listen' in sys.orig_argv: os._exit(9)")
    machine = machines("--", "sleep", "60", env={"PYTHONPATH": str(tmp_path)})
    assert machine.wait() not in (0, 2)
    assert "machine.gave_up" in machine.text()
    assert "the listener cannot be started" in machine.text()


def test_a_listener_that_keeps_dying_ends_the_machine(machines):
    """Each of them starts, and is killed as soon as it is ready."""
    machine = machines("--", "sleep", "60")
    times = 0
    while machine.popen.poll() is None:
        times += 1
        machine.saw("listener.ready", times=times)
        os.kill(machine.pid_of("listener"), signal.SIGKILL)
        until(lambda: machine.popen.poll() is not None or machine.text().count("listener.ready") > times,  # noqa: B023
              "the machine ends or has another listener")  # fmt: skip
    assert machine.wait() != 0
    assert "machine.gave_up" in machine.text()


def test_a_killed_parent_takes_drainer_and_command_with_it(machines):
    """Or they would spoil the next run of the machine on this host."""
    machine = machines("--", "sleep", "60")
    machine.saw("drainer.attached")
    os.kill(machine.pid, signal.SIGKILL)
    until(lambda: not session_pids(machine.pid), "everything the machine started has ended")


def test_a_socket_path_that_is_a_file_is_refused_and_the_file_stays(machines, tmp_path):
    """And so is one that another worker uses."""
    precious = tmp_path / "precious.txt"
    precious.write_text("keep")
    machine = machines("--", "true", env={"WORKER_SOCKET": str(precious)})
    assert machine.wait() == 2
    assert str(precious) in machine.text()
    assert precious.read_text() == "keep"
    first = machines("--", "sleep", "60", env={"WORKER_SOCKET": str(tmp_path / "door")})
    first.saw("drainer.attached")
    second = machines("--", "true", env={"WORKER_SOCKET": str(tmp_path / "door")})
    assert second.wait() == 2
    assert "another worker uses it" in second.text()
    assert first.ask().status == 200


@pytest.mark.parametrize("rang", [False, True])
def test_a_command_that_ends_with_0_on_a_stop_is_not_taken_for_a_whole_pass(machines, rang):
    """Its code is its own, unless a wake was answered that no whole pass has kept."""
    machine = machines("--", "sh", "-c", "trap 'exit 0' TERM; echo began; while :; do sleep 0.05; done")
    machine.saw("began")
    machine.saw("drainer.attached")
    if rang:
        assert machine.ask().status == 200
    machine.signal(signal.SIGTERM)
    assert machine.wait() == (75 if rang else 0)


@pytest.mark.parametrize("program", ["listener", "drainer", "parent"])
def test_nothing_is_left_when_one_process_is_killed(machines, program):
    """A killed parent takes its children with it: the listener's stdin ends, and with it the drainer's line."""
    machine = machines("--", "sleep", "60")
    machine.saw("drainer.attached")
    pid = machine.pid if program == "parent" else machine.pid_of(program)
    os.kill(pid, signal.SIGKILL)
    if program == "listener":
        machine.saw("drainer.attached", times=2)
        machine.signal(signal.SIGTERM)
    assert machine.popen.wait(60) != 0
    until(lambda: not [p for p in session_pids(machine.pid) if "listen" in cmdline(p)], "the listener has ended")


BAD = {
    "WORKER_PORT": "eighty",
    "WORKER_LINGER_S": "soon",
    "WORKER_HOLD_S": "-1",
    "WORKER_GREET_S": "nan",
    "WORKER_BATON": "ftp://x",
    "WORKER_REPLAY": "sometimes",
}


def test_every_configuration_error_is_said_at_once_and_nothing_is_started(machines):
    """Each with the name, the value and an example."""
    machine = machines("--", "touch", "started", env=BAD)
    assert machine.wait() == 2
    for name, value in BAD.items():
        assert f"{name}={value!r}: expected " in machine.text()
    assert len([line for line in machine.lines if ": expected " in line]) == len(BAD)
    assert not os.path.exists("started")


def test_a_wrong_token_is_not_shown_in_the_error(machines):
    """Secrets are never printed, wrong ones neither."""
    machine = machines("--", "true", env={"WORKER_TOKENS": "s\x7fecret"})
    assert machine.wait() == 2
    assert "WORKER_TOKENS=(not shown)" in machine.text()
    assert "ecret" not in machine.text()


@pytest.mark.parametrize("tokens", [" , ", ","])
def test_tokens_without_a_token_do_not_open_the_door_to_everybody(machines, tokens):
    """Set, and empty: that is a mistake, and not the wish for no token at all."""
    machine = machines("--", "true", env={"WORKER_TOKENS": tokens})
    assert machine.wait() == 2
    assert "WORKER_TOKENS" in machine.text()


def test_an_empty_argument_is_an_error_and_not_the_default(machines):
    """A variable in a script that was not set."""
    machine = machines("--port", "", "--linger-s", "", "--", "true")
    assert machine.wait() == 2
    assert "--port=''" in machine.text()
    assert "--linger-s=''" in machine.text()


def test_a_port_in_use_is_a_sentence(machines):
    """And how to take another one."""
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        machine = machines("--", "true", port=taken.getsockname()[1])
        assert machine.wait() == 2
    assert "cannot listen on port" in machine.text()


@pytest.mark.parametrize("arguments", [[], ["app:q", "--", "true"], ["--"]])
def test_nothing_or_too_much_to_drain_is_a_usage_error(arguments):
    """The message shows how it is written."""
    done = subprocess.run([f"{BIN}/worker", "up", *arguments], capture_output=True, text=True, check=False,
                          env={**os.environ, "WORKER_PORT": str(free_port())})  # fmt: skip
    assert done.returncode == 2
    assert "worker up module:object" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_machines_on_one_host_do_not_meet(machines, tmp_path):
    """Their doorways are places of their own, also when both have the same temporary folder."""
    one, two = machines("--", "sleep", "60"), machines("--", "sleep", "60")
    for machine in (one, two):
        machine.saw("drainer.attached")
        assert machine.ask().status == 200
    one.signal(signal.SIGTERM)
    one.wait()
    assert two.ask("/_worker/health").status == 200


def test_the_working_directory_stays_and_nothing_is_left_in_the_temporary_folder(machines, tmp_path):
    """`worker up` never changes the directory, and cleans up its doorway."""
    machine = machines("--", "sh", "-c", "echo in:$PWD")
    assert machine.wait() == 0
    assert f"in:{tmp_path}" in machine.out
    assert os.listdir(tmp_path) == []


SLOTS = """
import os, time
from waker import SqliteQueue
queue = SqliteQueue("slots.db", concurrency=2)
@queue.task
def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.005)
"""


def test_a_wake_from_before_the_listener_hears_that_a_drainer_that_began_without_it_has_a_slot_to_spare(
    machines, tmp_path
):
    """Called busy, it would be held, would not count, and the waker would wake a machine more than was asked for."""
    (tmp_path / "slotted.py").write_text(SLOTS)
    enqueue = [PYTHON, "-c", "import slotted; slotted.wait_for.enqueue('go')"]
    subprocess.run(enqueue, cwd=tmp_path, check=True, timeout=60)
    machine = machines("slotted:queue")
    until(lambda: _listens(machine.port), "the port is bound")
    assert machine.ask().headers["wake-busy"] == "no"
    (tmp_path / "go").touch()
    assert machine.wait() == 0
