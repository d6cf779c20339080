"""The baton: what a machine that is told to stop asks for, and whose answer counts. Against a real HTTP server."""

import os
import signal
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from harness import until

from worker.baton import AT_ONCE, pass_on
from worker.config import from_environ

RECEIPT = {"wake-boot": "b", "wake-ring": "1"}


class Proxy:
    """Stands where the proxy does: notes what was asked, and answers as told."""

    def __init__(self):
        self.asked = []
        self.answers = []  # (status, headers) in turn; the last one again and again
        self.lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                with proxy.lock:
                    proxy.asked.append({name.lower(): value for name, value in self.headers.items()})
                    status, headers = proxy.answers.pop(0) if len(proxy.answers) > 1 else proxy.answers[0]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def proxy():
    proxy = Proxy()
    yield proxy
    proxy.close()


def _config(proxy, **settings):
    return from_environ({"FLY_MACHINE_ID": "me", "WORKER_BATON": proxy.url, **settings})


def test_another_machines_receipt_takes_the_baton(proxy):
    """Asked with our own id as the one that must not answer, one hand-over deeper, and with the first token."""
    proxy.answers = [(200, {"wake-machine": "other", **RECEIPT})]
    assert pass_on(_config(proxy, WORKER_TOKENS="new,old"), 1, 5) == "other"
    assert proxy.asked[0]["wake-except"] == "me"
    assert proxy.asked[0]["wake-depth"] == "2"
    assert proxy.asked[0]["authorization"] == "Bearer new"


def test_several_are_asked_for_at_once(proxy):
    """The proxy may send the first ones to the machine that is stopping: only together they reach another."""
    ours, theirs = (503, {"retry-after": "1"}), (200, {"wake-machine": "other", **RECEIPT})
    proxy.answers = [*[ours] * (AT_ONCE - 1), theirs]
    assert pass_on(_config(proxy), 0, 5) == "other"
    assert len(proxy.asked) >= AT_ONCE


@pytest.mark.parametrize("answer", [
    (200, {"wake-machine": "me", **RECEIPT}),
    (200, {}),
    (503, {"retry-after": "1"}),
    (401, {}),
])  # fmt: skip
def test_what_is_no_receipt_of_another_machine_takes_nothing(proxy, answer):
    """Rule 14: our own receipt is none; neither is somebody else's server. Asked again until the time is over."""
    proxy.answers = [answer]
    assert pass_on(_config(proxy), 0, 0.6) == ""
    assert len(proxy.asked) > AT_ONCE


def test_at_the_depth_of_three_it_is_passed_no_more(proxy):
    """Rule 14: a fleet that is stopped as a whole does not hand its jobs round for ever."""
    proxy.answers = [(200, {"wake-machine": "other", **RECEIPT})]
    assert pass_on(_config(proxy), 3, 5) == ""
    assert proxy.asked == []


def test_off_is_off(proxy):
    """For operators who mean to stop everything."""
    assert pass_on(_config(proxy, WORKER_BATON="off"), 0, 5) == ""
    assert proxy.asked == []


def test_the_parent_passes_it_for_a_killed_drainer_and_lets_nobody_in_meanwhile(machines):
    """Rules 9 and 13: the listener is gone for good, so a connect is refused at once instead of hanging."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        machine = machines("--", "sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.1; done",
                           env={"WORKER_BATON": f"http://127.0.0.1:{silent.getsockname()[1]}",
                                "WORKER_STOP_TIMEOUT_S": "20"})  # fmt: skip
        machine.saw("deaf")
        machine.signal(signal.SIGTERM)
        machine.saw("door.shut")
        os.kill(machine.pid_of("drainer"), signal.SIGKILL)
        connection, _ = silent.accept()
        until(lambda: _refused(machine.port), "connects are refused")
        assert machine.popen.poll() is None
        connection.close()
        assert machine.wait() == 137
        assert "baton.not_taken" in machine.text()


def _refused(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False
