"""Schedules, fleets and the list of machines: the plans as values, the deeds against the emulated platform."""

import asyncio
import json
import os
import signal

import pytest
from harness import BIN, until
from virtual_api import on_platform

from waker import AsyncWaker, UsageError, rules
from waker.emulator import Faults, Knobs, LocalPlatform
from waker.machines import Address, Machine, Machines, MachinesError, NoCapacity, fleet, schedules
from waker.machines.client import Pacer
from waker.machines.jobs import JOB
from waker.machines.schedules import SCHEDULE, SLOT

IMAGE = "job:1"
HOUR = 3600.0


async def program(machine):
    """What scheduled machines run."""
    await asyncio.sleep(20)
    return 0


def virtually(story, **options):
    return on_platform(story, images={IMAGE: program}, machines=0, **options)


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_four_hourly_machines_start_every_quarter_of_an_hour():
    plan = schedules.plan("report", "hourly", 4, 900)
    assert [(slot.machine_name, slot.offset_s) for slot in plan.slots] == [
        ("report-1", 0), ("report-2", 900), ("report-3", 1800), ("report-4", 2700),
    ]  # fmt: skip
    assert schedules.plan("report", "hourly", 4) == plan
    assert schedules.plan("report", "daily", 24).stagger_s == HOUR


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("r", "hourly", 5, 900), "stagger 15m: 5 machines so far apart do not fit into one interval .hourly.; .* 12m"),
        (("r", "hourly", 2, 0), "stagger 0s"),
        (("r", "yearly", 2), "every 'yearly': expected hourly, daily, weekly, monthly"),
        (("r", "hourly", 0), "machines 0"),
        (("My Report", "hourly", 1), "schedule 'My Report': expected lower-case"),
    ],
)
def test_a_plan_that_cannot_be_is_a_sentence(arguments, says):
    with pytest.raises(UsageError, match=says):
        schedules.plan(*arguments)


def there(slot, created_at, name="report"):
    stamp = f"1970-01-01T{created_at // 3600:02.0f}:{created_at % 3600 // 60:02.0f}:00Z"
    return Machine.read({"id": f"e{slot}", "created_at": stamp, "state": "stopped",
                         "config": {"metadata": {SCHEDULE: name, SLOT: str(slot)}}})  # fmt: skip


PLAN = schedules.plan("report", "hourly", 4, 900)


def at(machines, now):
    """When each slot starts first; a star where its machine is there."""
    return [(step.at, step.machine is not None) for step in schedules.steps(PLAN, machines, now)]


def test_what_is_missing_is_created_at_its_own_place_beside_what_is_there():
    """Right after an interruption, within the hour, and hours later; whichever slot was lost."""
    now = 10 * HOUR
    assert at([], now) == [(now, False), (now + 900, False), (now + 1800, False), (now + 2700, False)]
    two = [there(0, now), there(1, now + 900)]
    assert at(two, now + 1000)[2:] == [(now + 1800, False), (now + 2700, False)]
    assert at(two, now + 2000)[2:] == [(now + 1800 + HOUR, False), (now + 2700, False)]
    assert at(two, now + 5 * HOUR + 10)[2:] == [(now + 5 * HOUR + 1800, False), (now + 5 * HOUR + 2700, False)]
    assert at([there(2, now + 1800)], now + 1830)[:3] == [
        (now + HOUR, False), (now + HOUR + 900, False), (now + 1800, True),
    ]  # fmt: skip


def test_a_slot_that_has_just_passed_is_taken_at_once():
    now = 10 * HOUR
    assert at([there(0, now)], now + 930)[1] == (now + 930, False)


def test_machines_beyond_the_plan_are_told():
    with pytest.raises(UsageError, match="not in this plan"):
        schedules.steps(PLAN, [there(7, HOUR)], 2 * HOUR)


def test_a_worker_on_a_schedule_does_not_wait_for_a_first_request():
    config = schedules.configuration(PLAN, PLAN.slots[0], ["worker", "up", "a:q"], IMAGE)
    assert config["env"] == {"WORKER_GREET_S": "0"}
    assert (config["schedule"], config["restart"]["policy"]) == ("hourly", "on-failure")
    assert "env" not in schedules.configuration(PLAN, PLAN.slots[0], ["report"], IMAGE)


