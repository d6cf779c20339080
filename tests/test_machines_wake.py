"""Waking through the Machines API: who is started, who counts, and what the fallback brings."""

import asyncio
import json
import os
from collections import Counter

import httpx
import pytest
from harness import BIN
from virtual_api import on_platform

from waker import AsyncWaker, NotWoken, Unauthorized, UsageError, Waker, client
from waker.emulator import Faults, Knobs, LocalPlatform
from waker.machines import Machine, RequestError
from waker.machines.client import Pacer
from waker.machines.jobs import JOB
from waker.machines.starts import address, candidates


@pytest.fixture(autouse=True)
def _no_pressure(monkeypatch):
    """No test inherits what another one learned of an address."""
    monkeypatch.setattr(client, "_pressures", {})


def a_machine(id_, state="stopped", *, started=0.0, metadata=None, **config):
    events = [{"type": "start", "status": "started", "timestamp": started * 1000}] if started else []
    return Machine.read({"id": id_, "state": state, "events": events, "private_ip": "fdaa::9",
                         "config": {"metadata": metadata or {}, **config}})  # fmt: skip


FLEET = [
    a_machine("c", started=10),
    a_machine("a", started=30),
    a_machine("b", started=20, metadata={"fly_process_group": "worker"}),
    a_machine("d", "destroyed"),
    a_machine("e", metadata={JOB: "job-1"}),
    a_machine("f", schedule="hourly"),
]


def ids(*arguments, **options):
    return "".join(machine.id for machine in candidates(FLEET, *arguments, **options))


def test_the_strategies_choose_among_what_may_be_started():
    """Neither what is gone, nor a job's machine, nor a scheduled one that was not named."""
    assert ids("next") == "abc"
    assert ids("next", last="a") == "bca"
    assert ids("next", last="c") == "abc"
    assert ids("oldest") == "cba"
    assert ids("all") == "abc"
    assert ids(["f", "b", "b", "x", "d"]) == "fb"
    assert ids("next", group="worker") == "b"


def test_a_machine_is_asked_at_its_own_address_and_port():
    assert address(a_machine("a", services=[{"internal_port": 9000}])) == "http://[fdaa::9]:9000/"
    assert address(a_machine("a", env={"WORKER_PORT": "7000"})) == "http://[fdaa::9]:7000/"
    assert address(a_machine("a")) == "http://[fdaa::9]:8080/"


class Worker:
    """A machine's program: gives receipts for LIVES seconds, then ends with 0."""

    def __init__(self, lives_s=3.0, listens_after_s=0.5, *, busy=False, status=200):
        self.lives_s, self.listens_after_s, self.busy, self.status = lives_s, listens_after_s, busy, status
        self.runs = Counter()

    async def __call__(self, machine):
        self.runs[machine.id] += 1
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.sleep(self.listens_after_s)
        machine.listen()

        async def answer():
            async for request in machine.requests:
                headers = {
                    "wake-version": "1", "wake-machine": machine.id, "wake-boot": str(began), "wake-ring": "1",
                    "wake-state": "working", "wake-busy": "yes" if self.busy else "no",
                    "wake-up": str(loop.time() - began),
                }  # fmt: skip
                request.answer(self.status, headers if self.status == 200 else {}, b"no")

        machine.spawn(answer())
        await asyncio.sleep(self.lives_s)
        return 0


def virtually(story, worker, *, machines=3, strategy="next", faults=None, knobs=None, seed=0, **options):
    """Run *story(waker, platform)* against machines that run *worker*; the waker goes through the API."""

    async def main(api, platform, wire):
        waker = AsyncWaker.via_api(
            "my-worker", api_token=platform.api_token, base_url=platform.api_url, transport=wire, strategy=strategy,
            timeout_s=60, **options,
        )  # fmt: skip
        waker._starter._pacer = Pacer()  # the process's own has another clock
        return await story(waker, platform)

    return on_platform(main, worker, machines=machines, faults=faults or Faults(), knobs=knobs, seed=seed)


def test_stopped_machines_are_started_and_counted_with_their_receipts():
    worker = Worker()

    async def story(waker, platform):
        report = await waker.wake(2)
        assert (report.distinct, report.cold, report.ok, report.unconfirmed) == (2, 2, True, ())
        assert report.target == "api:my-worker"
        assert json.dumps(report.as_dict())

    virtually(story, worker)
    assert worker.runs.total() == 2


