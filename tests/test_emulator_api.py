"""The emulator's Machines API on the virtual clock: what is asked, what is answered, and what becomes of machines."""

import asyncio
import base64
import json
from dataclasses import replace

import documents
import pytest

from waker.emulator import Faults, Image, Knobs, Platform, run_virtual

IMAGE = "registry.fly.io/jobs:v1"
AT_ONCE = Knobs(
    prepare_s=(1.0, 1.0), boot_s=(0.5, 0.5), exit_settle_s=(2.0, 2.0), destroy_s=(0.2, 0.2), api_rate_per_s=1e6,
    api_get_rate_per_s=1e6, start_rate_per_s=1e6, api_burst=1_000_000, api_get_burst=1_000_000, start_burst=1_000_000,
)  # fmt: skip
BUDGETS = Knobs(prepare_s=(1.0, 1.0), boot_s=(0.5, 0.5), exit_settle_s=(2.0, 2.0))


async def job(machine):
    """What the images here run: for LIVES seconds, then an end with CODE; it ends at once when it is told to."""
    told = asyncio.Event()
    machine.on_signal(lambda number: told.set())
    try:
        async with asyncio.timeout(float(machine.env.get("LIVES", "5"))):
            await told.wait()
    except TimeoutError:
        return int(machine.env.get("CODE", "0"))
    return 0


async def serving(machine):
    """Answers each request with its id, for ever."""
    async for request in machine.requests:
        request.answer(200, {"wake-machine": machine.id}, machine.id.encode())


class Client:
    """Requests to one platform's API, on its virtual clock."""

    def __init__(self, platform):
        self.platform = platform
        self.headers = {"authorization": f"Bearer {platform.api_token}"}

    async def raw(self, method, path, body=None, **headers):
        fields = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        reply = await self.platform.fetch(method, f"{self.platform.api_url}{path}", headers=fields, body=content)
        if documents.there():
            documents.check(method, path, reply)
        return reply

    async def __call__(self, method, path, body=None, **headers):
        """(status, body) of a request below the app."""
        reply = await self.raw(method, f"/v1/apps/my-worker{path}", body, **headers)
        return reply.status, json.loads(reply.body) if reply.body else None

    async def ok(self, method, path, body=None, **headers):
        status, answer = await self(method, path, body, **headers)
        assert status < 300, (status, answer)
        return answer

    async def create(self, *, env=None, **request):
        config = {"image": IMAGE, "env": env or {}, **request.pop("config", {})}
        return await self.ok("POST", "/machines", {"config": config, **request})

    async def wait(self, machine, state, timeout=60, **query):
        words = "&".join(f"{name}={value}" for name, value in {"state": state, "timeout": timeout, **query}.items())
        return await self("GET", f"/machines/{machine}/wait?{words}")


def on_api(story, *, program=None, knobs=AT_ONCE, seed=0, images=None, **options):
    """Run *story(client, platform)* on a virtual clock."""
    options.setdefault("log", lambda machine, line: None)

    async def main():
        images_ = {IMAGE: job, "registry.fly.io/serves:v1": serving, **(images or {})}
        async with Platform(program, api=True, images=images_, knobs=knobs, seed=seed, **options) as platform:
            return await story(Client(platform), platform)

    return run_virtual(main(), seed)


# Who may ask


@pytest.mark.parametrize("header", ["", "Bearer wrong", "FlyV1 wrong,other", "Basic emulated", "emulated"])
def test_a_wrong_token_is_answered_401_in_the_words_that_were_seen(header):
    async def story(client, platform):
        client.headers = {"authorization": header} if header else {}
        return await client("GET", "/machines")

    assert on_api(story) == (401, {"error": "Authenticate: token validation error"})


@pytest.mark.parametrize("header", ["Bearer emulated", "FlyV1 emulated", "FlyV1 fm2_other,emulated", "bearer emulated"])
def test_a_token_comes_with_either_scheme(header):
    async def story(client, platform):
        client.headers = {"authorization": header}
        return (await client("GET", "/machines"))[0]

    assert on_api(story) == 200


def test_every_answer_has_request_ids_and_says_who_answered():
    async def story(client, platform):
        return [await client.raw("GET", path) for path in ("/v1/apps/my-worker", "/v1/apps/none", "/nothing")]

    replies = on_api(story)
    assert [reply.status for reply in replies] == [200, 404, 404]
    for reply in replies:
        assert reply.header("fly-request-id").endswith("-ams")
        assert reply.header("fly-trace-id").endswith(reply.header("fly-span-id"))
        assert "emulator" in reply.header("server")
        assert reply.header("content-type").startswith("application/json")


def test_what_is_not_emulated_says_so_by_name_and_what_is_not_known_is_404_or_405():
    async def story(client, platform):
        machine = (await client.create())["id"]
        return [
            await client("POST", f"/machines/{machine}/suspend"),
            await client("GET", "/secrets"),
            await client("GET", "/nothing"),
            await client("POST", f"/machines/{machine}/wait"),
            await client("GET", "/machines/e0000000000000"),
        ]

    suspend, secrets, nothing, wrong_method, nobody = on_api(story)
    assert suspend == (501, {"error": "not emulated: Machines_suspend"})
    assert secrets == (501, {"error": "not emulated: Secrets_list"})
    assert nothing[0] == 404
    assert wrong_method[0] == 405
    assert nobody == (404, {"error": "machine not found"})


# One life


def test_a_machine_is_created_runs_once_and_tells_its_exit_code_in_the_documented_place():
    async def story(client, platform):
        created = await client.create(
            env={"LIVES": "3", "CODE": "7"}, config={"restart": {"policy": "no"}}, name="job-1", region="fra"
        )
        waited = await client.wait(created["id"], "stopped", version=created["instance_id"])
        return created, waited, await client.ok("GET", f"/machines/{created['id']}"), platform.now

    created, (status, waited), machine, now = on_api(story, region=["ams", "fra"])
    assert (created["state"], created["name"], created["region"]) == ("created", "job-1", "fra")
    assert [(event["type"], event["status"], event["source"]) for event in created["events"]] == [
        ("launch", "created", "user")
    ]
    assert len(created["id"]) == 14
    assert len(created["instance_id"]) == 26
    assert (status, waited["ok"], waited["state"]) == (200, True, "stopped")
    assert now == pytest.approx(1.0 + 0.5 + 3.0)
    assert [(event["type"], event["status"], event["source"]) for event in machine["events"]] == [
        ("exit", "stopped", "flyd"),
        ("start", "started", "flyd"),
        ("start", "starting", "user"),
        ("launch", "created", "user"),
    ]
    exit_event = machine["events"][0]["request"]["exit_event"]
    assert exit_event["exit_code"] == 7
    assert exit_event["requested_stop"] is exit_event["restarting"] is exit_event["oom_killed"] is False
    assert exit_event["signal"] == exit_event["guest_signal"] == -1
    assert machine["events"][0]["timestamp"] == 4500


