"""The listener's rules, over its real sockets: HTTP on one side, a drainer's line on the other."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from worker.config import from_environ
from worker.door import LEFT, OPEN, SHUT
from worker.listener import Listener
from worker.sockets import bind_doorway

TOKENS = {"authorization": "Bearer new"}


class House:
    """A listener on free sockets, and whatever the test says to it."""

    def __init__(self, folder, **settings):
        environ = {"WORKER_GREET_S": "0", "WORKER_SOCKET": str(folder / "door"), "FLY_MACHINE_ID": "m1", **settings}
        self.config = from_environ(environ)
        self.public = socket.create_server(("127.0.0.1", 0))
        self.port = self.public.getsockname()[1]
        self.listener = Listener(self.config, bound_at=time.monotonic(), boot="b1", under_parent=False)
        self.lines = []

    async def __aenter__(self):
        await self.listener.open(self.public, bind_doorway(self.config.socket))
        return self

    async def __aexit__(self, *_):
        for line in self.lines:
            line.go()
        await self.listener.close()

    async def ask(self, path="/", method="GET", headers=None, body=b""):
        """One request; returns (status, headers, text)."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = [f"{method} {path} HTTP/1.1", "host: x", *(f"{k}: {v}" for k, v in (headers or {}).items())]
        if body:
            lines.append(f"content-length: {len(body)}")
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        try:
            return await read_answer(reader)
        finally:
            writer.close()

    async def drainer(self):
        """A drainer's line, attached."""
        line = await self.line()
        await line.say("attach")
        assert await line.hear() == "attached"
        return line

    async def line(self):
        """A connection of the doorway that has said nothing yet."""
        self.lines.append(FakeDrainer(*await asyncio.open_unix_connection(self.config.socket)))
        return self.lines[-1]


async def read_answer(reader):
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return int(head[0].split()[1]), headers, body.decode()


class FakeDrainer:
    """The other end of the line, spoken by hand."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    async def say(self, words):
        self.writer.write(words.encode() + b"\n")
        await self.writer.drain()

    async def hear(self):
        return (await asyncio.wait_for(self.reader.readline(), 30)).decode().strip()

    async def answer(self, words):
        """Say *words* and return the answer, leaving out what the listener says by itself."""
        await self.say(words)
        while (heard := await self.hear()).startswith("!"):
            pass
        return heard

    async def look(self):
        return (await self.answer("look")).removeprefix("token ")

    def go(self):
        self.writer.close()


@pytest.fixture
def house(tmp_path):
    """`async with house(**settings) as h` opens a listener."""
    return lambda **settings: House(tmp_path, **settings)


async def test_any_method_on_any_path_rings_and_gets_a_receipt(house):
    """curl, a browser, a POST with a body: all are wakes."""
    async with house() as h:
        await h.drainer()
        for ring, (method, path) in enumerate([("GET", "/"), ("POST", "/jobs?x=1"), ("DELETE", "/%F0%9F%90%9D")], 1):
            status, headers, text = await h.ask(path, method, body=b"x" * 10 if method == "POST" else b"")
            assert status == 200
            assert (headers["wake-machine"], headers["wake-boot"], headers["wake-ring"]) == ("m1", "b1", str(ring))
            assert headers["wake-version"] == "1"
            assert text.startswith("awake: machine m1")


async def test_reserved_paths_never_ring(house):
    """Rule 7: health checks and scrapes do not keep a machine up."""
    async with house() as h:
        await h.drainer()
        status, _, text = await h.ask("/_worker/status")
        assert status == 200
        assert json.loads(text)["machine"] == "m1"
        status, _, text = await h.ask("/_worker/metrics")
        assert status == 200
        assert "worker_rings_total 0" in text
        assert (await h.ask("/_worker/health"))[0] == 200
        assert h.listener.door.rung == 0


async def test_a_typing_error_in_a_reserved_path_does_not_ring(house):
    """Rule 7: one slash too many in a scraper's configuration would keep a machine up for ever."""
    async with house() as h:
        await h.drainer()
        assert (await h.ask("/_worker/status/"))[0] == 200
        assert (await h.ask("//_worker/metrics"))[0] == 200
        status, _, text = await h.ask("/_worker/healthz")
        assert status == 404
        assert "/_worker/health" in text
        assert h.listener.door.rung == 0


async def test_a_wake_before_a_drainer_is_attached_is_held_until_then(house):
    """Rule 4: a 200 means that user code is imported and somebody reads the queue."""
    async with house() as h:
        waiting = asyncio.create_task(h.ask())
        while h.listener.door.rung == 0:
            await asyncio.sleep(0.001)
        assert not waiting.done()
        await h.drainer()
        assert (await waiting)[0] == 200