def test_next_takes_turns():
    worker = Worker(lives_s=2)

    async def story(waker, platform):
        for _ in range(4):
            await waker.wake()
            await asyncio.sleep(30)

    virtually(story, worker)
    assert sorted(worker.runs.values()) == [1, 1, 2]


def test_all_and_a_list_start_every_one_of_them():
    async def story(waker, platform):
        assert (await waker.wake()).distinct == 3

    virtually(story, Worker(), strategy="all")

    async def listed(waker, platform):
        given = [platform.machines[2].id, platform.machines[0].id]
        waker._starter._strategy = given
        assert {machine.id for machine in (await waker.wake()).machines} == set(given)

    virtually(listed, Worker())


def test_a_machine_that_is_up_counts_without_a_second_start():
    worker = Worker(lives_s=100)

    async def story(waker, platform):
        await waker.wake(3)
        report = await waker.wake(3)
        assert (report.distinct, report.cold) == (3, 0)

    virtually(story, worker)
    assert worker.runs.total() == 3


def test_a_machine_that_is_just_leaving_is_started_again():
    """Its old run gave the last receipt it ever will; the window after its exit is asked through."""
    worker = Worker(lives_s=1)

    async def story(waker, platform):
        await waker.wake(3)
        await asyncio.sleep(1)  # they end about now
        report = await waker.wake(3)
        assert (report.distinct, report.cold) == (3, 3)

    for seed in range(8):
        virtually(story, worker, seed=seed)


def test_a_busy_machine_makes_room_for_the_next():
    worker = Worker(lives_s=1000, busy=True)

    async def story(waker, platform):
        first = await waker.wake()  # cold: busy with what it was woken for
        assert (first.distinct, first.cold) == (1, 1)
        report = await waker.wake(2)
        assert (report.distinct, report.cold) == (2, 2)
        with_busy = await waker.wake(3, busy_counts=True)
        assert (with_busy.distinct, with_busy.cold) == (3, 0)
        assert (await waker.wake(1)).missing == 1

    virtually(story, worker)


def test_a_machine_that_never_listens_is_started_unconfirmed():
    """It is asked until the deadline; with another one that answers the report says so, alone it is an error."""

    async def story(waker, platform):
        began = platform.now
        with pytest.raises(NotWoken, match=r"started, unconfirmed.*is this inside the private network") as failure:
            await waker.wake(timeout_s=20)
        assert platform.now - began == pytest.approx(20, abs=0.5)
        assert platform.machines[0].id in str(failure.value)

    virtually(story, Worker(lives_s=1e6, listens_after_s=1e6), machines=1)

    class Mixed(Worker):
        async def __call__(self, machine):
            self.listens_after_s = 0.5 if self.runs.total() else 1e6
            return await super().__call__(machine)

    async def mixed(waker, platform):
        report = await waker.wake(2, timeout_s=20)
        assert (report.distinct, report.missing, len(report.unconfirmed)) == (1, 1, 1)
        assert report.seen["started, unconfirmed"] == 1

    virtually(mixed, Mixed(lives_s=1e6), machines=2)


@pytest.mark.parametrize(
    "faults",
    [{"start_refused_after_exit": 0.5}, {"lease_held": 0.3}, {"api_rate_limited": 0.5}, {"api_error": 0.3},
     {"api_reset_before_answer": 0.3}, {"api_reset_mid_answer": 0.3}, {"api_slow_answer": 0.5}, {"no_capacity": 0.3},
     {"slow_start": 0.5}, {"start_fails": 0.3}],
    ids=lambda faults: next(iter(faults)),
)  # fmt: skip
def test_whatever_stands_in_the_way_is_asked_again_inside_the_deadline(faults):
    """And no machine is asked to start more often than the platform allows."""

    async def story(waker, platform):
        for _ in range(3):
            report = await waker.wake(3, timeout_s=300)
            assert report.distinct == 3
            await asyncio.sleep(20)
        # What the fault answers is its own affair; an honest 429 would be ours.
        if "api_rate_limited" not in faults:
            assert 429 not in [event.fields.get("status") for event in platform.events]

    virtually(story, Worker(), faults=Faults(**faults), seed=3)


def test_a_worker_that_refuses_the_token_is_an_error_at_once():
    async def story(waker, platform):
        with pytest.raises(Unauthorized, match="wants a token, and none was given"):
            await waker.wake(3)
        assert platform.now < 20

    virtually(story, Worker(status=401))