def test_a_failing_job_is_restarted_by_its_policy_and_each_exit_says_so():
    async def story(client, platform):
        restart = {"policy": "on-failure", "max_retries": 2}
        machine = await client.create(env={"LIVES": "1", "CODE": "3"}, config={"restart": restart})
        await client.wait(machine["id"], "stopped")
        return await client.ok("GET", f"/machines/{machine['id']}/events")

    exits = [event["request"] for event in on_api(story) if event["type"] == "exit"]
    assert [each["exit_event"]["restarting"] for each in exits] == [False, True, True]
    assert [each["restart_count"] for each in exits] == [0, 2, 1]


def test_auto_destroy_removes_a_machine_that_has_finished_if_its_policy_is_no():
    async def story(client, platform, policy):
        config = {"auto_destroy": True, "restart": {"policy": policy}}
        machine = (await client.create(env={"LIVES": "1"}, config=config))["id"]
        await client.wait(machine, "stopped")
        await asyncio.sleep(1)
        return (await client.ok("GET", f"/machines/{machine}"))["state"], await client.ok("GET", "/machines")

    state, listed = on_api(lambda client, platform: story(client, platform, "no"))
    assert (state, listed) == ("destroyed", [])
    state, listed = on_api(lambda client, platform: story(client, platform, "on-failure"))
    assert (state, len(listed)) == ("stopped", 1)


# Starting, and being refused


async def settled(client, **options):
    """A machine that has run, stopped, and may be started again; its id."""
    machine = (await client.create(env={"LIVES": "1"}, **options))["id"]
    await client.wait(machine, "stopped")
    await asyncio.sleep(3)
    return machine


def test_a_start_right_after_an_exit_is_refused_though_the_state_reads_stopped():
    async def story(client, platform):
        machine = (await client.create(env={"LIVES": "1"}))["id"]
        await client.wait(machine, "stopped")
        state = (await client.ok("GET", f"/machines/{machine}"))["state"]
        refused = await client("POST", f"/machines/{machine}/start")
        await asyncio.sleep(3)
        return state, refused, await client("POST", f"/machines/{machine}/start")

    state, refused, started = on_api(story)
    assert state == "stopped"
    assert refused == (412, {"error": "failed_precondition: machine still active, refusing to start"})
    assert started == (200, {"previous_state": "stopped", "migrated": False, "new_host": ""})


def test_a_machine_that_was_just_created_is_refused_until_it_is_ready():
    async def story(client, platform):
        machine = (await client.create(skip_launch=True))["id"]
        refused = await client("POST", f"/machines/{machine}/start")
        await asyncio.sleep(2)
        before = (await client.ok("GET", f"/machines/{machine}"))["state"]
        started = await client("POST", f"/machines/{machine}/start")
        return refused, before, started[0], (await client.wait(machine, "started"))[0]

    refused, before, started, waited = on_api(story)
    assert refused == (
        412,
        {"error": "failed_precondition: unable to start machine from current state: 'created'"},
    )
    assert (before, started, waited) == ("created", 200, 200)


def test_a_start_of_a_machine_that_is_up_is_an_error_to_be_ignored_or_none_by_a_knob():
    async def story(client, platform):
        machine = (await client.create(env={"LIVES": "60"}))["id"]
        await client.wait(machine, "started")
        return await client("POST", f"/machines/{machine}/start")

    status, body = on_api(story)
    assert (status, "'started'" in body["error"]) == (412, True)
    assert on_api(story, knobs=replace(AT_ONCE, start_when_started="accepted"))[0] == 200


def test_stop_signals_and_kills_in_the_forms_that_clients_send():
    """flyctl sends its id and "0s" for a timeout that was not set; the docs have seconds, the OpenAPI file "1s"."""

    async def story(client, platform, body):
        machine = (await client.create(env={"LIVES": "600"}))["id"]
        await client.wait(machine, "started")
        stopped = await client("POST", f"/machines/{machine}/stop", body)
        await client.wait(machine, "stopped")
        return stopped, (await client.ok("GET", f"/machines/{machine}/events?limit=2"))

    bodies = [None, {}, {"id": "x", "signal": "SIGTERM", "timeout": "0s"}, {"timeout": 5}, {"timeout": None}]
    for body in [*bodies, {"signal": "", "timeout": "1m30s"}, {"signal": 15}]:
        stopped, (exit_, stop) = on_api(lambda client, platform, body=body: story(client, platform, body))
        assert stopped == (200, {"ok": True})
        assert (stop["type"], stop["status"], stop["source"]) == ("stop", "stopping", "user")
        assert exit_["request"]["exit_event"]["requested_stop"] is True


@pytest.mark.parametrize(
    "body", [{"signal": "SIGWRONG"}, {"timeout": "soon"}, {"timeout": "-1s"}, {"signal": True}, [], b"{", b"\xff"]
)
def test_a_stop_that_makes_no_sense_is_400(body):
    async def story(client, platform):
        machine = (await client.create(env={"LIVES": "600"}))["id"]
        await client.wait(machine, "started")
        return await client("POST", f"/machines/{machine}/stop", body)

    status, answer = on_api(story)
    assert status == 400
    assert "error" in answer