async def test_a_wake_is_refused_when_no_drainer_comes(house):
    """Rule 4: after boot_s nothing is promised, and nothing waits."""
    async with house(WORKER_BOOT_S="0.2") as h:
        status, headers, _ = await h.ask()
        assert status == 503
        assert headers["wake-state"] == "no-drainer"
        assert headers["retry-after"]


async def test_a_second_drainer_is_refused(house):
    """Rule 4: two of them would close the door behind each other."""
    async with house() as h:
        await h.drainer()
        second = await h.line()
        await second.say("attach")
        assert (await second.hear()).startswith("refused")


async def test_a_ring_after_the_look_refuses_the_leave(house):
    """The promise, over the wire."""
    async with house() as h:
        line = await h.drainer()
        token = await line.look()
        assert (await h.ask())[0] == 200
        assert await line.answer(f"leave {token}") == "rung"
        assert await line.answer(f"leave {await line.look()}") == "left"
        status, headers, _ = await h.ask()
        assert (status, headers["wake-state"]) == (503, "left")


async def test_held_answers_are_released_before_the_drainer_may_go(house):
    """A leave flushes what was promised; nobody's answer dies with the machine."""
    async with house(WORKER_HOLD_S="30") as h:
        line = await h.drainer()
        held = asyncio.create_task(h.ask(headers={"wake-hold": "9"}))
        assert (await line.hear()).startswith("!ring")
        await line.say("state 0 1 0 0 lingering")
        token = await line.look()
        assert not held.done()
        assert await line.answer(f"leave {token}") == "left"
        assert (await held)[0] == 200


async def test_the_end_of_the_line_without_a_leave_shuts_the_door(house):
    """Rule 4: a drainer that is gone keeps no promise; the listener without a parent leaves, too, with 75."""
    async with house() as h:
        line = await h.drainer()
        await line.look()
        line.go()
        await h.listener.over.wait()
        assert h.listener.door.state == SHUT
        assert h.listener.exit_code == 75


async def test_a_wake_held_when_the_drainer_dies_is_refused(house):
    """It was counted, but nobody is there to read the queue."""
    async with house(WORKER_HOLD_S="30") as h:
        line = await h.drainer()
        held = asyncio.create_task(h.ask(headers={"wake-hold": "9"}))
        assert (await line.hear()).startswith("!ring")
        line.go()
        assert (await held)[0] == 503


async def test_a_new_listener_starts_closed_when_the_mark_is_there(house):
    """Rule 2: the mark was written before the leave was acknowledged; the next listener finds it."""
    async with house() as h:
        line = await h.drainer()
        assert await line.answer(f"leave {await line.look()}") == "left"
        respawned = Listener(h.config, bound_at=0.0, boot="b2", under_parent=True)
        assert respawned.door.state == LEFT
        assert respawned.door.ring() is None
        # A drainer that did not get the answer looks again, and the mark is gone.
        await line.look()
        assert h.listener.door.state == OPEN
        assert Listener(h.config, bound_at=0.0, boot="b3", under_parent=True).door.state == OPEN


async def test_a_shut_door_stays_shut_for_the_next_listener(house):
    """Rule 2, for a stop signal."""
    async with house() as h:
        line = await h.drainer()
        assert (await line.answer("shut")).startswith("shut")
        assert Listener(h.config, bound_at=0.0, boot="b2", under_parent=True).door.state == SHUT


async def test_leave_on_a_shut_door_compares_over_the_wire(house):
    """Rule 3: only a reading after the shut may end with 0."""
    async with house() as h:
        line = await h.drainer()
        token = await line.look()
        assert (await h.ask())[0] == 200
        await line.answer("shut")
        assert await line.answer(f"leave {token}") == "rung"
        assert await line.answer(f"leave {await line.look()}") == "left"


async def test_the_first_ring_is_waited_for_after_the_start(house):
    """Rule 5: the proxy connects a moment after the start; a machine that has left by then is started for ever."""
    async with house(WORKER_GREET_S="30") as h:
        line = await h.drainer()
        answer = await line.answer(f"leave {await line.look()}")
        assert answer.split()[0] == "wait"
        assert answer.split()[2] == "greet"
        assert (await h.ask())[0] == 200
        assert await line.answer(f"leave {await line.look()}") == "left"


async def test_a_connection_that_is_about_to_ask_puts_the_leave_off(house):
    """Rule 6: accepted a moment ago, request still on the way."""
    async with house() as h:
        line = await h.drainer()
        token = await line.look()
        reader, writer = await asyncio.open_connection("127.0.0.1", h.port)
        while not h.listener.connections:
            await asyncio.sleep(0.001)
        answer = await line.answer(f"leave {token}")
        assert answer.split()[0] == "wait"
        assert answer.split()[2] == "arriving"
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        status, headers, _ = await read_answer(reader)
        assert status == 200
        assert headers["connection"] == "close"
        assert await line.answer(f"leave {token}") == "rung"
        writer.close()