# -- applied -----------------------------------------------------------------------------------------------------------


async def apply(machines, platform, plan=PLAN, command=("report",), **options):
    return await schedules.apply(
        machines, plan, list(command), image=IMAGE, now=lambda: platform.now, sleep=asyncio.sleep, **options
    )


def test_apply_creates_each_machine_when_its_turn_is_and_they_run_in_turn():
    async def story(machines, platform, wire):
        done = await apply(machines, platform)
        assert [round(step.at / 900) for step in done] == [0, 1, 2, 3]
        assert platform.now == pytest.approx(2700, abs=60)
        await asyncio.sleep(4 * HOUR)
        starts = [event.at for machine in await machines.list() for event in machine.events
                  if event.status == "started" and event.at > 2 * HOUR]  # fmt: skip
        gaps = [later - sooner for sooner, later in zip(sorted(starts), sorted(starts)[1:], strict=False)]
        assert gaps == pytest.approx([900] * len(gaps), abs=60)
        assert len(gaps) > 8
        listed = await schedules.look(machines)
        assert [(each.schedule, each.slot, each.every) for each in listed] == [
            ("report", i, "hourly") for i in range(4)
        ]

    virtually(story, knobs=Knobs(schedule_jitter=0.0))


@pytest.mark.parametrize("after_s", [0, 1, 1000, 2000])
def test_an_interrupted_apply_is_taken_up_where_it_was(after_s):
    """Whenever it was interrupted, and with creates that were lost, there are four machines a quarter apart."""

    async def story(machines, platform, wire):
        first = asyncio.create_task(apply(machines, platform))
        await asyncio.sleep(after_s)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await asyncio.sleep(500)
        done = await apply(machines, platform)
        assert len({step.machine.id for step in done}) == 4 == len(await machines.list())
        offsets = sorted((step.at - done[0].at) % HOUR for step in done)
        assert offsets == pytest.approx([0, 900, 1800, 2700], abs=90)
        assert [step.machine.id for step in await apply(machines, platform)] == [step.machine.id for step in done]

    virtually(story, faults=Faults(api_reset_before_answer=0.2, api_error=0.1), seed=after_s)


def test_another_configuration_of_the_same_schedule_is_refused_and_changes_nothing():
    async def story(machines, platform, wire):
        await apply(machines, platform)
        before = await machines.list()
        for plan, command in ((PLAN, ["other"]), (schedules.plan("report", "hourly", 4, 600), ["report"]),
                              (schedules.plan("report", "daily", 4, 900), ["report"])):  # fmt: skip
            with pytest.raises(UsageError, match="schedule report is there with another configuration: remove it"):
                await apply(machines, platform, plan, command)
        assert [machine.id for machine in await machines.list()] == [machine.id for machine in before]

    virtually(story)


def test_a_schedule_is_removed_unless_it_runs():
    async def story(machines, platform, wire):
        await machines.create({"image": IMAGE}, name="mine")
        await apply(machines, platform)
        await asyncio.sleep(60)
        with pytest.raises(UsageError, match="no schedule 'nothing'"):
            await schedules.remove(machines, "nothing")
        while not [m for m in await machines.list(states=["started"]) if m.metadata]:
            await asyncio.sleep(0.7)
        with pytest.raises(UsageError, match="runs; wait for its end, or say --force"):
            await schedules.remove(machines, "report")
        assert len(await machines.list()) == 5
        assert len(await schedules.remove(machines, "report", force=True)) == 4
        await asyncio.sleep(5)
        assert [m.name for m in await machines.list() if m.state != "destroyed"] == ["mine"]

    virtually(story)


# -- fleets ------------------------------------------------------------------------------------------------------------