def test_a_program_that_ignores_its_signal_is_killed_when_the_time_is_over():
    async def deaf(machine):
        machine.on_signal(lambda number: None)
        await asyncio.sleep(600)

    async def story(client, platform):
        machine = (await client.create(config={"stop_config": {"signal": "SIGTERM", "timeout": 3_000_000_000}}))["id"]
        await client.wait(machine, "started")
        began = platform.now
        await client.ok("POST", f"/machines/{machine}/stop")
        await client.wait(machine, "stopped")
        shown = await client.ok("GET", f"/machines/{machine}")
        return platform.now - began, shown["events"][0]["request"]["exit_event"], shown["config"]["stop_config"]

    took_s, exit_event, kept = on_api(story, images={IMAGE: deaf})
    assert took_s == pytest.approx(3.0)
    assert (exit_event["exit_code"], exit_event["signal"], exit_event["requested_stop"]) == (137, 9, True)
    assert kept == {"signal": "SIGTERM", "timeout": "3s"}


def test_restart_starts_it_again_whatever_its_policy_says():
    async def story(client, platform):
        machine = (await client.create(env={"LIVES": "600"}, config={"restart": {"policy": "no"}}))["id"]
        await client.wait(machine, "started")
        answer = await client("POST", f"/machines/{machine}/restart?timeout=1s&signal=SIGTERM")
        state = (await client.ok("GET", f"/machines/{machine}"))["state"]
        await asyncio.sleep(1)
        waited = await client.wait(machine, "started")
        return answer, state, waited[0], len(platform.machine(machine).runs)

    assert on_api(story) == ((200, {"ok": True}), "stopping", 200, 2)


def test_signal_takes_names_and_numbers_and_is_not_a_stop():
    async def counts(machine):
        got = []
        machine.on_signal(got.append)
        while len(got) < 2:
            await asyncio.sleep(0.1)
        return sum(got)

    async def story(client, platform):
        machine = (await client.create())["id"]
        refused = (await client("POST", f"/machines/{machine}/signal", {"signal": "SIGUSR1"}))[0]
        await client.wait(machine, "started")
        sent = [
            (await client("POST", f"/machines/{machine}/signal", {"signal": signal}))[0]
            for signal in ("SIGUSR1", 12, "SIGSTOP", None)
        ]
        await client.wait(machine, "stopped")
        return refused, sent, platform.machine(machine).exit_code

    assert on_api(story, images={IMAGE: counts}, restart="no")[:2] == (412, [200, 200, 400, 400])


# Waiting


def test_wait_returns_408_when_the_time_is_over_and_says_what_the_state_is():
    async def story(client, platform):
        machine = await settled(client)
        began = platform.now
        return await client.wait(machine, "started", 5), platform.now - began

    (status, body), took_s = on_api(story)
    assert (status, body) == (
        408,
        {"error": "machine failed to reach desired state, started, currently stopped"},
    )
    assert took_s == pytest.approx(5.0)


def test_wait_takes_sixty_seconds_at_most_and_is_given_them_by_default():
    async def story(client, platform):
        machine = await settled(client)
        began = platform.now
        status, _ = await client("GET", f"/machines/{machine}/wait")
        refused = [(await client.wait(machine, "started", timeout))[0] for timeout in (0, 61, -1, "soon")]
        return status, platform.now - began, refused

    status, took_s, refused = on_api(story)
    assert (status, refused) == (408, [400, 400, 400, 400])
    assert took_s == pytest.approx(60.0)


def test_wait_takes_several_states_repeated_or_with_commas_and_settled():
    async def story(client, platform, query):
        machine = (await client.create(env={"LIVES": "2"}))["id"]
        return await client("GET", f"/machines/{machine}/wait?{query}")

    for query, state in [
        ("state=stopped&state=started", "started"),
        ("state=stopped,failed", "stopped"),
        ("state=settled", "started"),
        ("", "started"),
        ("state=failed&state=destroyed&state=stopped&timeout=9", "stopped"),
    ]:
        status, body = on_api(lambda client, platform, query=query: story(client, platform, query))
        assert (status, body["state"], body["ok"]) == (200, state, True)
    assert on_api(lambda client, platform: story(client, platform, "state=happy"))[0] == 400


def test_wait_sees_a_state_that_passed_between_two_looks():
    """A destroyed machine was stopped first; whoever waits for that has been told."""

    async def story(client, platform):
        config = {"auto_destroy": True, "restart": {"policy": "no"}}
        machine = (await client.create(env={"LIVES": "1"}, config=config))["id"]
        return await asyncio.gather(client.wait(machine, "stopped"), client.wait(machine, "destroyed"))

    stopped, destroyed = on_api(story)
    assert (stopped[0], stopped[1]["state"]) == (200, "stopped")
    assert (destroyed[0], destroyed[1]["state"]) == (200, "destroyed")


def test_wait_for_a_version_and_after_an_event():
    async def story(client, platform):
        created = await client.create(env={"LIVES": "1"})
        machine, version = created["id"], created["instance_id"]
        status, stopped = await client.wait(machine, "stopped", version=version)
        await asyncio.sleep(3)
        by_old_name = (await client.wait(machine, "stopped", instance_id=version))[0]
        unknown = (await client.wait(machine, "stopped", version="01AAAAAAAAAAAAAAAAAAAAAAAA"))[0]
        after, _ = await client.wait(machine, "stopped", 2, from_event_id=stopped["event_id"])
        nothing = (await client.wait(machine, "stopped", from_event_id="01AAAAAAAAAAAAAAAAAAAAAAAA"))[0]
        again, _ = await asyncio.gather(
            client.wait(machine, "stopped", 9, from_event_id=stopped["event_id"]),
            client.ok("POST", f"/machines/{machine}/start"),
        )
        return status, stopped["version"] == version, by_old_name, unknown, after, nothing, again[0]

    assert on_api(story) == (200, True, 200, 400, 408, 400, 200)


def test_waiting_for_stopped_without_a_version_is_refused_if_the_knob_says_so():
    async def story(client, platform):
        machine = await settled(client)
        return [
            await client.wait(machine, "stopped"),
            await client("GET", f"/machines/{machine}/wait?state=started,stopped"),
        ]

    refused, accepted = on_api(story, knobs=replace(AT_ONCE, wait_stopped_needs_version=True))
    assert refused == (400, {"error": "instance_id required when waiting for stopped machine"})
    assert accepted[0] == 200
    assert on_api(story)[0][0] == 200


# Leases