def test_filters_and_what_is_wrong_are_sentences():
    async def story(waker, platform):
        with pytest.raises(NotWoken, match="no machine with process group nobody, region ams can be started"):
            await waker.wake()

    virtually(story, Worker(), group="nobody", region="ams")

    async def wrong_token(waker, platform):
        from dataclasses import replace

        waker._starter._config = replace(waker._starter._config, authorization="Bearer wrong")
        with pytest.raises(RequestError, match="401"):
            await waker.wake()

    virtually(wrong_token, Worker())
    for strategy in ("newest", []):
        with pytest.raises(UsageError, match="strategy="):
            Waker.via_api("a", api_token="t", strategy=strategy)
    with pytest.raises(UsageError, match="no token"):
        Waker.via_api("a")
    with pytest.raises(UsageError, match="fallback: expected a waker that uses the Machines API"):
        Waker("a.flycast", fallback=Waker("b.flycast"))
    assert "secret" not in repr(Waker.via_api("a", api_token="secret"))


# -- the fallback ------------------------------------------------------------------------------------------------------


def with_fallback(story, worker, *, proxy, machines=3):
    """Run *story(waker)*: its wakes are answered by *proxy(request)*, its fallback is the platform's API."""

    async def main(api, platform, wire):
        fallback = AsyncWaker.via_api(
            "my-worker", api_token=platform.api_token, base_url=platform.api_url, transport=wire
        )
        fallback._starter._pacer = Pacer()

        class ByProxy(httpx.AsyncBaseTransport):
            async def handle_async_request(self, request):
                return await proxy(request, platform)

        waker = AsyncWaker("my-worker.flycast", transport=ByProxy(), fallback=fallback, timeout_s=30)
        return await story(waker)

    return on_platform(main, worker, machines=machines)


def receipt(machine):
    headers = {"wake-version": "1", "wake-machine": machine, "wake-boot": "b", "wake-ring": "1", "wake-up": "0"}
    return httpx.Response(200, headers=headers)


def test_the_fallback_starts_what_the_proxy_did_not_bring():
    """One machine answers every wake; the two others are started through the API, and it is left alone."""
    worker = Worker()

    async def proxy(request, platform):
        return receipt(platform.machines[0].id)

    async def story(waker):
        report = await waker.wake(3)
        assert (report.distinct, report.ok, report.target) == (3, True, "http://my-worker.flycast/")
        assert len({machine.id for machine in report.machines}) == 3

    with_fallback(story, worker, proxy=proxy)
    assert worker.runs.total() == 2


def test_the_fallback_is_not_used_where_the_proxy_does():
    async def proxy(request, platform):
        return receipt(platform.machines[0].id)

    worker = Worker()

    async def story(waker):
        assert (await waker.wake()).seen == {"200 with a receipt": 1}

    with_fallback(story, worker, proxy=proxy)
    assert worker.runs.total() == 0


def test_an_error_of_both_ways_tells_both():
    async def proxy(request, platform):
        return httpx.Response(401, stream=httpx.ByteStream(b""))

    async def story(waker):
        with pytest.raises(Unauthorized):
            await waker.wake()

    with_fallback(story, Worker(), proxy=proxy)
    broken = Waker.via_api("a", api_token="t", base_url="http://127.0.0.1:9")
    with pytest.raises(
        NotWoken, match=r"connection refused.*and through the Machines API: cannot list the machines of"
    ):
        Waker("http://127.0.0.1:9", timeout_s=1, fallback=broken).wake()


def test_real_workers_are_woken_past_the_proxy(tmp_path):
    """Whole machines: started by the API, confirmed at their private addresses, and drained."""
    (tmp_path / "app.py").write_text(
        "from waker import SqliteQueue\nqueue = SqliteQueue('jobs.db', durability='process')\n"
    )
    env = {"PATH": os.environ["PATH"], "WORKER_LINGER_S": "0"}
    with LocalPlatform([f"{BIN}/worker", "up", "app:queue"], machines=2, api=True, knobs=Knobs(time_scale=0.1),
                       cwd=str(tmp_path), env=env, log=lambda *_: None) as platform:  # fmt: skip
        waker = Waker.via_api("my-worker", api_token=platform.api_token, base_url=platform.api_url, timeout_s=60)
        report = waker.wake(2)
        assert (report.distinct, report.cold) == (2, 2)
        assert {machine.id for machine in report.machines} == {machine.id for machine in platform.machines}
        waker.nudge()
        assert waker.flush(60)
        platform.wait_all_stopped(60)
        assert {machine.exit_code for machine in platform.machines} == {0}