def test_a_fleet_that_was_created_is_woken_and_nothing_is_wrong_with_it():
    async def serve(machine):
        loop = asyncio.get_running_loop()
        machine.spawn(answer(machine, loop.time()))
        await asyncio.sleep(5)
        return 0

    async def answer(machine, began):
        async for request in machine.requests:
            request.answer(200, {"wake-version": "1", "wake-machine": machine.id, "wake-boot": "b", "wake-ring": "1",
                                 "wake-up": str(asyncio.get_running_loop().time() - began)})  # fmt: skip

    async def story(machines, platform, wire):
        made = await fleet.create(machines, 3, fleet.configuration("serve:1"), name="crew", regions=["ams", "fra"])
        assert [(machine.name, machine.region) for machine in made] == [
            ("crew-1", "ams"), ("crew-2", "fra"), ("crew-3", "ams"),
        ]  # fmt: skip
        assert {machine.state for machine in await machines.list()} <= {"created", "stopped"}
        assert await fleet.check(machines) == ([], 3)
        more = await fleet.create(machines, 5, fleet.configuration("serve:1"), name="crew")
        assert [machine.name for machine in more] == ["crew-4", "crew-5"]
        await asyncio.sleep(60)
        waker = AsyncWaker.via_api("my-worker", api_token=platform.api_token, base_url=platform.api_url, transport=wire)
        waker._starter._pacer = Pacer()
        assert (await waker.wake(5)).distinct == 5

    on_platform(story, images={"serve:1": serve}, machines=0)


def test_a_fleet_that_cannot_be_made_leaves_nothing():
    """The third region has no room: the two machines before it are deleted again, those of before stay."""

    async def story(machines, platform, wire):
        await fleet.create(machines, 1, fleet.configuration(IMAGE), regions=["ams"])
        with pytest.raises(NoCapacity, match="cannot create a machine"):
            await fleet.create(machines, 4, fleet.configuration(IMAGE), regions=["ams", "ams", "ams", "lhr"])
        await asyncio.sleep(5)
        assert [m.name for m in await machines.list() if m.state != "destroyed"] == ["worker-1"]

    virtually(story, knobs=Knobs(full_regions="lhr"))


def test_wrong_fleets_are_sentences():
    for wrong in ({"port": 0}, {"stop_timeout_s": 1000}, {"command": "worker up"}, {"env": {"FLY_A": "1"}}):
        with pytest.raises(UsageError, match="expected"):
            fleet.configuration(IMAGE, **wrong)


GOOD = fleet.configuration("i:1", command=["worker", "up", "a:q"])
PRIVATE = [Address("fdaa:0:6ba9:0:1::2")]


def changed(**parts):
    return {**GOOD, **parts}


def service(**parts):
    return changed(services=[{**GOOD["services"][0], **parts}])


SPOILED = {
    "no-service": changed(services=[]),
    "service-without-ports": service(ports=[]),
    "autostart-off": service(autostart=False),
    "autostart-unset": service(autostart=None),
    "autostop": service(autostop=True),
    "autostop-unset": service(autostop=None),
    "force-https": service(ports=[{"port": 80, "handlers": ["http"], "force_https": True}]),
    "no-plain-http": service(ports=[{"port": 443, "handlers": ["tls", "http"]}]),
    "h2-backend": service(ports=[{"port": 80, "handlers": ["http"], "http_options": {"h2_backend": True}}]),
    "limit-type": service(concurrency={"soft_limit": 1}),
    "soft-limit": service(concurrency={"type": "requests", "soft_limit": 20}),
    "hard-limit": service(concurrency={"type": "requests", "soft_limit": 1, "hard_limit": 1}),
    "port-mismatch": service(internal_port=3000),
    "min-machines": service(min_machines_running=1),
    "restart-always": changed(restart={"policy": "always"}),
    "restart-no": changed(restart={"policy": "no"}),
    "restart-unset": changed(restart={}),
    "kill-signal": changed(stop_config={"signal": "SIGKILL", "timeout": "5s"}),
    "kill-signal-unset": changed(stop_config={"timeout": 5_000_000_000}),
    "stop-timeout-long": changed(stop_config={"signal": "SIGTERM", "timeout": "2s"}),
    "checks": service(checks=[{"type": "http"}]),
    "shell-form": changed(init={"exec": ["sh", "-c", "worker up a:q"]}),
    "nothing-to-drain": changed(init={"exec": ["worker", "up"]}),
    "token-in-file": changed(env={**GOOD["env"], "WORKER_TOKENS": "t"}),
}