def test_a_lease_keeps_everybody_else_out_the_proxy_too():
    services = [{"internal_port": 8080, "autostart": True, "ports": [{"port": 80}]}]

    async def leased(client, platform):
        created = await client.create(
            config={"image": "registry.fly.io/serves:v1", "services": services}, skip_launch=True
        )
        machine = created["id"]
        await asyncio.sleep(2)
        nobody = await client("GET", f"/machines/{machine}/lease")
        taken = await client("POST", f"/machines/{machine}/lease", {"ttl": 30, "description": "mine"})
        nonce = taken[1]["data"]["nonce"]
        others = [
            await client(method, f"/machines/{machine}{path}", {"signal": "SIGINT"} if path == "/signal" else None)
            for method, path in [("POST", "/start"), ("DELETE", ""), ("POST", "/cordon"), ("POST", "/lease?ttl=5")]
        ]
        proxied = await platform.request()
        mine = await client("POST", f"/machines/{machine}/start", None, fly_machine_lease_nonce=nonce)
        refreshed = await client("POST", f"/machines/{machine}/lease?ttl=60", None, fly_machine_lease_nonce=nonce)
        seen = await client("GET", f"/machines/{machine}/lease")
        wrong = await client("DELETE", f"/machines/{machine}/lease", None, fly_machine_lease_nonce="wrong")
        missing = await client("DELETE", f"/machines/{machine}/lease")
        released = await client("DELETE", f"/machines/{machine}/lease", None, fly_machine_lease_nonce=nonce)
        return nobody, taken, others, proxied, mine, refreshed, seen, wrong, missing, released

    nobody, taken, others, proxied, mine, refreshed, seen, wrong, missing, released = on_api(leased)
    assert nobody == (404, {"error": "lease not found"})
    assert (taken[0], taken[1]["status"], taken[1]["data"]["description"]) == (201, "success", "mine")
    for status, body in others:
        assert status == 409
        said = body.get("error") or body["message"]
        assert "lease currently held by you@example.com, expires at 1970-01-01T00:00:3" in said
    assert (proxied.status, b"PM01" in proxied.body, b"lease currently held" in proxied.body) == (503, True, True)
    assert mine[0] == 200
    assert refreshed[0] == 201
    assert refreshed[1]["data"]["nonce"] == taken[1]["data"]["nonce"]
    assert refreshed[1]["data"]["expires_at"] > taken[1]["data"]["expires_at"]
    assert (seen[0], seen[1]["data"]["nonce"]) == (200, "")
    assert (wrong[0], missing[0], released) == (400, 400, (200, {"ok": True}))


def test_a_lease_ends_by_itself_and_can_be_bare():
    async def story(client, platform):
        created = await client.create(lease_ttl=5)
        machine = created["id"]
        held = (await client("POST", f"/machines/{machine}/cordon"))[0]
        mine = (await client("POST", f"/machines/{machine}/cordon", None, fly_machine_lease_nonce=created["nonce"]))[0]
        await asyncio.sleep(6)
        free = (await client("POST", f"/machines/{machine}/uncordon"))[0]
        return held, mine, free, (await client("POST", f"/machines/{machine}/lease"))[1]

    *statuses, lease = on_api(story, knobs=replace(AT_ONCE, lease_envelope=False))
    assert statuses == [409, 200, 200]
    assert set(lease) == {"owner", "expires_at", "version", "description", "nonce"}


# Budgets


def test_each_action_has_a_budget_on_each_machine_and_time_gives_it_back():
    async def story(client, platform):
        one = (await client.create())["id"]
        two = (await client.create())["id"]
        events = [(await client("GET", f"/machines/{one}/events"))[0] for _ in range(5)]
        other = (await client("GET", f"/machines/{two}/events"))[0]
        another = (await client("GET", f"/machines/{one}/versions"))[0]
        gets = [(await client("GET", f"/machines/{one}"))[0] for _ in range(12)]
        refused = await client.raw("GET", f"/v1/apps/my-worker/machines/{one}/events")
        await asyncio.sleep(2)
        later = [(await client("GET", f"/machines/{one}/events"))[0] for _ in range(3)]
        return events, other, another, gets, refused, later

    events, other, another, gets, refused, later = on_api(story, knobs=BUDGETS)
    assert events == [200, 200, 200, 429, 429]
    assert (other, another) == (200, 200)
    assert gets == [200] * 10 + [429, 429]
    assert (refused.status, json.loads(refused.body)) == (429, {"error": "rate limit exceeded"})
    assert refused.header("retry-after") is None
    assert later == [200, 200, 429]


def test_creating_is_about_once_a_second_for_an_app_and_the_scale_makes_it_quicker():
    async def story(client, platform):
        body = {"config": {"image": IMAGE}}
        return [(await client("POST", "/machines", body))[0] for _ in range(5) if not await asyncio.sleep(0.5)]

    assert on_api(story, knobs=BUDGETS) == [200, 200, 200, 200, 200]
    assert on_api(story, knobs=replace(BUDGETS, api_burst=1)) == [200, 429, 200, 429, 200]
    assert on_api(story, knobs=replace(BUDGETS, api_burst=1, time_scale=0.1)) == [200] * 5


def test_starts_by_the_proxy_and_by_the_api_use_one_budget():
    async def story(client, platform):
        machine = await settled(client)
        return [(await client("POST", f"/machines/{machine}/start"))[0] for _ in range(5)]

    knobs = replace(AT_ONCE, start_rate_per_s=1.0, start_burst=3, start_when_started="accepted")
    assert on_api(story, knobs=knobs) == [200, 200, 200, 429, 429]


