"""Machines and AsyncMachines against the documented requests and answers, and against a platform that misbehaves."""

import asyncio
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit

import pytest

from waker import UsageError, WakeError
from waker.machines import (
    AsyncMachines,
    Machine,
    MachineBusy,
    Machines,
    MachinesError,
    NoAnswer,
    NoCapacity,
    NotFound,
    OutcomeUnknown,
    PlatformError,
    RateLimited,
    RequestError,
    TokenRefused,
    Unreachable,
)
from waker.machines.client import Pacer
from waker.machines.config import INTERNAL_URL, PUBLIC_URL, ApiConfig
from waker.machines.requests import Bucket, Limit

FIXTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "machines_api")
APP, MACHINE, VERSION, NONCE = "my-app", "e2865641be9d86", "01J9ZK5V0Q6E7R8T9Y0A1B2C3D", "7f3d6f2a1c5e"
TOKEN = "fm2_lJPE-very-secret"


def documented(operation, name):
    """One documented exchange."""
    with open(os.path.join(FIXTURES, f"{operation}.json"), encoding="utf-8") as file:
        return next(each for each in json.load(file)["exchanges"] if each["name"] == name)


class Api:
    """A server that answers in order what it was told to, and keeps what it was asked."""

    def __init__(self, *script):
        self.script = list(script)  # (status, headers, body) or a function of the stream's writer
        self.rest = (599, {}, {"error": "the script is over"})
        self.asked = []

    async def serve(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.split(": ", 1) for line in head[1:] if line)
                headers = {name.lower(): value for name, value in headers.items()}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, target, _ = head[0].split(" ")
                parts = urlsplit(target)
                self.asked.append({"method": method, "path": parts.path, "query": parse_qs(parts.query),
                                   "headers": headers, "body": json.loads(body) if body else None})  # fmt: skip
                step = self.script.pop(0) if self.script else self.rest
                if callable(step):
                    await step(writer)
                    break
                status, more, answer = step
                content = (
                    answer if isinstance(answer, bytes) else b"" if answer is None else json.dumps(answer).encode()
                )
                lines = [f"HTTP/1.1 {status} x", *(f"{k}: {v}" for k, v in more.items())]
                if status != 204:
                    lines.append(f"content-length: {len(content)}")
                writer.write("\r\n".join([*lines, "", ""]).encode() + content)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@contextmanager
def serving(*script):
    """An Api on loopback, in a thread with a loop of its own; yields it with its `url`."""
    api = Api(*script)
    ready, told = threading.Event(), []

    async def main():
        stop = asyncio.Event()
        async with await asyncio.start_server(api.serve, "127.0.0.1", 0) as server:
            told.extend([server.sockets[0].getsockname()[1], asyncio.get_running_loop(), stop])
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(10)
    api.url = f"http://127.0.0.1:{told[0]}"
    try:
        yield api
    finally:
        told[1].call_soon_threadsafe(told[2].set)
        thread.join(10)


def step(exchange):
    answer = exchange["answer"]
    return answer["status"], answer["headers"], answer["body"]


def machines(api, **options):
    return Machines(APP, token=TOKEN, base_url=api.url, pacer=Pacer(1000), **{"timeout_s": 5, **options})


Ask = Callable[[AsyncMachines], Awaitable[object]]
CONFIG = {"image": "alpine:3"}

