"""The emulator's API held against the documents: the exchanges that were typed down, the OpenAPI file, schemathesis."""

import asyncio
import json
import os
import re
from dataclasses import replace
from urllib.parse import urlencode

import documents
import pytest

from waker.emulator import Faults, Knobs, Platform, Reply
from waker.emulator.operations import EMULATED, ROWS

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "machines_api")
APP, MACHINE, VERSION, NONCE = "my-app", "e2865641be9d86", "01J9ZK5V0Q6E7R8T9Y0A1B2C3D", "7f3d6f2a1c5e"
VOLUME = "vol_4xp9l6q1k8j3zw5r"
ADDRESS = "fdaa:0:6ba9:0:1::3"
IMAGE = "alpine:3"
CONFIG = {
    "image": IMAGE,
    "init": {"exec": ["sleep", "600"]},
    "restart": {"policy": "no"},
    "metadata": {"team": "a"},
}
QUICK = Knobs(
    time_scale=0.001, api_rate_per_s=1e6, api_burst=1_000_000, api_get_rate_per_s=1e6, api_get_burst=1_000_000,
    start_rate_per_s=1e6, start_burst=1_000_000, exited_at="milliseconds",
)  # fmt: skip

needs_openapi = pytest.mark.skipif(not documents.there(), reason=documents.MISSING)


def exchanges():
    """(file, name) → exchange, of every file."""
    found = {}
    for file in sorted(os.listdir(FOLDER)):
        if file.endswith(".json"):
            with open(os.path.join(FOLDER, file), encoding="utf-8") as opened:
                for exchange in json.load(opened)["exchanges"]:
                    found[file.removesuffix(".json"), exchange["name"]] = exchange
    return found


EXCHANGES = exchanges()


class Story:
    """A platform with one machine, and what stands for the documents' names on it."""

    def __init__(self, platform):
        self.platform = platform
        self.names = {}

    async def send(self, method, path, body=None, headers=None, query=None):
        for name, real in self.names.items():
            path, query = path.replace(name, real), json.loads(json.dumps(query).replace(name, real))
            body = json.loads(json.dumps(body).replace(name, real))
            headers = {key: value.replace(name, real) for key, value in (headers or {}).items()}
        text = urlencode(query or {}, doseq=True)
        reply = await self.platform.fetch(
            method,
            f"{self.platform.api_url}{path}{'?' if text else ''}{text}",
            headers={"authorization": f"Bearer {self.platform.api_token}", **(headers or {})},
            body=b"" if body is None else json.dumps(body).encode(),
        )
        return reply.status, json.loads(reply.body) if reply.body else None

    async def create(self, *, up=False, **more):
        request = {"config": CONFIG, "region": "ams", "skip_launch": not up, **more}
        status, machine = await self.send("POST", f"/v1/apps/{APP}/machines", request)
        assert status == 200
        self.names |= {MACHINE: machine["id"], VERSION: machine["instance_id"]}
        while self.platform._machine(machine["id"]).launching:  # a start is refused until then
            await asyncio.sleep(0.001)
        if up:
            await self.reach("started")

    async def reach(self, state):
        machine = self.names[MACHINE]
        await self.platform.wait_for(lambda: self.platform.machine(machine).state == state)

    async def left(self):
        await self.create(up=True)
        await self.platform.stop_machine(self.names[MACHINE], "SIGKILL")
        await self.reach("stopped")

    async def leased(self, *, by_us):
        if not by_us:
            self.platform.set_faults(Faults(lease_held="1x1"))
        status, body = await self.send("POST", f"/v1/apps/{APP}/machines/{MACHINE}/lease", {"ttl": 60})
        assert status == (201 if by_us else 409)
        if by_us:
            self.names[NONCE] = body["data"]["nonce"]

    async def volume(self):
        _, volume = await self.send("POST", f"/v1/apps/{APP}/volumes", {"name": "data", "size_gb": 1})
        self.names[VOLUME] = volume["id"]


class Setting:
    """What must be so before an exchange can be: *steps* of the story, with *knobs* and *faults*."""

    def __init__(self, *steps, knobs=None, faults=None, wrong_token=False, app=APP):
        self.steps, self.knobs, self.faults = steps, knobs or {}, faults or {}
        self.wrong_token, self.app = wrong_token, app


def a_machine(story):
    return story.create()


def a_running_one(story):
    return story.create(up=True)


def one_that_left(story):
    return story.left()


def our_lease(story):
    return story.leased(by_us=True)


def somebodys_lease(story):
    return story.leased(by_us=False)