# Creating


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "config.image"),
        ({"config": {"image": ""}}, "config.image"),
        ({"config": {"image": IMAGE, "env": {"A": 1}}}, "config.env.A: expected a string, not a number"),
        ({"config": {"image": IMAGE, "env": {"A=B": "1"}}}, "config.env"),
        ({"config": {"image": IMAGE, "restart": {"policy": "never"}}}, "config.restart.policy"),
        ({"config": {"image": IMAGE, "schedule": "yearly"}}, "config.schedule"),
        ({"config": {"image": IMAGE, "services": [{"ports": [{"port": 80}]}]}}, "internal_port"),
        ({"config": {"image": IMAGE, "files": [{"guest_path": "x", "raw_value": ""}]}}, "guest_path"),
        ({"config": {"image": IMAGE, "files": [{"guest_path": "/x", "raw_value": "?"}]}}, "base64"),
        ({"config": {"image": IMAGE, "files": [{"guest_path": "/x"}]}}, "raw_value"),
        ({"config": {"image": IMAGE, "stop_config": {"timeout": "soon"}}}, "stop_config.timeout"),
        ({"config": {"image": IMAGE}, "region": "mars"}, "region mars not found"),
        ({"config": {"image": IMAGE}, "lease_ttl": -1}, "ttl"),
        ({"config": {"image": IMAGE, "mounts": [{"volume": "vol_1", "path": "data"}]}}, "mounts"),
    ],
)
def test_a_create_that_makes_no_sense_is_400_and_leaves_nothing(body, said):
    async def story(client, platform):
        return await client("POST", "/machines", body), await client.ok("GET", "/machines?include_deleted=true")

    (status, answer), machines = on_api(story)
    assert (status, machines) == (400, [])
    assert said in answer["error"]


def test_an_unknown_image_and_a_full_region_leave_nothing_behind():
    async def story(client, platform):
        unknown = await client("POST", "/machines", {"config": {"image": "nobody/knows:it"}})
        full = await client("POST", "/machines", {"config": {"image": IMAGE}, "region": "fra"})
        volume = await client("POST", "/volumes", {"name": "data", "region": "fra"})
        elsewhere = await client("POST", "/machines", {"config": {"image": IMAGE}, "region": "ams"})
        return unknown, full, volume, elsewhere[0], len(await client.ok("GET", "/machines"))

    unknown, full, volume, elsewhere, count = on_api(story, knobs=replace(AT_ONCE, full_regions="fra, nrt"))
    assert unknown[0] == 422
    assert "registry-1.docker.io/nobody/knows:it: not found" in unknown[1]["error"]
    assert (full[0], full[1]["status"]) == (412, "insufficient_capacity")
    assert volume == (400, {"error": "no capacity"})
    assert (elsewhere, count) == (200, 1)


def test_a_name_is_unique_in_its_app_as_long_as_its_machine_exists():
    async def story(client, platform):
        body = {"config": {"image": IMAGE}, "name": "job-1"}
        first = await client.ok("POST", "/machines", body)
        twin = await client("POST", "/machines", body)
        await client.ok("DELETE", f"/machines/{first['id']}?force=true")
        await client.wait(first["id"], "destroyed")
        return first["id"], twin, (await client("POST", "/machines", body))[0]

    first, (status, body), again = on_api(story)
    assert (status, again) == (409, 200)
    assert first in body["error"]


def test_what_clients_send_beside_is_dropped_and_noted():
    """GH InsForge#1251: fly.toml's names are not the API's; the platform says nothing, the emulator's log does."""

    async def story(client, platform):
        services = [{"internal_port": 8080, "auto_stop_machines": True, "autostop": True, "ports": [{"port": 80}]}]
        created = await client.create(config={"services": services, "guest": None}, unknown=1)
        ignored = [event.fields["fields"] for event in platform.events if event.type == "api.ignored"]
        return created["config"]["services"][0], " ".join(ignored)

    service, ignored = on_api(story)
    assert service["autostop"] is True
    assert "auto_stop_machines" not in service
    assert "config.services[0].auto_stop_machines" in ignored
    assert "config.services[0].autostop" in ignored
    assert "unknown" in ignored


def test_what_would_turn_out_otherwise_is_501_by_name():
    async def story(client, platform, config):
        return await client("POST", "/machines", {"config": {"image": IMAGE, **config}})

    for config, name in [
        ({"containers": [{}]}, "config.containers"),
        ({"guest": {"gpu_kind": "a100"}}, "config.guest.gpu_kind"),
        ({"restart": {"policy": "spot-price"}}, "spot-price"),
        ({"files": [{"guest_path": "/x", "secret_name": "S"}]}, "secret_name"),
        ({"rootfs": {"persist": "always"}}, "config.rootfs.persist"),
    ]:
        status, body = on_api(lambda client, platform, config=config: story(client, platform, config))
        assert status == 501
        assert body["error"].startswith("not emulated: ")
        assert name in body["error"]


# Looking


def test_lists_are_filtered_and_summaries_leave_out_what_is_long():
    async def story(client, platform):
        one = await client.create(config={"metadata": {"kind": "job", "owner": "me"}}, region="ams")
        two = await client.create(config={"metadata": {"kind": "web"}}, region="fra", skip_launch=True)
        gone = await client.create(env={})
        await client.ok("DELETE", f"/machines/{gone['id']}?kill=true")
        await client.wait(gone["id"], "destroyed")
        await client.wait(one["id"], "started")
        names = {one["id"]: 1, two["id"]: 2, gone["id"]: 3}

        async def found(query):
            return [names[machine["id"]] for machine in await client.ok("GET", f"/machines?{query}")]

        queries = ["", "region=fra", "state=started", "state=created,started", "metadata.kind=job&metadata.owner=me",
                   "metadata.kind=none", "include_deleted=true"]  # fmt: skip
        return [await found(query) for query in queries], await client.ok("GET", "/machines?summary=true")

    found, summary = on_api(story, region=["ams", "fra"])
    assert found == [[1, 2], [2], [1], [1, 2], [1], [], [1, 2, 3]]
    assert {"config", "events", "checks", "host_status"}.isdisjoint(summary[0])
    assert {"id", "name", "state", "region", "instance_id"} <= set(summary[0])


def test_events_are_newest_first_and_limited():
    async def story(client, platform):
        machine = await settled(client)
        limits = [await client("GET", f"/machines/{machine}/events?limit={limit}") for limit in (1, 2, 0, "x")]
        return await client.ok("GET", f"/machines/{machine}/events"), limits

    events, (one, two, none, wrong) = on_api(story)
    assert [event["timestamp"] for event in events] == sorted((event["timestamp"] for event in events), reverse=True)
    assert one[1] == events[:1]
    assert two[1] == events[:2]
    assert (none[0], wrong[0]) == (400, 400)
    assert len({event["id"] for event in events}) == len(events)
    assert {len(event["id"]) for event in events} == {26}


