"""Waker and AsyncWaker against real sockets: a fleet behind a proxy's rule, strangers, silence."""

import argparse
import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from waker import AsyncWaker, NotWoken, Unauthorized, UsageError, Waker, client
from waker.policy import Pressure
from waker.verbs import wake as verb

Serve = Callable[[dict[str, str], asyncio.StreamWriter], Awaitable[None]]


@contextmanager
def serving(serve: Serve) -> Iterator[str]:
    """A server on loopback, in a thread with an event loop of its own; *serve* answers each request. Yields its URL."""
    ready = threading.Event()
    running: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            await serve({"": lines[0], **headers}, writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        stop = asyncio.Event()
        async with await asyncio.start_server(handle, "127.0.0.1", 0, backlog=4096) as server:
            running.append((server.sockets[0].getsockname()[1], asyncio.get_running_loop(), stop))
            ready.set()
            await stop.wait()

    def run() -> None:
        with asyncio.Runner() as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    port, loop, stop = running[0]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


def answer(status: str, body: str = "ok\n", **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", body]).encode()


def receipt(machine: str, *, busy: bool = False, up_s: float = 0.0, ring: int = 1) -> bytes:
    return answer(
        "200 OK",
        wake_version=1,
        wake_machine=machine,
        wake_boot=f"boot-{machine}",
        wake_ring=ring,
        wake_state="working",
        wake_busy="yes" if busy else "no",
        wake_up=up_s,
    )


class Fleet:
    """Machines behind the proxy's rule at soft_limit 1: it starts one when all that are up are occupied."""

    def __init__(self, *, stopped: int, idle: int = 0, busy: int = 0, room: int = 1, hold_s: float = 0.2) -> None:
        self.busy = {f"busy{i}" for i in range(busy)}
        self.held = Counter(dict.fromkeys([*self.busy, *(f"idle{i}" for i in range(idle))], 0))
        self.stopped = [f"cold{i}" for i in range(stopped)]
        self.room, self.hold_s = room, hold_s
        self.requests: list[dict[str, str]] = []
        self.most_in_flight = 0

    async def __call__(self, request: dict[str, str], writer: asyncio.StreamWriter) -> None:
        self.requests.append(request)
        with_room = [name for name in self.held if self.held[name] < self.room]
        if not with_room and self.stopped:
            with_room = [self.stopped.pop(0)]
        name = min(with_room or self.held, key=lambda name: self.held[name])
        self.held[name] += 1
        self.most_in_flight = max(self.most_in_flight, self.held.total())
        hold_s = self.hold_s if name in self.busy else min(self.hold_s, float(request.get("wake-hold", 0)))
        await asyncio.sleep(hold_s)
        self.held[name] -= 1
        writer.write(receipt(name, busy=name in self.busy, up_s=0.0 if name.startswith("cold") else 1e6))


@pytest.fixture(autouse=True)
def _no_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test inherits what another one learned of a port."""
    monkeypatch.setattr(client, "_pressures", {})


@pytest.mark.parametrize("room", [1, 2], ids=["at or above", "above"])
def test_three_machines_are_woken_and_reported(room: int) -> None:
    fleet = Fleet(stopped=5, room=room)
    with serving(fleet) as url:
        report = Waker(url).wake(machines=3)
    assert (report.distinct, report.cold, report.missing, report.ok) == (3, 3, 0, True)
    assert len({machine.id for machine in report.machines}) == 3
    assert len(fleet.stopped) == 2, "no machine is started in vain"
    assert report.requests == len(fleet.requests)
    assert report.seen == {"200 with a receipt": report.requests} or room == 2


@pytest.mark.parametrize("room", [1, 2], ids=["at or above", "above"])
def test_machines_that_are_up_count_and_are_told_from_cold_ones(room: int) -> None:
    with serving(Fleet(stopped=3, idle=1, room=room)) as url:
        report = Waker(url).wake(machines=3)
    assert {machine.id: machine.cold for machine in report.machines} == {"idle0": False, "cold0": True, "cold1": True}


def test_a_single_wake_is_not_held() -> None:
    fleet = Fleet(stopped=1)
    with serving(fleet) as url:
        Waker(url).wake()
    assert "wake-hold" not in fleet.requests[0]
    assert fleet.requests[0]["wake-version"] == "1"
    assert fleet.requests[0][""].startswith("GET / HTTP/1.1")


@pytest.mark.parametrize("room", [1, 2], ids=["at or above", "above"])
def test_a_machine_in_a_long_job_does_not_swallow_a_single_wake(room: int) -> None:
    fleet = Fleet(stopped=3, busy=1, room=room)
    with serving(fleet) as url:
        report = Waker(url).wake()
        assert [machine.id for machine in report.machines if not machine.busy] == ["cold0"]
        assert report.distinct == 1
        assert len(fleet.stopped) == 2
        again = Waker(url).wake(busy_counts=True)
    assert again.rounds == 1
    assert len(fleet.stopped) == 2


def test_fewer_machines_than_asked_for_are_in_the_report_and_no_error() -> None:
    with serving(Fleet(stopped=2)) as url:
        report = Waker(url).wake(machines=5)
    assert (report.distinct, report.missing, report.ok) == (2, 3, False)
    assert json.loads(json.dumps(report.as_dict()))["missing"] == 3


async def test_the_async_waker_wakes_in_the_callers_loop() -> None:
    with serving(Fleet(stopped=3)) as url:
        report = await AsyncWaker(url).wake(machines=3)
    assert report.distinct == 3


async def test_the_sync_waker_works_inside_a_running_loop() -> None:
    """In a thread of its own: the loop stands still meanwhile, but nothing breaks."""
    with serving(Fleet(stopped=2)) as url:
        assert Waker(url).wake(machines=2).distinct == 2
        with pytest.raises(UsageError):
            Waker(url).wake(machines=0)


def test_a_sync_wake_leaves_the_threads_event_loop_alone() -> None:
    """Checked in a thread of its own: pytest's loop is not ours to replace."""
    same = []

    def check(url: str) -> None:
        mine = asyncio.new_event_loop()
        asyncio.set_event_loop(mine)
        Waker(url).wake()
        same.append(asyncio.get_event_loop_policy().get_event_loop() is mine)
        mine.close()

    with serving(Fleet(stopped=1)) as url:
        thread = threading.Thread(target=check, args=(url,))
        thread.start()
        thread.join()
    assert same == [True]


def test_a_thousand_machines_answer_and_none_fails() -> None:
    fleet = Fleet(stopped=1000, hold_s=0.5)
    with serving(fleet) as url:
        report = Waker(url, timeout_s=60).wake(machines=1000)
    assert report.distinct == 1000
    assert report.seen == {"200 with a receipt": 1000}


def test_a_thousand_wakes_raise_a_low_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = {"now": (256, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.update(now=new))
    assert client._room_for(10) == 10
    assert limits["now"][0] == 256, "a small fan-out touches nothing"
    assert client._room_for(1000) == 1000
    assert 1000 < limits["now"][0] <= 4096


def test_where_the_limit_of_open_files_stands_fewer_go_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    room = client._room_for(1000)
    assert 1 <= room < 256
    assert "ulimit -n" in caplog.text


def test_a_token_is_sent_and_never_shown() -> None:
    fleet = Fleet(stopped=1)
    with serving(fleet) as url:
        waker = Waker(url, token="s3cret")
        report = waker.wake()
    assert fleet.requests[0]["authorization"] == "bearer s3cret"
    assert "s3cret" not in repr(waker) + repr(report) + repr(waker.target)


@pytest.mark.parametrize(("token", "said"), [(None, "none was given"), ("old-one", "refused the token")])
def test_a_refused_token_is_an_error_at_once(token: str | None, said: str) -> None:
    asked = []

    async def deny(request: dict[str, str], writer: asyncio.StreamWriter) -> None:
        asked.append(request)
        writer.write(answer("401 Unauthorized"))

    with serving(deny) as url, pytest.raises(Unauthorized, match=said) as caught:
        Waker(url, token=token).wake()
    assert len(asked) == 1
    assert "old-one" not in str(caught.value)


def test_a_closed_door_is_asked_again_until_it_opens() -> None:
    """The platform's race is an ordinary `ask again`: refused, reset, refused, then a receipt."""
    turns = iter(["closed", "reset", "receipt"])

    async def leaving(_: dict[str, str], writer: asyncio.StreamWriter) -> None:
        match next(turns):
            case "closed":
                writer.write(answer("503 Service Unavailable", retry_after=1, wake_machine="a", wake_state="closed"))
            case "reset":
                writer.transport.abort()
            case _:
                writer.write(receipt("b"))

    with serving(leaving) as url:
        report = Waker(url).wake()
    assert report.machines[0].id == "b"
    assert report.requests == 3
    assert report.seen["503 from a worker, closed"] == 1


def test_after_a_failed_round_there_is_one_probe_and_the_full_number_after_a_receipt() -> None:
    """Rule 18: three at once fail, one probe gets a receipt, then those missing are asked for at once."""
    sizes: list[int] = []
    fleet = Fleet(stopped=3)
    failing = 3

    async def serve(request: dict[str, str], writer: asyncio.StreamWriter) -> None:
        nonlocal failing
        sizes.append(len(sizes))
        if failing:
            failing -= 1
            writer.write(answer("502 Bad Gateway", "[PM07] failed to change machine state\n"))
        else:
            await fleet(request, writer)

    with serving(serve) as url:
        report = Waker(url).wake(machines=3)
    assert report.distinct == 3
    assert report.requests == len(sizes) == 3 + 1 + 3
    assert report.seen["502 without a receipt: '[PM07] failed to change machine state'"] == 3


def test_nobody_there_says_what_was_tried_and_seen_inside_the_deadline() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(NotWoken) as caught:
            Waker(f"127.0.0.1:{port}", timeout_s=1.5).wake(machines=2)
    said = str(caught.value)
    assert f"127.0.0.1:{port}" in said
    assert "connection refused" in said
    assert "wakes in 1." in said
    assert "external" in said


@pytest.mark.parametrize(
    ("bytes_", "seen"),
    [
        (answer("200 OK", "<html>hello</html>"), "200 without a receipt"),
        (answer("404 Not Found", "nothing here\nat all"), "404 without a receipt: 'nothing here'"),
        (answer("301 Moved", location="https://x.example/"), "301 to https://x.example/"),
        (b"220 mail.example ESMTP ready\r\n", "not an http answer"),
        (b"HTTP/1.1 200 OK\r\nx-long: " + b"x" * 100_000, "not an http answer"),
        (b"", "the connection was closed without an answer"),
    ],
    ids=["a page", "not found", "redirect", "not http", "an endless head", "nothing"],
)
def test_a_server_that_is_not_ours_is_an_error_that_says_what_it_said(bytes_: bytes, seen: str) -> None:
    async def stranger(_: dict[str, str], writer: asyncio.StreamWriter) -> None:
        writer.write(bytes_)

    with serving(stranger) as url, pytest.raises(NotWoken) as caught:
        Waker(url, timeout_s=0.6).wake()
    assert seen in str(caught.value)


def test_an_answer_that_never_comes_ends_at_the_deadline() -> None:
    async def silent(_: dict[str, str], __: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    with serving(silent) as url, pytest.raises(NotWoken, match=r"silence|no answer within"):
        Waker(url, timeout_s=0.5).wake(machines=3)


def test_an_endless_body_is_not_waited_for() -> None:
    async def endless(_: dict[str, str], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
            await writer.drain()

    with serving(endless) as url, pytest.raises(NotWoken, match="200 without a receipt"):
        Waker(url, timeout_s=1.0).wake()


def test_a_name_without_an_address_says_so_and_what_may_be_meant() -> None:
    with pytest.raises(NotWoken, match=r"no address.*did you mean http://my-worker-of-nowhere\.flycast"):
        Waker("http://my-worker-of-nowhere", timeout_s=0.5).wake()


def test_a_wake_goes_by_name_and_tries_each_of_its_addresses() -> None:
    """`localhost` is ::1 first on many machines, and the server listens on 127.0.0.1 alone."""
    with serving(Fleet(stopped=2)) as url:
        assert Waker(url.replace("127.0.0.1", "localhost")).wake(machines=2).distinct == 2


def test_proxies_of_the_environment_are_not_used_for_plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(Fleet(stopped=1)) as url:
        assert Waker(url).wake().ok


@pytest.mark.parametrize("machines", [0, -1, 10_001])
def test_a_number_of_machines_out_of_range_is_refused(machines: int) -> None:
    with pytest.raises(UsageError, match="machines="):
        Waker("my-worker.flycast").wake(machines)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="hold_s=99"):
        Waker("my-worker.flycast", hold_s=99)
    with pytest.raises(UsageError, match="timeout_s=0"):
        Waker("my-worker.flycast").wake(timeout_s=0)


async def test_a_cancelled_wake_leaves_nothing_behind() -> None:
    entered = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def silent(_: dict[str, str], __: asyncio.StreamWriter) -> None:
        loop.call_soon_threadsafe(entered.set)
        await asyncio.sleep(3600)

    with serving(silent) as url:
        task = asyncio.create_task(AsyncWaker(url).wake(machines=3))
        await asyncio.wait_for(entered.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_who_never_got_a_turn_says_what_others_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    pressure = Pressure()
    monkeypatch.setattr(client, "_pressures", {"http://127.0.0.1:1/": pressure})
    from waker.policy import Answer

    pressure.note([Answer(None, "connection refused", retry_after_s=8.0)], time.monotonic(), 1.0)
    with pytest.raises(NotWoken, match=r"connection refused \(by another wake of this process"):
        Waker("127.0.0.1:1", timeout_s=0.3).wake()


async def test_any_httpx_transport_will_do() -> None:
    async def worker(request: httpx.Request) -> httpx.Response:
        headers = {"wake-machine": "m", "wake-boot": "b", "wake-ring": "1", "wake-up": "0"}
        return httpx.Response(200, headers=headers)

    report = await AsyncWaker("https://wake.example.com", transport=httpx.MockTransport(worker)).wake()
    assert report.cold == 1


def run_verb(*argv: str, environ: dict[str, str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    verb.arguments(parser)
    return verb.run(parser.parse_args(argv), environ or {})


def test_the_verb_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Fleet(stopped=2)) as url:
        assert run_verb(url, "--machines", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["machine", "found", "busy", "seconds"]
    assert sorted(line.split()[0] for line in lines[1:3]) == ["cold0", "cold1"]
    assert lines[-1].startswith("2 of 3 machines in ")
    assert lines[-1].endswith("1 missing")


def test_the_verb_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Fleet(stopped=1)) as url:
        assert run_verb(url, "--json", "--token-env", "MY_TOKEN", environ={"MY_TOKEN": "t"}) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["requested"], report["distinct"], report["cold"], report["rounds"]) == (1, 1, 1, 1)


def test_the_verb_wants_the_variable_it_was_told_to_read() -> None:
    with pytest.raises(UsageError, match="--token-env MY_TOKEN"):
        run_verb("my-worker.flycast", "--token-env", "MY_TOKEN")