@pytest.mark.parametrize("rule", SPOILED)
def test_each_thing_that_keeps_a_deployed_machine_from_waking_or_stopping_is_found(rule):
    """By the rules of `worker check`, in the Machines API's words; and nothing else is."""
    machine = Machine.read({"id": "e1", "config": SPOILED[rule]})
    found = fleet.findings("my-app", [machine], PRIVATE)
    assert [finding.rule for finding in found] == [rule]
    assert found[0].at.startswith("e1: ")
    assert found[0].severity == next(each.severity for each in rules.RULES if each.name == rule)


def test_a_good_machine_is_good_whatever_way_its_autostop_is_written():
    for autostop in ("off", False):
        machine = Machine.read({"id": "e1", "config": service(autostop=autostop)})
        assert fleet.findings("a", [machine], PRIVATE) == []


def test_the_apps_addresses_are_looked_at():
    machine = Machine.read({"id": "e1", "config": GOOD})
    found = fleet.findings("my-app", [machine], [Address("137.66.1.2", shared=True)])
    assert [(finding.rule, finding.at, finding.severity) for finding in found] == [
        ("no-private-address", "app my-app", "error"), ("public-address", "app my-app", "warning"),
    ]  # fmt: skip
    assert "fly ips allocate-v6 --private" in found[0].says
    assert "137.66.1.2" in found[1].says


def test_the_same_trouble_of_many_machines_is_one_line():
    bad = changed(restart={"policy": "always"})
    machines = [Machine.read({"id": f"e{i}", "config": bad if i < 5 else GOOD}) for i in range(6)]
    assert [finding.at for finding in fleet.findings("a", machines, PRIVATE)] == [
        "e0, e1, e2 and 2 more: restart.policy"
    ]
    assert fleet.findings("a", machines[:5], PRIVATE)[0].at == "all 5 machines: restart.policy"


def test_jobs_and_scheduled_machines_are_not_checked():
    async def story(machines, platform, wire):
        await machines.create({"image": IMAGE, "metadata": {JOB: "job-1"}})
        await machines.create({"image": IMAGE, "schedule": "daily"})
        assert await fleet.check(machines) == ([], 0)

    virtually(story)


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def platform():
    knobs = Knobs(time_scale=0.05, full_regions="lhr")
    with LocalPlatform(api=True, machines=0, images={"alpine:3": ["true"]}, knobs=knobs, log=lambda *_: None,
                       env={"PATH": os.environ["PATH"]}) as world:  # fmt: skip
        yield world


@pytest.fixture
def waker(processes, platform):
    """`waker(*words)` runs the command against the platform."""
    return lambda *words, **env: processes([f"{BIN}/waker", *words], env={**platform.environment, **env})


@pytest.fixture
def machines(platform):
    return Machines("my-worker", token=platform.api_token, base_url=platform.api_url, pacer=Pacer(20))


def test_the_life_of_a_schedule_as_it_is_typed(waker, platform, machines):
    apply = ("schedule", "apply", "--every", "hourly", "--machines", "2", "--stagger", "1s", "--image", "alpine:3")
    dry = waker(*apply, "--dry-run", "--", "true", FLY_API_TOKEN="")
    assert dry.wait() == 0, dry.text()
    assert len([line for line in dry.out if line.endswith("missing")]) == 2
    assert "What the platform does not promise:" in dry.out
    assert machines.list() == []
    first = waker(*apply, "--json", "--", "true")
    assert first.wait() == 0, first.text()
    ids = [step["machine"] for step in json.loads(first.out[0])["steps"]]
    again = waker(*apply, "--", "true")
    assert again.wait() == 0, again.text()
    assert [line.split()[-1] for line in again.out if "there:" in line] == ids
    until(lambda: {m.state for m in machines.list()} == {"stopped"}, "both have run")
    listed = waker("schedule", "list")
    assert listed.wait() == 0, listed.text()
    assert [line.split()[3] for line in listed.out[1:]] == ids
    assert waker("schedule", "remove", "schedule-hourly").wait() == 0
    assert waker("schedule", "remove", "schedule-hourly").wait() == 2