def test_an_exit_event_can_be_where_and_how_older_documents_have_it():
    async def story(client, platform):
        machine = await settled(client)
        return (await client.ok("GET", f"/machines/{machine}"))["events"][0]["request"]

    inner = on_api(story, knobs=replace(AT_ONCE, exit_event_in="MonitorEvent"))
    assert inner["MonitorEvent"]["exit_event"]["exit_code"] == 0
    short = on_api(story, knobs=replace(AT_ONCE, exit_event_omits_zeros=True, exited_at="milliseconds"))
    assert short["exit_event"] == {"guest_signal": -1, "signal": -1, "exited_at": 2500}
    assert on_api(story)["exit_event"]["exited_at"] == "1970-01-01T00:00:02.500000Z"


def test_metadata_is_read_written_and_removed_without_a_new_version():
    async def story(client, platform):
        created = await client.create(config={"metadata": {"a": "1"}})
        path = f"/machines/{created['id']}/metadata"
        steps = [
            await client("POST", f"{path}/b", {"value": "2"}),
            await client("GET", f"{path}/b"),
            await client("GET", f"{path}/none"),
            await client("PATCH", path, {"metadata": {"a": None, "c": "3"}}),
            await client("PUT", path, {"metadata": {"b": "", "d": "4"}, "machine_version": created["instance_id"]}),
            await client("PUT", path, {"metadata": {}, "machine_version": "01AAAAAAAAAAAAAAAAAAAAAAAA"}),
            await client("DELETE", f"{path}/d"),
            await client("POST", f"{path}/x", {}),
            await client("GET", path),
        ]
        return steps, (await client.ok("GET", f"/machines/{created['id']}"))["instance_id"] == created["instance_id"]

    steps, same = on_api(story)
    assert same
    assert [status for status, _ in steps] == [204, 200, 404, 204, 204, 412, 204, 400, 200]
    assert steps[1][1] == {"value": "2"}
    assert steps[-1][1] == {"c": "3"}


# Changing


def test_an_update_replaces_the_config_stops_what_runs_and_starts_the_new_version():
    async def story(client, platform):
        created = await client.create(env={"LIVES": "600", "A": "1"})
        machine = created["id"]
        await client.wait(machine, "started")
        updated = await client.ok("POST", f"/machines/{machine}", {"config": {"image": IMAGE, "env": {"LIVES": "9"}}})
        start = await client("POST", f"/machines/{machine}/start")
        version = updated["instance_id"]
        waited = await client.wait(machine, "started", version=version)
        old = await client.wait(machine, "stopped", version=created["instance_id"], timeout=2)
        shown = await client.ok("GET", f"/machines/{machine}")
        versions = await client.ok("GET", f"/machines/{machine}/versions")
        return created, updated, start, waited, old, shown, versions

    created, updated, start, waited, old, shown, versions = on_api(story)
    assert updated["state"] == "replacing"
    assert updated["instance_id"] != created["instance_id"]
    assert start == (412, {"error": "failed_precondition: machine getting replaced, refusing to start"})
    assert (waited[0], waited[1]["version"]) == (200, updated["instance_id"])
    assert old[0] == 400
    assert shown["config"]["env"] == {"LIVES": "9"}
    assert [each["version"] for each in versions] == [updated["instance_id"], created["instance_id"]]
    assert [event["type"] for event in reversed(shown["events"])] == [
        "launch", "start", "start", "update", "exit", "start", "start",
    ]  # fmt: skip


def test_an_update_with_skip_launch_leaves_a_stopped_machine_stopped_and_checks_the_version():
    async def story(client, platform):
        machine = await settled(client)
        body = {"config": {"image": IMAGE, "env": {"LIVES": "2"}}, "skip_launch": True}
        stale = await client("POST", f"/machines/{machine}", {**body, "current_version": "01AAAAAAAAAAAAAAAAAAAAAAAA"})
        updated = await client.ok("POST", f"/machines/{machine}", body)
        stopped = await client.wait(machine, "stopped", version=updated["instance_id"])
        started = await client("POST", f"/machines/{machine}/start")
        await client.wait(machine, "stopped", from_event_id=stopped[1]["event_id"])
        runs = platform.machine(machine).runs
        return stale[0], stopped[0], started[0], runs[-1].billed_s(0)

    assert on_api(story) == (412, 200, 200, pytest.approx(2.0))


def test_deleting_one_that_runs_needs_force_and_a_destroyed_one_can_be_got_for_two_days():
    async def story(client, platform):
        machine = (await client.create(env={"LIVES": "600"}))["id"]
        await client.wait(machine, "started")
        refused = await client("DELETE", f"/machines/{machine}")
        deleted = await client("DELETE", f"/machines/{machine}?force=true")
        await client.wait(machine, "destroyed")
        again = await client("DELETE", f"/machines/{machine}")
        states = [(await client.ok("GET", f"/machines/{machine}"))["state"]]
        start = await client("POST", f"/machines/{machine}/start")
        await asyncio.sleep(49 * 3600)
        return refused, deleted, again[0], states, start, await client("GET", f"/machines/{machine}")

    refused, deleted, again, states, start, late = on_api(story)
    assert (refused[0], deleted, again) == (412, (200, {"ok": True}), 404)
    assert (states, start[0], late[0]) == (["destroyed"], 404, 404)


# Through the proxy


def test_a_machine_from_the_api_is_behind_the_proxy_if_its_service_has_the_port():
    async def story(client, platform, service):
        config = {"image": "registry.fly.io/serves:v1", "services": [service] if service else []}
        machine = (await client.create(config=config, skip_launch=True))["id"]
        await asyncio.sleep(2)
        reply = await platform.request()
        return reply.status, reply.body.decode() == machine

    served = {"internal_port": 8080, "autostart": True, "ports": [{"port": 80, "handlers": ["http"]}]}
    ranged = {**served, "ports": [{"start_port": 1, "end_port": 100}]}
    without = [None, {**served, "ports": []}, {**served, "ports": [{"port": 443}]}, {**served, "autostart": None}]
    for service, expected in [(served, 200), (ranged, 200), *((each, 503) for each in without)]:
        status, same = on_api(lambda client, platform, service=service: story(client, platform, service))
        assert (status, same) == (expected, expected == 200), service