# (fixture, exchange) → how a user asks for it.
CALLS: dict[tuple[str, str], Ask] = {
    ("app_show", "an app"): lambda m: m.get_app(),
    ("app_show", "an app that is not there"): lambda m: m.get_app(),
    ("app_show", "a wrong token"): lambda m: m.get_app(),
    ("app_ip_assignments", "a private address and a public one"): lambda m: m.addresses(),
    ("machine_list", "all"): lambda m: m.list(),
    ("machine_list", "filtered"): lambda m: m.list(states=["stopped", "started"], region="ams", metadata={"team": "a"}),
    ("machine_create", "a machine that starts"): lambda m: m.create(
        {"image": "alpine:3", "init": {"exec": ["true"]}, "restart": {"policy": "no"}}, name="job-1", region="ams"
    ),
    ("machine_create", "a machine that does not start"): lambda m: m.create(CONFIG, skip_launch=True),
    ("machine_create", "a machine with a lease"): lambda m: m.create(CONFIG, lease_ttl_s=30),
    ("machine_create", "no room"): lambda m: m.create(CONFIG, region="ams"),
    ("machine_create", "a name that is taken"): lambda m: m.create(CONFIG, name="job-1"),
    ("machine_create", "too fast"): lambda m: m.create(CONFIG, timeout_s=0.3),
    ("machine_get", "a machine that has left"): lambda m: m.get(MACHINE),
    ("machine_get", "an exit in the older place"): lambda m: m.get(MACHINE),
    ("machine_get", "an exit without its zeros"): lambda m: m.get(MACHINE),
    ("machine_get", "out of memory"): lambda m: m.get(MACHINE),
    ("machine_get", "a lost host"): lambda m: m.get(MACHINE),
    ("machine_get", "one that is not there"): lambda m: m.get(MACHINE),
    ("machine_update", "another configuration"): lambda m: m.update(MACHINE, CONFIG, version=VERSION, skip_launch=True),
    ("machine_delete", "a stopped one"): lambda m: m.delete(MACHINE),
    ("machine_delete", "whatever it does"): lambda m: m.delete(MACHINE, force=True),
    ("machine_delete", "a leased one"): lambda m: m.delete(MACHINE, nonce=NONCE),
    ("machine_start", "a stopped one"): lambda m: m.start(MACHINE),
    ("machine_start", "just after its exit"): lambda m: m.start(MACHINE, timeout_s=0.3),
    ("machine_start", "in an update"): lambda m: m.start(MACHINE, timeout_s=0.3),
    ("machine_start", "under somebody's lease"): lambda m: m.start(MACHINE, timeout_s=0.3),
    ("machine_start", "too fast"): lambda m: m.start(MACHINE, timeout_s=0.3),
    ("machine_stop", "as it is configured"): lambda m: m.stop(MACHINE),
    ("machine_stop", "with a signal"): lambda m: m.stop(MACHINE, signal="SIGTERM", kill_after_s=5),
    ("machine_wait", "it came true"): lambda m: m.wait(
        MACHINE, "stopped", "destroyed", version=VERSION, timeout_s=60.9
    ),
    ("machine_wait", "the short answer"): lambda m: m.wait(MACHINE, "started", timeout_s=1.9),
    ("machine_wait", "it did not"): lambda m: m.wait(MACHINE, "started", timeout_s=1.1),
    ("machine_wait", "stopped, of no version"): lambda m: m.wait(MACHINE, "stopped", timeout_s=1.1),
    ("machine_events", "the last"): lambda m: m.events(MACHINE, limit=50),
    ("machine_exec", "a command that fails"): lambda m: m.execute(MACHINE, ["cat", "/nowhere"], timeout_s=10),
    ("machine_exec", "a command with input"): lambda m: m.execute(MACHINE, ["cat"], stdin="hi", timeout_s=10),
    ("lease_show", "somebody's"): lambda m: m.lease(MACHINE),
    ("lease_show", "none"): lambda m: m.lease(MACHINE),
    ("lease_create", "a new one"): lambda m: m.acquire_lease(MACHINE, 60, description="mine"),
    ("lease_create", "bare"): lambda m: m.acquire_lease(MACHINE, 60, description="mine"),
    ("lease_create", "for longer"): lambda m: m.acquire_lease(MACHINE, 60, nonce=NONCE),
    ("lease_create", "somebody has one"): lambda m: m.acquire_lease(MACHINE, 60),
    ("lease_release", "ours"): lambda m: m.release_lease(MACHINE, NONCE),
    ("metadata_show", "all"): lambda m: m.metadata(MACHINE),
    ("metadata_set", "one"): lambda m: m.set_metadata(MACHINE, "team", "b"),
    ("metadata_delete", "one"): lambda m: m.delete_metadata(MACHINE, "team"),
}
ERRORS = {
    ("app_show", "an app that is not there"): NotFound,
    ("app_show", "a wrong token"): TokenRefused,
    ("machine_create", "no room"): NoCapacity,
    ("machine_create", "a name that is taken"): MachineBusy,
    ("machine_create", "too fast"): RateLimited,
    ("machine_get", "one that is not there"): NotFound,
    ("machine_start", "just after its exit"): MachineBusy,
    ("machine_start", "in an update"): MachineBusy,
    ("machine_start", "under somebody's lease"): MachineBusy,
    ("machine_start", "too fast"): RateLimited,
    ("machine_wait", "stopped, of no version"): RequestError,
    ("lease_create", "somebody has one"): MachineBusy,
}


