"""The emulator's Machines API on the virtual clock: what is asked, what is answered, and what becomes of machines."""

import asyncio
import json

import pytest

from waker.emulator import Knobs, Platform, run_virtual

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
        return await self.platform.fetch(method, f"{self.platform.api_url}{path}", headers=fields, body=content)

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
        ("start", "starting", "flyd"),
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