def test_a_cordoned_machine_gets_no_requests_until_it_is_uncordoned():
    async def story(client, platform):
        machine = platform.machines[0].id
        await client.ok("POST", f"/machines/{machine}/cordon")
        cordoned = (await platform.request()).status
        await client.ok("POST", f"/machines/{machine}/uncordon")
        return cordoned, (await platform.request()).status

    assert on_api(story, program=serving, machines=1) == (503, 200)


def test_the_platforms_own_machines_are_in_the_api_with_the_service_they_have():
    async def story(client, platform):
        return await client.ok("GET", "/machines"), (await client.ok("GET", "/ip_assignments"))["ips"]

    machines, ips = on_api(story, program=serving, machines=2, soft_limit=1, hard_limit=3)
    assert [machine["state"] for machine in machines] == ["stopped", "stopped"]
    service = machines[0]["config"]["services"][0]
    assert (service["autostart"], service["autostop"], service["ports"][0]["port"]) == (True, False, 80)
    assert service["concurrency"] == {"type": "requests", "soft_limit": 1, "hard_limit": 3}
    assert machines[0]["image_ref"]["repository"] == "my-worker"
    assert [address["ip"][:5] for address in ips] == ["fdaa:"]


def test_a_private_address_reaches_a_machine_only_while_it_runs():
    async def story(client, platform):
        machine = await client.create(config={"image": "registry.fly.io/serves:v1"})
        url = f"http://[{machine['private_ip']}]:8080/"
        with pytest.raises(ConnectionRefusedError):
            await platform.fetch("GET", url)
        await client.wait(machine["id"], "started")
        return (await platform.fetch("GET", url)).body.decode() == machine["id"]

    assert on_api(story)


# Schedules


def test_a_scheduled_machine_starts_about_every_interval_from_its_creation():
    async def story(client, platform):
        machine = (await client.create(env={"LIVES": "1"}, config={"schedule": "hourly"}))["id"]
        await asyncio.sleep(3.5 * 3600)
        runs = [run.starting_at for run in platform.machine(machine).runs]
        await client.ok("DELETE", f"/machines/{machine}")
        await asyncio.sleep(3 * 3600)
        return runs, len(platform.machine(machine).runs)

    runs, after = on_api(story)
    assert len(runs) == after == 4
    assert all(abs(at - 3600 * turn) <= 180 for turn, at in enumerate(runs))


def test_a_scheduled_start_of_one_that_is_still_up_is_lost():
    async def story(client, platform):
        machine = (await client.create(env={"LIVES": "5000"}, config={"schedule": "hourly"}))["id"]
        await asyncio.sleep(2.5 * 3600)
        return len(platform.machine(machine).runs)

    assert on_api(story) == 2


# Apps, addresses, volumes


def test_apps_are_made_found_and_removed():
    async def story(client, platform):
        async def ask(method, path, body=None):
            reply = await client.raw(method, f"/v1{path}", body)
            return reply.status, json.loads(reply.body) if reply.body else None

        return [
            await ask("POST", "/apps", {"app_name": "second", "org_slug": "personal"}),
            await ask("POST", "/apps?wait=true", {"name": "second", "org_slug": "personal"}),
            await ask("POST", "/apps", {"name": "No Name"}),
            await ask("GET", "/apps?org_slug=personal"),
            await ask("GET", "/apps"),
            await ask("GET", "/apps/second"),
            await ask("POST", "/apps/second/machines", {"config": {"image": IMAGE}}),
            await ask("DELETE", "/apps/second"),
            await ask("DELETE", "/apps/second?force=true"),
            await ask("GET", "/apps/second"),
        ]

    steps = on_api(story)
    assert [status for status, _ in steps] == [201, 422, 400, 200, 400, 200, 200, 412, 202, 404]
    assert [app["name"] for app in steps[3][1]["apps"]] == ["my-worker", "second"]
    assert steps[5][1]["organization"]["slug"] == "personal"


def test_an_app_is_reached_at_its_address_once_it_has_one():
    async def story(client, platform):
        await client.raw("POST", "/v1/apps", {"name": "second"})
        config = {
            "image": "registry.fly.io/serves:v1",
            "services": [{"internal_port": 8080, "autostart": True, "ports": [{"port": 80}]}],
        }
        await client.raw("POST", "/v1/apps/second/machines", {"config": config, "skip_launch": True})
        await asyncio.sleep(2)
        with pytest.raises(ConnectionRefusedError):
            await platform.fetch("GET", "http://second.flycast/")
        wrong = await client.raw("POST", "/v1/apps/second/ip_assignments", {"type": "v5"})
        given = await client.raw("POST", "/v1/apps/second/ip_assignments", {"type": "private_v6", "network": "default"})
        reached = await platform.fetch("GET", "http://second.flycast/")
        address = json.loads(given.body)["ip"]
        taken = await client.raw("DELETE", f"/v1/apps/second/ip_assignments/{address}")
        again = await client.raw("DELETE", f"/v1/apps/second/ip_assignments/{address}")
        return wrong.status, given.status, reached.status, taken.status, again.status

    assert on_api(story) == (400, 200, 200, 204, 404)


def test_a_volume_belongs_to_one_machine_at_a_time():
    async def story(client, platform):
        volume = await client.ok("POST", "/volumes", {"name": "data", "region": "ams", "size_gb": 1})
        config = {"mounts": [{"volume": volume["id"], "path": "/data"}]}
        one = await client.create(config=config)
        two = await client("POST", "/machines", {"config": {"image": IMAGE, **config}})
        none = await client(
            "POST", "/machines", {"config": {"image": IMAGE, "mounts": [{"volume": "vol_x", "path": "/data"}]}}
        )
        steps = [
            two[0],
            none[0],
            (await client.ok("GET", f"/volumes/{volume['id']}"))["attached_machine_id"] == one["id"],
            (await client("DELETE", f"/volumes/{volume['id']}"))[0],
            (await client("PUT", f"/volumes/{volume['id']}/extend", {"size_gb": 2}))[1]["volume"]["size_gb"],
            (await client("PUT", f"/volumes/{volume['id']}/extend", {"size_gb": 1}))[0],
            (await client("PUT", f"/volumes/{volume['id']}", {"snapshot_retention": 7}))[1]["snapshot_retention"],
            (await client("POST", f"/volumes/{volume['id']}/snapshots"))[0],
        ]
        await client.ok("DELETE", f"/machines/{one['id']}?force=true")
        await client.wait(one["id"], "destroyed")
        return [
            *steps,
            (await client("DELETE", f"/volumes/{volume['id']}"))[0],
            len(await client.ok("GET", "/volumes")),
        ]

    assert on_api(story) == [409, 404, True, 412, 2, 400, 7, 501, 200, 0]