@pytest.mark.parametrize("key", CALLS, ids=": ".join)
def test_each_call_sends_what_is_documented_and_reads_the_answer(key):
    """Method, path, query, body and headers to the letter; errors by whose fault, with the request id."""
    exchange = documented(*key)
    with serving() as api:
        api.rest = step(exchange)

        async def ask():
            async with AsyncMachines(APP, token=TOKEN, base_url=api.url, pacer=Pacer(1000)) as m:
                return await CALLS[key](m)

        if key in ERRORS:
            with pytest.raises(ERRORS[key]) as failure:
                asyncio.run(ask())
            assert type(failure.value) is ERRORS[key]
            assert failure.value.request_id == exchange["answer"]["headers"]["fly-request-id"]
            assert failure.value.request_id in str(failure.value)
            said = exchange["answer"]["body"]
            assert (said.get("error") or said.get("message")) in str(failure.value)
        else:
            asyncio.run(ask())
        asked, wanted = api.asked[0], exchange["request"]
    assert (asked["method"], asked["path"]) == (wanted["method"], wanted["path"])
    assert asked["query"] == {k: v if isinstance(v, list) else [v] for k, v in wanted["query"].items()}
    assert asked["body"] == wanted["body"]
    assert asked["headers"]["authorization"] == f"FlyV1 {TOKEN}"
    assert wanted["headers"].items() <= asked["headers"].items()


def test_every_documented_exchange_is_asked_for():
    """A fixture that nobody uses holds nobody to anything."""
    mine = {name for name, _ in CALLS}
    for name in sorted(mine):
        with open(os.path.join(FIXTURES, f"{name}.json"), encoding="utf-8") as file:
            exchanges = {(name, each["name"]) for each in json.load(file)["exchanges"]}
        assert exchanges <= set(CALLS), name


def read(operation, name):
    return Machine.read(documented(operation, name)["answer"]["body"])


def test_the_exit_code_is_found_wherever_it_is_documented():
    assert read("machine_get", "a machine that has left").exit.exit_code == 127
    assert read("machine_get", "a machine that has left").exit.signal is None
    assert read("machine_get", "an exit in the older place").exit.exit_code == 3
    assert read("machine_get", "an exit without its zeros").exit.exit_code == 0
    oom = read("machine_get", "out of memory").exit
    assert (oom.exit_code, oom.signal, oom.oom_killed) == (137, 9, True)
    assert read("machine_create", "a machine that starts").exit is None


def test_records_tolerate_what_they_do_not_know_and_what_is_missing():
    """The platform adds fields as it likes; whatever else comes is an answer that nobody documents."""
    machine = Machine.read({"id": "e1", "brand_new": {"a": 1}, "config": {"more": 1}, "events": [{"type": "odd"}]})
    assert (machine.id, machine.state, machine.exit, machine.metadata) == ("e1", "", None, {})
    assert read("machine_get", "a lost host").image == "alpine:3"
    for wrong in ([], "e1", None, {}, {"id": 7}):
        with pytest.raises(ValueError, match="machine"):
            Machine.read(wrong)


def test_the_sync_twin_returns_the_same():
    exchange = documented("machine_get", "a machine that has left")
    with serving(step(exchange), (200, {}, {"ok": True})) as api:
        assert machines(api).get(MACHINE) == Machine.read(exchange["answer"]["body"])
        machines(api).delete(MACHINE)

        async def inside_a_loop():
            return machines(api)

        assert asyncio.run(inside_a_loop()).app == APP


BUSY = documented("machine_start", "just after its exit")
FAST = documented("machine_start", "too fast")
STARTED = documented("machine_start", "a stopped one")
GOT = documented("machine_get", "a machine that has left")