async def test_a_connection_in_the_accept_queue_puts_the_leave_off(house):
    """Rule 6: poll() on the listening socket sees it before the event loop has accepted it."""
    async with house() as h:
        line = await h.drainer()
        token = await line.look()
        # Connected and leaving in one step of the loop, so that nobody accepts in between.
        client = socket.create_connection(("127.0.0.1", h.port))
        assert h.listener._reason_to_stay() is not None
        client.close()
        answer = "wait"
        while answer.startswith("wait"):
            answer = await line.answer(f"leave {token}")
        assert answer == "left"


async def test_silent_connections_put_a_leave_off_for_a_bounded_time(house):
    """Rule 6: two seconds in total at most, however many connect and say nothing."""
    async with house() as h:
        line = await h.drainer()
        token = await line.look()
        stop = asyncio.Event()

        async def knock():
            while not stop.is_set():
                _, writer = await asyncio.open_connection("127.0.0.1", h.port)
                await asyncio.sleep(0.05)
                writer.close()

        knocking = asyncio.create_task(knock())
        put_off = 0
        while (await line.answer(f"leave {token}")).startswith("wait"):
            put_off += 1
            await asyncio.sleep(0.05)
        assert put_off > 1
        assert h.listener.door.state == LEFT
        stop.set()
        await knocking


async def test_an_idle_connection_after_an_answer_does_not_keep_the_machine(house):
    """Rule 6: the proxy pools its connections for seconds."""
    async with house() as h:
        line = await h.drainer()
        reader, writer = await asyncio.open_connection("127.0.0.1", h.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await read_answer(reader))[0] == 200
        assert await line.answer(f"leave {await line.look()}") == "left"
        writer.close()


async def test_a_machine_with_a_free_slot_answers_a_single_wake_at_once_and_a_busy_one_holds(house):
    """The proxy sends the next wake elsewhere while one is held; a busy receipt does not count."""
    async with house(WORKER_HOLD_S="0.3") as h:
        line = await h.drainer()

        async def wake(state, headers=None):
            asked = asyncio.create_task(h.ask(headers=headers))
            assert (await line.hear()).startswith("!ring")
            began = time.monotonic()
            await line.say(state)
            return (await asked)[1]["wake-busy"], time.monotonic() - began >= 0.25

        assert await wake("state 1 2 0 0 working") == ("no", False)
        assert await wake("state 1 2 0 0 working", {"wake-hold": "5"}) == ("no", True)
        assert await wake("state 2 2 0 0 working") == ("yes", True)


async def test_a_drainer_that_does_not_speak_within_the_hold_is_busy(house):
    """User code that holds the interpreter is as good as every slot taken."""
    async with house(WORKER_HOLD_S="0.1") as h:
        await h.drainer()
        assert (await h.ask())[1]["wake-busy"] == "yes"


async def test_the_excepted_machine_does_not_answer_the_baton(house):
    """Rule 14: a header says which machine is meant not to answer; it does not ring, either."""
    async with house(WORKER_HOLD_S="0") as h:
        await h.drainer()
        status, headers, _ = await h.ask(headers={"wake-except": "m1"})
        assert (status, headers["wake-state"]) == (503, "excepted")
        assert h.listener.door.rung == 0
        assert (await h.ask(headers={"wake-except": "m2"}))[0] == 200


async def test_the_batons_depth_comes_back_with_the_shut(house):
    """Rule 14: whoever passes it on counts one up."""
    async with house() as h:
        line = await h.drainer()
        assert (await h.ask(headers={"wake-depth": "2"}))[0] == 200
        assert await line.answer("shut") == "shut 2"


async def test_tokens_are_wanted_for_everything_and_several_are_accepted(house):
    """Rule 20: old and new during a rotation; a 401 does not ring."""
    async with house(WORKER_TOKENS="new, old") as h:
        await h.drainer()
        for headers in (
            {},
            {"authorization": "Bearer newer"},
            {"authorization": "Basic new"},
            {"authorization": "Bearer \xe9"},
        ):
            for path in ("/", "/_worker/status", "/_worker/metrics"):
                assert (await h.ask(path, headers=headers))[0] == 401
        assert h.listener.door.rung == 0
        assert (await h.ask(headers=TOKENS))[0] == 200
        assert (await h.ask(headers={"authorization": "bearer old"}))[0] == 200