# What a callable sees, and exec


def test_a_callable_sees_its_command_files_and_the_platforms_names():
    seen = {}

    async def program(machine):
        seen.update(command=machine.command, files=machine.files, env=machine.env)

    async def story(client, platform):
        config = {
            "init": {"cmd": ["curl", "http://example.com"]},
            "files": [{"guest_path": "/etc/../etc/job.json", "raw_value": base64.b64encode(b"{}").decode()}],
            "guest": {"memory_mb": 512},
            "env": {"A": "1", "FLY_MACHINE_ID": "mine"},
        }
        machine = await client.create(config=config)
        await client.wait(machine["id"], "stopped")
        refused = await client("POST", f"/machines/{machine['id']}/exec", {"command": ["true"]})
        return machine, refused[0]

    image = Image(entrypoint=("run",), cmd=("nothing",), env={"B": "2"}, program=program)
    machine, refused = on_api(story, images={IMAGE: image})
    assert seen["command"] == ("run", "curl", "http://example.com")
    assert seen["files"] == {"/etc/job.json": b"{}"}
    env = seen["env"]
    assert (env["A"], env["B"], env["FLY_MACHINE_ID"]) == ("1", "2", machine["id"])
    assert (env["FLY_APP_NAME"], env["FLY_REGION"], env["FLY_VM_MEMORY_MB"]) == ("my-worker", "ams", "512")
    assert (env["FLY_MACHINE_VERSION"], env["FLY_IMAGE_REF"]) == (machine["instance_id"], IMAGE)
    assert env["FLY_PRIVATE_IP"] == machine["private_ip"]
    assert {"FLY_PROCESS_GROUP", "PRIMARY_REGION"}.isdisjoint(env)
    assert refused == 412


# Faults


def test_each_fault_of_the_api_does_what_its_name_says():
    async def story(client, platform):
        body = {"config": {"image": IMAGE}}
        try:
            status, _ = await client("POST", "/machines", body)
        except ConnectionError:
            status = 0
        except json.JSONDecodeError:
            status = 502
        now, at_once = platform.now, len(await client.ok("GET", "/machines"))
        await asyncio.sleep(4)
        return status, at_once, len(await client.ok("GET", "/machines")), now

    expected = {
        "api_rate_limited": (429, 0, 0),
        "api_error": (500, 0, 0),
        "api_error_after": (500, 1, 1),
        "api_bad_gateway": (502, 0, 0),
        "api_drop": (0, 0, 0),
        "api_reset_before_answer": (0, 1, 1),
        "api_reset_mid_answer": (0, 1, 1),
        "api_create_late": (0, 0, 1),
        "no_capacity": (412, 0, 0),
        "api_slow_answer": (200, 1, 1),
    }
    for fault, (status, at_once, later) in expected.items():
        outcome = on_api(story, faults=Faults(**{fault: "1x1"}))
        assert outcome[:3] == (status, at_once, later), fault
        assert (outcome[3] == 5.0) is (fault == "api_slow_answer")


def test_a_lease_that_somebody_else_takes_blocks_for_a_while_and_can_be_seen():
    async def story(client, platform):
        machine = await settled(client)
        platform.set_faults(Faults(lease_held="1x1"))
        refused = await client("POST", f"/machines/{machine}/start")
        seen = await client.ok("GET", f"/machines/{machine}/lease")
        await asyncio.sleep(11)
        return refused, seen["data"]["owner"], (await client("POST", f"/machines/{machine}/start"))[0]

    (status, body), owner, later = on_api(story)
    assert (status, owner, later) == (409, "somebody@example.com", 200)
    assert "lease currently held by somebody@example.com" in body["error"]


def test_the_faults_of_machines_strike_here_too():
    async def story(client, platform):
        machine = await settled(client)
        platform.set_faults(Faults(start_refused_after_exit="1x1", out_of_memory="1x1"))
        refused = await client("POST", f"/machines/{machine}/start")
        await client.ok("POST", f"/machines/{machine}/start")
        await client.wait(machine, "started")
        await platform.wait_for("machine.restarting")
        exit_event = (await client.ok("GET", f"/machines/{machine}"))["events"]
        return refused, next(event["request"]["exit_event"] for event in exit_event if event["type"] == "exit")

    (status, body), exit_event = on_api(story, knobs=replace(AT_ONCE, kill_machine_s=(0.5, 0.5)))
    assert (status, body["error"]) == (412, "failed_precondition: machine still active, refusing to start")
    assert (exit_event["oom_killed"], exit_event["exit_code"], exit_event["signal"]) == (True, 137, 9)


def test_a_seed_repeats_a_story_with_faults():
    async def story(client, platform):
        for _ in range(10):
            try:
                await client("POST", "/machines", {"config": {"image": IMAGE}})
            except ConnectionError:
                pass
        await platform.wait_all_stopped()
        return [str(event) for event in platform.events]

    faults = Faults(api_rate_limited=0.2, api_reset_before_answer=0.2, api_create_late=0.2, kill_machine=0.3)
    one, same, other = (on_api(story, seed=seed, faults=faults) for seed in (3, 3, 4))
    assert one == same != other


def test_two_hundred_jobs_at_once_each_run_once():
    """What the client's own stories stand on: nothing here is slow, and nothing is lost."""

    async def story(client, platform):
        config = {"auto_destroy": True, "restart": {"policy": "no"}}
        created = await asyncio.gather(*(client.create(env={"LIVES": "3"}, config=config) for _ in range(200)))
        await asyncio.gather(*(client.wait(machine["id"], "stopped") for machine in created))
        return [len(platform.machine(machine["id"]).runs) for machine in created]

    assert on_api(story) == [1] * 200