async def a_name(story):
    await story.create(name="job-1")


async def an_update(story):
    await story.left()
    body = {"config": {"image": IMAGE}}
    while (await story.send("POST", f"/v1/apps/{APP}/machines/{MACHINE}", body))[0] != 200:
        await asyncio.sleep(0)


async def no_budget(story):
    pass


async def settled(story):
    await story.left()
    await asyncio.sleep(0.01)  # longer than exit_settle_s on this scale; nothing else tells that it is over


async def a_public_address(story):
    await story.send("POST", f"/v1/apps/{APP}/ip_assignments", {"type": "shared_v4"})


async def an_address(story):
    _, address = await story.send("POST", f"/v1/apps/{APP}/ip_assignments", {"type": "private_v6"})
    story.names[ADDRESS] = address["ip"]


def a_volume(story):
    return story.volume()


SLOW = {"time_scale": 1.0, "prepare_s": (0.0, 0.0), "boot_s": (0.0, 0.0)}
MACHINE_SETTINGS = {
    "machine_get": {
        "a machine that has left": Setting(one_that_left),
        "an exit in the older place": Setting(one_that_left, knobs={"exit_event_in": "both"}),
        "an exit without its zeros": Setting(
            one_that_left, knobs={"exit_event_omits_zeros": True, "exited_at": "rfc3339"}
        ),
        "out of memory": Setting(one_that_left),
        "a lost host": Setting(one_that_left, faults={"host_unreachable": 1}),
        "one that is not there": Setting(),
    },
    "machine_start": {
        "a stopped one": Setting(settled),
        "just after its exit": Setting(one_that_left, knobs=SLOW),
        "in an update": Setting(an_update, knobs={**SLOW, "exit_settle_s": (0.0, 0.0), "boot_s": (0.3, 0.3)}),
        "under somebody's lease": Setting(a_machine, somebodys_lease),
        "too fast": Setting(a_machine, faults={"start_rate_limited": 1}),
    },
    "machine_wait": {
        "it came true": Setting(one_that_left),
        "the short answer": Setting(a_running_one),
        "it did not": Setting(one_that_left),
        "stopped, of no version": Setting(one_that_left, knobs={"wait_stopped_needs_version": True}),
    },
    "machine_create": {
        "no room": Setting(faults={"no_capacity": 1}, knobs={"no_capacity_status": 422}),
        "a name that is taken": Setting(a_name),
        "too fast": Setting(faults={"api_rate_limited": 1}),
    },
    "machine_delete": {"whatever it does": Setting(a_running_one), "a leased one": Setting(a_machine, our_lease)},
    "machine_list": {"all": Setting(one_that_left)},
    "machine_events": {"the last": Setting(one_that_left)},
    "machine_exec": {
        "a command that fails": Setting(a_running_one),
        "a command with input": Setting(a_running_one),
    },
    "machine_stop": {"with a signal": Setting(a_running_one), "as it is configured": Setting(a_running_one)},
    "machine_restart": {"with its own signal": Setting(a_running_one), "as flyctl sends it": Setting(a_running_one)},
    "machine_signal": {"by name": Setting(a_running_one), "by number": Setting(a_running_one)},
    "lease_create": {
        "bare": Setting(a_machine, knobs={"lease_envelope": False}),
        "for longer": Setting(a_machine, our_lease),
        "somebody has one": Setting(a_machine, somebodys_lease),
    },
    "lease_show": {"somebody's": Setting(a_machine, somebodys_lease)},
    "lease_release": {"ours": Setting(a_machine, our_lease)},
    "app_show": {
        "an app that is not there": Setting(app="another"),
        "a wrong token": Setting(wrong_token=True),
    },
    "app_ip_assignments": {"a private address and a public one": Setting(a_public_address)},
    "app_ip_release": {"one that is there": Setting(an_address)},
    "volume_create": {"no room": Setting(knobs={"full_regions": "fra"})},
    "flyctl": {
        "stop": Setting(a_running_one),
        "stop without a signal": Setting(a_running_one),
        "destroy": Setting(a_running_one),
        "wait": Setting(one_that_left),
        "wait for stopped": Setting(one_that_left),
    },
}


def setting_of(file, name):
    ours = MACHINE_SETTINGS.get(file, {}).get(name)
    if ours is not None:
        return ours
    if file.startswith("volume_") and file != "volume_create":
        return Setting(a_volume)
    machine = f"/{MACHINE}" in EXCHANGES[file, name]["request"]["path"]
    return Setting(a_machine) if machine else Setting()