def test_an_interrupted_apply_says_that_it_can_be_run_again(waker):
    process = waker("schedule", "apply", "--every", "daily", "--machines", "2", "--image", "alpine:3", "--", "true")
    process.saw("schedule-daily-1 is machine")
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    assert "run it again: what is there stays" in process.text()


def test_waker_machines_and_fleet_as_they_are_typed(waker, platform, machines):
    created = waker("fleet", "create", "--count", "2", "--image", "alpine:3", "--", "sh", "-c", "exec worker up a:q")
    assert created.wait() == 0, created.text()
    assert created.out[-1] == "2 made, 0 were there"
    good = waker("fleet", "check")
    assert good.wait() == 0, good.text()
    assert good.out == ["2 machines of app my-worker: nothing is wrong"]
    machines.create({"image": "alpine:3", "init": {"exec": ["sh", "-c", "exit 3"]}, "restart": {"policy": "no"}})
    until(lambda: any(m.last_exit for m in machines.list()), "it has ended")
    bad = waker("fleet", "check", "--json")
    assert bad.wait() == 1, bad.text()
    assert "no-service" in {finding["rule"] for finding in json.loads(bad.out[0])["findings"]}
    listed = waker("machines")
    assert listed.wait() == 0, listed.text()
    failed = next(line for line in listed.out if "failed" in line)
    assert failed.split()[-2:] == ["3", "failed"]
    assert listed.out[-1] == "3 machines"
    stopped = waker("machines", "--state", "stopped", "--json")
    assert stopped.wait() == 0, stopped.text()
    assert [m["exit_code"] for m in json.loads(stopped.out[0])["machines"] if m["exit_code"] is not None] == [3]


BAD = {
    "machines": ({"FLY_API_TOKEN": ""}, 2, "no token"),
    "machines --app elsewhere": ({}, 1, "404 app not found; does the token see app elsewhere?"),
    "schedule list": ({"FLY_API_TOKEN": "wrong"}, 1, "401 Authenticate"),
    "schedule apply --every hourly --machines 5 --stagger 15m -- true": ({}, 2, "do not fit into one interval"),
    "schedule apply --every hourly --stagger soon -- true": ({}, 2, "--stagger 'soon': expected seconds"),
    "schedule apply --every sometimes -- true": ({}, 2, "every 'sometimes': expected hourly"),
    "schedule apply --every hourly": ({}, 2, "no command"),
    "schedule apply --every hourly -- true": ({}, 2, "no image: app my-worker has no machine to take it from"),
    "schedule apply --every hourly --image nowhere:1 -- true": ({}, 1, "nowhere:1: not found"),
    "schedule apply --every hourly --image alpine:3 --region lhr -- true": ({}, 1, "take another region"),
    "fleet create --count 0 --image alpine:3": ({}, 2, "count 0: expected a number from 1"),
    "fleet create --count 2 --image nowhere:1": ({}, 1, "nowhere:1: not found"),
    "fleet create --count 2 --image alpine:3 --region ams,lhr": ({}, 1, "take another region"),
    "fleet create --count 2 --image alpine:3 --memory 300": ({}, 2, "300 MB with 1 shared CPU"),
    "fleet check": ({}, 2, "has no machine to check"),
    "jobs reap --grace soon": ({}, 2, "--grace 'soon': expected"),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_a_sentence_and_leaves_nothing(waker, machines, words):
    env, code, says = BAD[words]
    process = waker(*words.split(), **env)
    assert process.wait() == code, process.text()
    assert says in process.text()
    assert "Traceback" not in process.text()
    assert [m for m in machines.list() if m.state not in ("destroyed", "destroying")] == []


def test_what_could_not_be_taken_back_is_told():
    async def story(machines, platform, wire):
        def fail(request):
            import httpx

            return httpx.Response(403, json={"error": "no"}) if request.method == "DELETE" else None

        wire.instead = fail
        with pytest.raises(MachinesError, match="and what was made before could not be deleted: "):
            await fleet.create(machines, 2, fleet.configuration(IMAGE), regions=["ams", "lhr"])

    virtually(story, knobs=Knobs(full_regions="lhr"))