async def test_a_refusal_is_replayed_only_where_that_is_configured_and_only_once(house):
    """Rule 19: fly-replay elsewhere, with a time-out and a fallback, never for a request that was itself replayed."""
    async with house() as h:
        h.listener.shut("test")
        assert "fly-replay" not in (await h.ask())[1]
    async with house(WORKER_REPLAY="elsewhere", WORKER_SOCKET=h.config.socket + "2") as h:
        h.listener.shut("test")
        assert (await h.ask())[1]["fly-replay"] == "elsewhere=true;timeout=10s;fallback=force_self"
        assert "fly-replay" not in (await h.ask(headers={"fly-replay-src": "instance=m2"}))[1]


async def test_a_stop_refuses_wakes_and_waits_for_the_drainer(house):
    """Rule 9: the listener is stopped last; until then a proxy gets a refusal instead of a broken connection."""
    async with house() as h:
        line = await h.drainer()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await line.hear() == "!stop"
        assert (await h.ask())[0] == 503
        assert await line.answer(f"leave {await line.look()}") == "left"
        line.go()
        await h.listener.over.wait()


async def test_a_hung_drainer_is_killed(house):
    """Rule 8: rung, no job running, no sign of life for wedge_s; a real process stands for the drainer."""
    script = ("import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
              "s.sendall(b'attach\\n'); time.sleep(600)")  # fmt: skip
    async with house(WORKER_WEDGE_S="0.3", WORKER_HOLD_S="0") as h:
        hung = subprocess.Popen([sys.executable, "-c", script, h.config.socket])
        await h.listener.attached.wait()
        assert (await h.ask())[0] == 200
        assert await asyncio.to_thread(hung.wait, 30) == -signal.SIGKILL
        with open(h.config.mark, encoding="ascii") as mark:
            assert mark.read().split()[0] in ("wedged", "shut")


async def test_a_drainer_with_a_running_job_is_not_killed(house):
    """Rule 8: a long job is a sign of life."""
    async with house(WORKER_WEDGE_S="0.2", WORKER_HOLD_S="0") as h:
        line = await h.drainer()
        assert (await h.ask())[0] == 200
        asked = 0
        while asked < 12:  # asked six times per wedge_s: two times as long as it would take
            if await line.hear() == "!ask":
                asked += 1
                await line.say("state 1 1 0 0 working")
        assert h.listener.drainer is not None


async def test_a_drainer_that_left_but_stays_is_killed(house):
    """Rule 8: after a leave it has exit_s."""
    script = ("import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
              "f = s.makefile('rw')\n"
              "def ask(w):\n f.write(w + '\\n'); f.flush(); return f.readline()\n"
              "ask('attach'); t = ask('look').split()[1:]; ask('leave ' + ' '.join(t)); time.sleep(600)")  # fmt: skip
    async with house(WORKER_EXIT_S="0.2") as h:
        hung = subprocess.Popen([sys.executable, "-c", script, h.config.socket])
        assert await asyncio.to_thread(hung.wait, 30) == -signal.SIGKILL


async def test_a_huge_header_is_a_proper_error(house):
    """And the next request is served."""
    async with house() as h:
        await h.drainer()
        assert (await h.ask(headers={"x": "y" * 100_000}))[0] in (400, 431)
        assert (await h.ask())[0] == 200
        assert h.listener.door.rung == 1


async def test_a_body_is_not_waited_for(house):
    """A slow body: the wake is answered before it has come."""
    async with house() as h:
        await h.drainer()
        reader, writer = await asyncio.open_connection("127.0.0.1", h.port)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\nxx")
        assert (await read_answer(reader))[0] == 200
        writer.close()


async def test_half_open_connections_are_closed(house, monkeypatch):
    """A request's headers have to be complete some time; memory is small."""
    monkeypatch.setattr("worker.listener.HEADERS_S", 0.1)
    async with house() as h:
        await h.drainer()
        reader, writer = await asyncio.open_connection("127.0.0.1", h.port)
        writer.write(b"GET / HT")
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        assert (await h.ask())[0] == 200


async def test_a_thousand_connections_at_once_are_all_answered(house):
    """Each gets a receipt; the rings are counted."""
    async with house(WORKER_HOLD_S="0") as h:
        await h.drainer()
        answers = await asyncio.gather(*(h.ask() for _ in range(1000)))
        assert {status for status, _, _ in answers} == {200}
        assert h.listener.door.rung == 1000


async def test_more_connections_than_the_bound_are_closed(house, monkeypatch):
    """The bound holds, and those within it are served."""
    monkeypatch.setattr("worker.listener.MAX_CONNECTIONS", 5)
    async with house() as h:
        await h.drainer()
        open_ones = [await asyncio.open_connection("127.0.0.1", h.port) for _ in range(5)]
        while len(h.listener.connections) < 5:
            await asyncio.sleep(0.001)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await h.ask()
        open_ones[0][1].write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await read_answer(open_ones[0][0]))[0] == 200
        for _, writer in open_ones:
            writer.close()