def kind(value):
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def differences(documented, given, where="body"):
    """What the documents have and the answer has not: fields, and their types. More fields are no difference."""
    if kind(documented) != kind(given):
        return [f"{where}: {kind(documented)} is documented, {kind(given)} was given"]
    if isinstance(documented, dict):
        missing = [f"{where}.{name} is missing" for name in documented if name not in given]
        both = [name for name in documented if name in given]
        return missing + [
            each for name in both for each in differences(documented[name], given[name], f"{where}.{name}")
        ]
    if isinstance(documented, list) and documented and given:
        return differences(documented[0], given[0], f"{where}[0]")
    return []


@pytest.mark.parametrize(("file", "name"), EXCHANGES)
async def test_each_documented_request_gets_the_documented_answer(file, name):
    """Its status, its fields with their types, and the words that a client acts upon."""
    exchange, setting = EXCHANGES[file, name], setting_of(file, name)
    options = {
        "images": {IMAGE: ["true"]},
        "knobs": replace(QUICK, **setting.knobs),
        "machines": 0,
        "log": lambda *_: None,
    }
    async with Platform(api=True, app=setting.app, **options) as platform:
        story = Story(platform)
        for step in setting.steps:
            await step(story)
        platform.set_faults(Faults(**setting.faults))
        if setting.wrong_token:
            platform.api_token = "another"
        asked, documented = exchange["request"], exchange["answer"]
        headers = {key: value for key, value in asked["headers"].items() if key != "authorization"}
        status, body = await story.send(asked["method"], asked["path"], asked["body"], headers, asked["query"])
    assert status == documented["status"], body
    if status >= 400:
        said, expected = (
            (each or {}).get("error") or (each or {}).get("message") for each in (body, documented["body"])
        )
        words, heard = (set(re.findall(r"[a-z]{4,}", each)) for each in (expected, said))
        assert words - heard <= {"create"}, (said, expected)
        assert (body.get("status"), body.get("code")) == (
            documented["body"].get("status"),
            documented["body"].get("code"),
        )
    elif name == "filtered":
        assert body == []
    else:
        wanted = documented["body"]
        if file in ("machine_create", "machine_update"):  # samples of a config: what was not asked for is not echoed
            asked_config = {"guest": {}, **asked["body"]["config"]}
            if file == "machine_update":
                del wanted["events"]  # those of another machine's life
            wanted["config"] = {name: value for name, value in wanted["config"].items() if name in asked_config}
        assert differences(wanted, body) == []


def test_every_emulated_operation_has_its_documented_exchange():
    """An operation that nobody typed down is held to nothing but its shape."""
    rows = {(method, "/" + "/".join(path)): name for method, path, name in ROWS}
    typed = set()
    for exchange in EXCHANGES.values():
        path = exchange["request"]["path"].removeprefix("/v1")
        for (method, template), name in rows.items():
            parts, words = template.split("/"), path.split("/")
            same = method == exchange["request"]["method"] and len(parts) == len(words)
            if same and all(part == word or part[:1] == "{" for part, word in zip(parts, words, strict=True)):
                typed.add(name)
    assert typed >= EMULATED


# The OpenAPI file


@needs_openapi
def test_the_operations_are_the_files_operations():
    def bare(path):
        return tuple("{}" if part[:1] == "{" else part for part in path)

    ours = {(method, bare(path)): name for method, path, name in ROWS}
    theirs = {
        (method.upper(), bare(path.strip("/").split("/"))): operation["operationId"]
        for path, operations in documents.openapi()["paths"].items()
        for method, operation in operations.items()
    }
    assert ours == theirs


@needs_openapi
@pytest.mark.parametrize("key", EXCHANGES, ids=lambda key: ": ".join(key) if isinstance(key, tuple) else None)
def test_what_was_typed_down_is_what_the_file_has(key):
    exchange = EXCHANGES[key]
    answer = exchange["answer"]
    body = b"" if answer["body"] is None else json.dumps(answer["body"]).encode()
    documents.check(exchange["request"]["method"], exchange["request"]["path"], Reply(answer["status"], (), body))


@needs_openapi
def test_the_check_against_the_file_finds_what_is_wrong():
    import jsonschema

    with pytest.raises(jsonschema.ValidationError):
        documents.check("GET", "/v1/apps/a/machines", Reply(200, (), b'[{"id": 1}]'))
    with pytest.raises(AssertionError, match="418"):
        documents.check("GET", "/v1/apps/a/machines", Reply(418, (), b"{}"))