def test_a_start_is_asked_again_while_the_machine_is_busy_or_we_are_too_fast(caplog):
    caplog.set_level(logging.INFO, "waker.machines")
    lease = documented("machine_start", "under somebody's lease")
    with serving(*map(step, [BUSY, FAST, lease, STARTED])) as api:
        assert machines(api, timeout_s=30).start(MACHINE) == "stopped"
        assert len(api.asked) == 4
    assert caplog.text.count("machines.asked_again call=start") == 3


async def reset(writer):
    """Break off in the middle of an answer."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
    await writer.drain()
    writer.transport.abort()


SAFE = {"get": lambda m: m.get(MACHINE), "delete": lambda m: m.delete(MACHINE), "stop": lambda m: m.stop(MACHINE),
        "set": lambda m: m.set_metadata(MACHINE, "a", "b")}  # fmt: skip
ONCE = {"create": lambda m: m.create(CONFIG), "start": lambda m: m.start(MACHINE),
        "exec": lambda m: m.execute(MACHINE, ["x"]), "lease": lambda m: m.acquire_lease(MACHINE, 5)}  # fmt: skip


@pytest.mark.parametrize("trouble", ["500", "reset"])
@pytest.mark.parametrize("call", SAFE)
def test_what_is_the_same_twice_is_repeated_when_nobody_knows(call, trouble):
    first = reset if trouble == "reset" else (500, {}, {"error": "oh"})
    good = step(GOT) if call == "get" else (200, {}, {"ok": True})
    with serving(first, good) as api:
        SAFE[call](machines(api))
        assert len(api.asked) == 2


@pytest.mark.parametrize("trouble", ["500", "reset"])
@pytest.mark.parametrize("call", ONCE)
def test_what_may_have_been_done_is_never_repeated(call, trouble):
    first = reset if trouble == "reset" else (500, {}, {"error": "oh"})
    with serving(first) as api:
        with pytest.raises(PlatformError) as failure:
            ONCE[call](machines(api))
        assert len(api.asked) == 1
    assert isinstance(failure.value, NoAnswer) == (trouble == "reset")


def test_a_delete_that_was_done_the_first_time_is_done():
    with serving(reset, (404, {}, {"error": "machine not found"})) as api:
        machines(api).delete(MACHINE, force=True)
        assert len(api.asked) == 2


def test_a_redirect_is_not_followed_and_the_token_goes_nowhere_else():
    with serving() as elsewhere, serving((307, {"location": f"{elsewhere.url}/v1/x"}, None)) as api:
        with pytest.raises(PlatformError, match="307 it leads to another address"):
            machines(api).create(CONFIG)
        assert elsewhere.asked == []


def test_no_error_log_or_repr_has_the_token(caplog):
    """Even if the platform repeats it."""
    caplog.set_level(logging.DEBUG)
    said = {"error": f"token FlyV1 {TOKEN} is bad"}
    with serving(*[(412, {}, said)] * 9, (401, {}, said)) as api:
        texts = [repr(machines(api)), repr(machines(api)._config), repr(machines(api).asynchronous())]
        with pytest.raises(MachineBusy) as busy:
            machines(api, timeout_s=1.5).start(MACHINE)
        api.script = [(401, {}, said)]
        with pytest.raises(TokenRefused) as refused:
            machines(api).get(MACHINE)
    lease = documented("lease_create", "a new one")["answer"]["body"]
    from waker.machines import Lease

    texts += [str(busy.value), repr(busy.value), str(refused.value), caplog.text]
    assert not any(TOKEN in text for text in texts)
    assert "[token]" in str(refused.value)
    assert NONCE not in repr(Lease.read(lease))


def test_answers_that_nobody_documents_are_the_platforms_fault():
    for body in (b"<html>", [], {"no": "id"}, b"\xff"):
        with serving((200, {}, body)) as api, pytest.raises(PlatformError, match="cannot create a machine in app my"):
            machines(api).create(CONFIG)
    with serving((502, {}, b"<html>bad gateway\n</html>")) as api, pytest.raises(PlatformError, match="502 <html>bad"):
        machines(api).create(CONFIG)


def test_a_silent_platform_is_given_up_at_the_deadline():
    over = threading.Event()

    async def silence(writer):
        while not over.is_set():
            await asyncio.sleep(0.01)

    with serving(silence) as api:
        with pytest.raises(NoAnswer, match=r"no answer within 0\.\d+ s"):
            machines(api).create(CONFIG, timeout_s=0.2)
        over.set()


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Unreachable, match="cannot look at machine e2865641be9d86: no connection"):
            Machines(APP, token=TOKEN, base_url=url, timeout_s=0.3).get(MACHINE)


def test_a_wait_longer_than_a_minute_is_several_calls():
    exchange = documented("machine_wait", "it did not")
    true = documented("machine_wait", "it came true")
    with serving(step(exchange), step(exchange), step(true)) as api:
        waited = machines(api).wait(MACHINE, "stopped", version=VERSION, timeout_s=150)
        assert waited.state == "stopped"
        assert [asked["query"]["timeout"] for asked in api.asked] == [["60"], ["60"], ["60"]]
        assert {asked["query"]["version"][0] for asked in api.asked} == {VERSION}


# -- once --------------------------------------------------------------------------------------------------------------


def listed(*names):
    body = documented("machine_list", "all")["answer"]["body"][0]
    return (200, {}, [{**body, "name": name} for name in names])


def test_a_create_that_was_lost_is_found_by_its_name(monkeypatch):
    with serving(reset, listed("other"), listed("other", "job-1")) as api:
        monkeypatch.setattr("waker.machines.client.LOOKS_S", (0.0, 0.0))
        assert machines(api).create_once(CONFIG, name="job-1").name == "job-1"
        assert [asked["method"] for asked in api.asked] == ["POST", "GET", "GET"]


def test_a_create_that_never_happened_is_repeated_under_the_same_name(monkeypatch):
    monkeypatch.setattr("waker.machines.client.LOOKS_S", (0.0,))
    created = step(documented("machine_create", "a machine that starts"))
    with serving((500, {}, {"error": "oh"}), listed(), created) as api:
        assert machines(api).create_once(CONFIG, name="job-1").id == MACHINE
        assert [asked["method"] for asked in api.asked] == ["POST", "GET", "POST"]
        assert {asked["body"]["name"] for asked in api.asked if asked["body"]} == {"job-1"}


def test_a_create_that_comes_through_late_makes_the_second_fail_and_is_found(monkeypatch):
    monkeypatch.setattr("waker.machines.client.LOOKS_S", (0.0,))
    taken = step(documented("machine_create", "a name that is taken"))
    with serving(reset, listed(), taken, listed("job-1")) as api:
        assert machines(api).create_once(CONFIG, name="job-1").name == "job-1"
        assert len(api.asked) == 4


def test_what_stays_unknown_is_said(monkeypatch):
    monkeypatch.setattr("waker.machines.client.LOOKS_S", (0.0,))
    with (
        serving(reset, (403, {}, {"error": "no"})) as api,
        pytest.raises(OutcomeUnknown, match=r"job-1.*may have been"),
    ):
        machines(api).create_once(CONFIG, name="job-1")
    with serving(reset, listed(), reset, listed(), reset, listed()) as api:
        with pytest.raises(OutcomeUnknown, match=r"job-1.*may have been"):
            machines(api).create_once(CONFIG, name="job-1")
        assert len(api.asked) == 6


@pytest.mark.parametrize("name", ["no room", "a name that is taken"])
def test_a_plain_refusal_is_not_looked_up(name):
    with serving(step(documented("machine_create", name))) as api:
        with pytest.raises(MachinesError):
            machines(api).create_once(CONFIG, name="job-1")
        assert len(api.asked) == 1


# -- pace --------------------------------------------------------------------------------------------------------------


def test_a_bucket_keeps_to_the_limit_and_waits_no_longer_than_it_must():
    """Three at once, then one a second, whoever asks when; a pause makes the burst whole again."""
    bucket = Bucket(Limit(1, 3))
    assert [bucket.reserve(10.0) for _ in range(5)] == [0, 0, 0, 1, 2]
    assert bucket.reserve(12.5) == 0.5
    assert not bucket.idle(15.9)
    assert bucket.idle(16.0)
    assert [bucket.reserve(100.0) for _ in range(4)] == [0, 0, 0, 1]
    bucket.give_back()
    assert bucket.reserve(100.0) == 1


def test_a_bucket_that_was_refused_pauses_for_an_interval():
    """Somebody else uses the limit up: we take the next turn, not the burst."""
    bucket = Bucket(Limit(1, 3))
    bucket.reserve(0.0)
    bucket.refused(0.0)
    assert bucket.reserve(0.0) == 1
    assert bucket.reserve(0.0) == 2


def test_clients_of_one_process_share_their_pace():
    """Ten gets at once; the eleventh of another client waits its turn, a create has a limit of its own."""
    pacer, turns = Pacer(), []
    from waker.machines.requests import Call

    turns = [pacer.reserve("http://api", Call("get", APP, MACHINE), 0.0) for _ in range(12)]
    assert turns == [0] * 10 + [pytest.approx(0.2), pytest.approx(0.4)]
    assert pacer.reserve("http://api", Call("get", APP, "other"), 0.0) == 0
    assert pacer.reserve("http://api", Call("create", APP), 0.0) == 0


def test_a_turn_after_the_deadline_is_refused_at_once():
    with serving(*[step(GOT)] * 3) as api:
        slow = Pacer(0.001)
        m = Machines(APP, token=TOKEN, base_url=api.url, pacer=slow, timeout_s=5)
        for _ in range(3):
            api.script.append((200, {}, []))
            api.script = [(200, {}, [])]
            m.list()
        with pytest.raises(RateLimited, match=r"its turn comes in \d+ s, after the deadline"):
            m.list()
        assert len(api.asked) == 3


# -- settings ----------------------------------------------------------------------------------------------------------


def test_the_settings_are_those_of_the_platforms_own_tools():
    environ = {"FLY_APP_NAME": "a", "FLY_ACCESS_TOKEN": "Bearer t1", "FLY_MACHINE_ID": "e1"}
    assert ApiConfig.from_environ(environ) == ApiConfig("a", INTERNAL_URL, "Bearer t1")
    environ = {"FLY_API_TOKEN": "FlyV1 fm2_x,fm2_y", "FLY_ACCESS_TOKEN": "other"}
    assert ApiConfig.from_environ(environ, app="b") == ApiConfig("b", PUBLIC_URL, "FlyV1 fm2_x,fm2_y")
    environ = {"FLY_FLAPS_BASE_URL": "http://127.0.0.1:9/"}
    assert ApiConfig.from_environ(environ, app="b", token="t").base_url == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({}, "no app: .*\nno token: set FLY_API_TOKEN"),
        ({"FLY_APP_NAME": "a b", "FLY_API_TOKEN": "x y-secret"}, "FLY_APP_NAME='a b'.*\nFLY_API_TOKEN: expected"),
        ({"FLY_APP_NAME": "a", "FLY_API_TOKEN": "x", "FLY_FLAPS_BASE_URL": "api"}, "FLY_FLAPS_BASE_URL='api'"),
        ({"FLY_APP_NAME": "a", "FLY_API_TOKEN": "x", "FLY_FLAPS_BASE_URL": "http://example.com"}, "clear text"),
    ],
)
def test_wrong_settings_are_told_all_at_once(environ, says):
    with pytest.raises(UsageError) as failure:
        ApiConfig.from_environ(environ)
    assert re.search(says, str(failure.value))
    assert "secret" not in str(failure.value)


def test_wrong_arguments_are_refused_before_anything_is_sent():
    with serving() as api:
        m = machines(api)
        for wrong in (lambda: m.get(""), lambda: m.get(".."), lambda: m.wait(MACHINE), lambda: m.get("x", timeout_s=0)):
            with pytest.raises(UsageError):
                wrong()
        assert api.asked == []
        with pytest.raises(WakeError):
            m.get("a/b?c")
        assert api.asked[0]["path"] == "/v1/apps/my-app/machines/a%2Fb%3Fc"
