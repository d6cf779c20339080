"""The Machines API: takes a request, checks who asks, how often and for what, and answers as it is documented.

Sources: Fly docs (machines/api), the OpenAPI file, fly-go and flyctl; where they disagree, what real clients send is
accepted, and a knob says what is answered. What is not emulated is answered 501 by its name.

The order, which is observable: authentication, path, app and machine, rate limit, the body, the lease, the deed.
"""

import asyncio
import hmac
import itertools
import json
import re
import secrets
import shlex
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from . import shown
from .bodies import BODIES
from .cloud import ORG, App, Cloud, Deployed, NameTakenError, NotThereError, TakenError, UnknownImageError, Volume
from .leases import Lease
from .machine import Machine, RefusedError, Stage
from .message import Answer, Headers, Request
from .operations import EMULATED, LEASED, Operation, find
from .rates import Rates
from .recipe import NotEmulatedError
from .shapes import SIGNALS, STOP_SIGNALS, WrongError, seconds
from .states import SETTLED, State
from .world import World

__all__ = ["Api"]

MAX_BODY = 4 << 20
MAX_NAME = 63
MAX_LEASE_S = 86_400
MAX_EXEC_S = 600
EXEC_S = 30  # the unit and the default are undocumented
MAX_OUTPUT = 1 << 20
EVENTS, MAX_EVENTS = 20, 50
OWNER = "you@example.com"
SOMEBODY = "somebody@example.com"
NONCE = "fly-machine-lease-nonce"
APP_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
REGION_NAMES = """
ams arn atl bog bom bos cdg den dfw ewr eze fra gdl gig gru hkg iad jnb lax lhr mad mia nrt ord otp phx qro scl sea sin
sjc syd waw yul yyz
"""
REGIONS = frozenset(REGION_NAMES.split())
WAITABLE = ("started", "stopped", "suspended", "destroyed", "failed", "settled")
ADDRESS_KINDS = ("private_v6", "v6", "v4", "shared_v4")
HTML = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\n"


class ApiError(Exception):
    """An answer that is an error; *status_code* is the word in its body, which the OpenAPI file knows two of."""

    def __init__(self, status: int, error: str, status_code: str | None = None) -> None:
        super().__init__(error)
        self.status = status
        self.body = {"error": error} if status_code is None else {"error": error, "status": status_code}


@dataclass(frozen=True, slots=True)
class Call:
    """A request, understood."""

    operation: Operation
    query: Mapping[str, list[str]]
    request: Request
    body: Mapping[str, Any]

    @property
    def nonce(self) -> str | None:
        """Of the lease that the caller says it holds."""
        return self.request.header(NONCE)

    def word(self, name: str) -> str | None:
        """One parameter; the last if it is repeated, None if it is absent or empty."""
        return self.query.get(name, [""])[-1] or None

    def flag(self, name: str) -> bool:
        """A parameter that is true or false; absent is false."""
        word = (self.word(name) or "false").lower()
        if word not in ("true", "false", "1", "0"):
            raise ApiError(400, f"invalid request: {name}: expected true or false")
        return word in ("true", "1")

    def number(self, name: str) -> int | None:
        """A parameter that is an integer."""
        word = self.word(name)
        if word is None:
            return None
        if not re.fullmatch(r"-?[0-9]{1,18}", word):
            raise ApiError(400, f"invalid request: {name}: expected an integer")
        return int(word)


Done = tuple[int, Any]  # status and what its body holds; None: no body
Handler = Callable[[Call], Coroutine[Any, Any, Done]]


class Api:
    """Belongs to the platform's event loop."""

    def __init__(self, world: World, cloud: Cloud, token: str, region: str, seed: int) -> None:
        self._world = world
        self._cloud = cloud
        self._token = token
        self._region = region
        self._rates = Rates()
        self._numbers = itertools.count(1)
        self._nonces = (
            (f"{seed:06x}{number:06x}" for number in itertools.count(1))
            if cloud.virtual
            else iter(lambda: secrets.token_hex(6), "")
        )
        self._doors: dict[str, Handler] = {
            name: getattr(self, f"_{re.sub(r'(?<=[a-z])(?=[A-Z])', '_', name).lower()}") for name in EMULATED
        }

    async def handle(self, request: Request) -> Answer:
        """Answer *request*; ConnectionError if a fault breaks the connection before the answer."""
        world, number = self._world, next(self._numbers)
        path, _, query = request.target.partition("?")
        found = find(request.method, path)
        name = found.name if isinstance(found, Operation) else "unknown"
        began = world.now()
        struck: list[str] = []
        status = 0
        try:
            answer = await self._answer(request, found, query, struck)
            status = answer.status
        finally:
            world.emit(
                "api.answered", operation=name, request=number, method=request.method, path=path, status=status,
                elapsed_s=round(world.now() - began, 6),
            )  # fmt: skip
        trace = f"{number:032x}"
        answer.headers = (
            *answer.headers,
            ("fly-request-id", f"01EMULATORAPI{number:013d}-{self._region}"),
            ("fly-trace-id", trace),
            ("fly-span-id", trace[-16:]),
            ("server", "Fly (emulator)"),
            ("via", "1.1 fly.io (emulator)"),
        )
        return answer

    async def _answer(
        self, request: Request, found: "Operation | tuple[str, ...]", query: str, struck: list[str]
    ) -> Answer:
        world = self._world
        if world.strikes("api_drop"):
            raise ConnectionResetError("fault: api_drop")
        if world.strikes("api_bad_gateway"):
            return _answer(502, HTML, (("content-type", "text/html"),))
        try:
            if world.strikes("api_error"):
                raise ApiError(500, "internal: something went wrong")
            status, body = await self._done(request, found, query)
        except ApiError as error:
            if error.status == 405 and not isinstance(found, Operation):
                return _json(405, error.body, (("allow", ", ".join(found)),))
            return _json(error.status, error.body)
        except (WrongError, NotThereError, TakenError, UnknownImageError, RefusedError, NotEmulatedError) as error:
            status, body = self._refusal(error)
            return _json(status, body)
        if world.strikes("api_slow_answer"):
            await asyncio.sleep(world.scaled(world.knobs.api_slow_s))
        if world.strikes("api_reset_before_answer"):
            raise ConnectionResetError("fault: api_reset_before_answer")
        if world.strikes("api_error_after"):
            return _json(500, {"error": "internal: something went wrong"})
        answer = _json(status, body)
        if world.strikes("api_reset_mid_answer"):
            answer.body = _broken(answer.body)
        return answer

    def _refusal(self, error: Exception) -> Done:
        """The platform's words for what somebody below refused."""
        if isinstance(error, WrongError):
            return 400, {"error": f"invalid_argument: {error}"}
        if isinstance(error, NotThereError):
            return 404, {"error": str(error)}
        if isinstance(error, NameTakenError):
            return 409, {
                "error": str(error),
                "status": "name_taken",
            }  # fly-go knows the word, the OpenAPI file does not
        if isinstance(error, TakenError):
            return 409, {"error": str(error)}
        if isinstance(error, UnknownImageError):
            name = shown.image_ref(str(error))
            place = f"{name['registry']}/{name['repository']}:{name['tag']}"
            return self._world.knobs.unknown_image_status, {"error": f"failed to get manifest {place}: not found"}
        if isinstance(error, RefusedError):
            reason = error.reason
            if error.status == 412 and not reason.startswith("failed_precondition"):
                reason = f"failed_precondition: {reason}"
            return error.status, {"error": reason}
        return 501, {"error": f"not emulated: {error}"}

    async def _done(self, request: Request, found: "Operation | tuple[str, ...]", query: str) -> Done:
        """Check, then do; raise ApiError or what `_refusal` knows."""
        self._check_token(request.header("authorization") or "")
        if not isinstance(found, Operation):
            if found:
                raise ApiError(405, "method not allowed")
            raise ApiError(404, "not found")
        if found.name not in EMULATED:
            raise NotEmulatedError(found.name)
        machine = self._check_path(found)
        self._check_rate(found)
        parameters: dict[str, list[str]] = {}
        for key, value in parse_qsl(query, keep_blank_values=True):
            parameters.setdefault(key, []).append(value)
        call = Call(found, parameters, request, await self._body(found, request))
        if found.name in LEASED and machine is not None:
            self._check_lease(machine, call)
        return await self._doors[found.name](call)

    # Checks

    def _check_token(self, header: str) -> None:
        """`Bearer TOKEN` or, as fly-go sends macaroons, `FlyV1 TOKEN[,TOKEN…]`."""
        scheme, _, value = header.partition(" ")
        tokens = value.strip().split(",") if scheme.lower() in ("bearer", "flyv1") else []
        if not any(hmac.compare_digest(token.encode(), self._token.encode()) for token in tokens):
            raise ApiError(401, "Authenticate: token validation error")

    def _check_path(self, operation: Operation) -> Machine | None:
        """That what the path names is there."""
        if "app" in operation.path:
            app = self._app(operation)
            if "machine" in operation.path:
                return self._deployed(operation).machine
            if "volume" in operation.path and operation.path["volume"] not in app.volumes:
                raise ApiError(404, "volume not found")
        return None

    def _check_rate(self, operation: Operation) -> None:
        """Each action has a budget on each machine, or else on each app (Fly docs: working-with-machines-api)."""
        world, knobs, path = self._world, self._world.knobs, operation.path
        if operation.name == "Machines_start":
            granted = True  # Machine.start counts these, with the proxy's
        else:
            per_s, burst = knobs.api_rate_per_s, float(knobs.api_burst)
            who = path.get("machine") or path.get("app") or ORG
            if operation.name == "Machines_show":
                per_s, burst = knobs.api_get_rate_per_s, float(knobs.api_get_burst)
            elif operation.name == "Apps_delete":
                per_s, burst, who = knobs.api_app_deletes_per_min / 60, float(knobs.api_app_deletes_per_min), ORG
            granted = self._rates.take(operation.name, who, world.now(), per_s=per_s / knobs.time_scale, burst=burst)
        if not granted or world.strikes("api_rate_limited", path.get("machine")):
            raise ApiError(429, "rate limit exceeded")

    async def _body(self, operation: Operation, request: Request) -> Mapping[str, Any]:
        shape, required = BODIES.get(operation.name, (None, False))
        content = b""
        async for chunk in request.body.stream():
            content += chunk
            if len(content) > MAX_BODY:
                raise ApiError(400, f"invalid request: the body is larger than {MAX_BODY} bytes")
        if shape is None:
            return {}
        if not content.strip():
            if required:
                raise ApiError(400, "invalid request: EOF")
            return {}
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            raise ApiError(400, "invalid request: the body is not JSON") from None
        notes: list[str] = []
        if value is None and not required:
            return {}
        cleaned: Mapping[str, Any] = shape(value, "", notes)
        if notes:
            self._note_ignored(notes)
        return cleaned

    def _note_ignored(self, fields: list[str] | tuple[str, ...]) -> None:
        """Fields that the platform does not know, or that mean nothing here: said once, in the log."""
        if fields:
            self._world.emit("api.ignored", fields=" ".join(fields[:20]))

    def _check_lease(self, machine: Machine, call: Call) -> None:
        world = self._world
        if world.strikes("lease_held", machine.id):
            self._lease(machine, world.knobs.lease_held_s, SOMEBODY, "fault: lease_held")
        if call.operation.name != "Machines_start":  # it comes after the budget there
            machine.check_lease(call.nonce)

    def _check_capacity(self, region: str, *, create: bool, machine: str | None = None) -> None:
        """Kilo-Org/cloud#412 has seen 412 for a machine that is new, 409 for one that is there."""
        full = region in [name.strip() for name in self._world.knobs.full_regions.split(",")]
        if not full and not self._world.strikes("no_capacity", machine):
            return
        reason = "could not reserve resource for machine: insufficient memory available to fulfill request"
        if create:
            status = self._world.knobs.no_capacity_status
            raise ApiError(status, f"insufficient resources: {reason}", "insufficient_capacity")
        raise ApiError(409, f"aborted: {reason}", "insufficient_capacity")

    def _app(self, operation: Operation) -> App:
        try:
            return self._cloud.apps[operation.path["app"]]
        except KeyError:
            raise ApiError(404, "app not found") from None

    def _deployed(self, operation: Operation) -> Deployed:
        world = self._world
        deployed = self._cloud.machines.get(operation.path["machine"])
        if deployed is None or deployed.app is not self._cloud.apps.get(operation.path["app"]):
            raise ApiError(404, "machine not found")
        gone = deployed.destroyed_at
        if gone is not None and world.now() - gone > world.scaled(world.knobs.destroyed_shown_s):
            raise ApiError(404, "machine not found")
        return deployed

    def _volume(self, operation: Operation) -> Volume:
        return self._app(operation).volumes[operation.path["volume"]]

    # Apps and addresses

    async def _apps_list(self, call: Call) -> Done:
        org = call.word("org_slug")
        if org is None:
            raise ApiError(400, "invalid request: org_slug is required")
        apps = [shown.app(app) for app in self._cloud.apps.values() if app.org == org]
        return 200, {"apps": apps, "total_apps": len(apps)}

    async def _apps_create(self, call: Call) -> Done:
        name = call.body.get("name") or call.body.get("app_name") or ""
        if not APP_NAME.fullmatch(name):
            raise ApiError(400, "Validation failed: Name under 63 chars using numbers, lowercase letters and dashes")
        try:
            app = await self._cloud.open_app(
                name, org=call.body.get("org_slug") or ORG, network=call.body.get("network") or "default"
            )
        except TakenError as error:
            raise ApiError(422, f"Validation failed: {error}") from None
        self._world.emit("app.created", app=name, url=app.url)
        return 201, {"id": shown.app(app)["id"], "created_at": int(1000 * (self._world.epoch + app.created_at))}

    async def _apps_show(self, call: Call) -> Done:
        return 200, shown.app(self._app(call.operation))

    async def _apps_delete(self, call: Call) -> Done:
        app = self._app(call.operation)
        alive = [machine.id for machine in app.machines.values() if machine.state is not State.DESTROYED]
        if alive and not call.flag("force"):
            raise ApiError(412, f"failed_precondition: the app still has {len(alive)} machines; force deletes them")
        await self._cloud.close_app(app)
        self._world.emit("app.deleted", app=app.name)
        return 202, None

    async def _app_ipassignments_list(self, call: Call) -> Done:
        return 200, {"ips": [shown.ip(self._world, address) for address in self._app(call.operation).addresses]}

    async def _app_ipassignments_create(self, call: Call) -> Done:
        app, kind = self._app(call.operation), call.body.get("type")
        if kind not in ADDRESS_KINDS:
            raise ApiError(400, f"invalid request: type: expected one of {', '.join(ADDRESS_KINDS)}")
        self._cloud.allocate(app, kind)
        return 200, shown.ip(self._world, app.addresses[-1])

    async def _app_ipassignments_delete(self, call: Call) -> Done:
        app, wanted = self._app(call.operation), call.operation.path["ip"]
        kept = [address for address in app.addresses if address[0] != wanted]
        if len(kept) == len(app.addresses):
            raise ApiError(404, "IP address not found")
        app.addresses[:] = kept
        return 204, None

    # Machines: what there is

    async def _machines_list(self, call: Call) -> Done:
        app, world = self._app(call.operation), self._world
        region, deleted, summary = call.word("region"), call.flag("include_deleted"), call.flag("summary")
        states = [state for word in call.query.get("state", []) for state in word.split(",") if state]
        tags = {
            name.removeprefix("metadata."): values[-1]
            for name, values in call.query.items()
            if name.startswith("metadata.")
        }
        found = []
        for machine_id in app.machines:
            deployed = self._cloud.machines[machine_id]
            state, metadata = deployed.machine.state, deployed.config.get("metadata", {})
            if (
                (deleted or state is not State.DESTROYED)
                and region in (None, deployed.machine.region)
                and (not states or state in states)
                and all(metadata.get(name) == value for name, value in tags.items())
            ):
                found.append(shown.machine(world, deployed, summary=summary))
        return 200, found

    async def _machines_show(self, call: Call) -> Done:
        return 200, shown.machine(self._world, self._deployed(call.operation))

    async def _machines_list_events(self, call: Call) -> Done:
        limit = call.number("limit")
        limit = EVENTS if limit is None else limit
        if limit < 1:
            raise ApiError(400, "invalid request: limit: expected at least 1")
        told = list(self._deployed(call.operation).history)[: min(limit, MAX_EVENTS)]
        return 200, [each.as_json() for each in told]

    async def _machines_list_versions(self, call: Call) -> Done:
        return 200, [
            {"version": version, "user_config": shown.config(self._world, config)}
            for version, config in self._deployed(call.operation).versions
        ]

    # Machines: come and go

    async def _machines_create(self, call: Call) -> Done:
        app, body = self._app(call.operation), call.body
        config = self._config(body)
        region = body.get("region") or self._region
        if region not in REGIONS and region != self._region:
            raise ApiError(400, f"invalid_argument: region {region[:MAX_NAME]} not found")
        name = body.get("name") or None
        if name is not None and len(name) > MAX_NAME:
            raise ApiError(400, f"invalid_argument: name: expected at most {MAX_NAME} characters")
        ttl = self._ttl(body.get("lease_ttl"))
        self._cloud.understand(config)
        self._check_capacity(region, create=True)

        def create() -> Deployed:
            launch = not body.get("skip_launch", False)
            deployed = self._cloud.create(app, config, region=region, name=name, launch=launch)
            self._note_ignored(deployed.recipe.ignored)
            return deployed

        if self._world.strikes("api_create_late"):
            self._world.later(self._world.scaled(self._world.knobs.api_create_late_s), _whatever, create)
            raise ConnectionResetError("fault: api_create_late")
        deployed = create()
        answer = shown.machine(self._world, deployed)
        if ttl is not None:
            answer["nonce"] = self._lease(deployed.machine, ttl, OWNER, "").nonce
        return 200, answer

    async def _machines_update(self, call: Call) -> Done:
        deployed, body = self._deployed(call.operation), call.body
        machine = deployed.machine
        config = self._config(body)
        if machine.state in (State.DESTROYED, State.DESTROYING):
            raise ApiError(404, "machine not found")
        if body.get("region") not in (None, machine.region):
            raise ApiError(400, "invalid_argument: a machine cannot change its region")
        if body.get("name") not in (None, deployed.name):
            raise NotEmulatedError("Machines_update with another name")
        if body.get("current_version") not in (None, machine.version):
            raise ApiError(412, "failed_precondition: current_version does not match the machine's version")
        ttl = self._ttl(body.get("lease_ttl"))
        self._check_capacity(machine.region, create=False, machine=machine.id)
        self._cloud.update(deployed, config, launch=not body.get("skip_launch", False))
        self._note_ignored(deployed.recipe.ignored)
        answer = shown.machine(self._world, deployed)
        if ttl is not None:
            answer["nonce"] = self._lease(machine, ttl, OWNER, "").nonce
        return 200, answer

    def _config(self, body: Mapping[str, Any]) -> dict[str, Any]:
        config = body.get("config") or {}
        if not config.get("image"):
            raise ApiError(400, "invalid_argument: config.image: an image is required")
        if body.get("lsvd"):
            raise NotEmulatedError("lsvd")
        return dict(config)

    def _ttl(self, ttl: int | None) -> int | None:
        if ttl in (None, 0):  # Go clients send zero for what was not set
            return None
        if not 0 < ttl <= MAX_LEASE_S:
            raise ApiError(400, f"invalid_argument: lease ttl: expected 1 to {MAX_LEASE_S} seconds")
        return ttl

    async def _machines_delete(self, call: Call) -> Done:
        # The docs and the OpenAPI file say force, flyctl sends kill.
        machine, force = self._deployed(call.operation).machine, call.flag("force") or call.flag("kill")
        if machine.state is State.DESTROYED:
            raise ApiError(404, "machine not found")
        if machine.state not in (State.CREATED, State.STOPPED, State.DESTROYING) and not force:
            raise ApiError(412, f"failed_precondition: unable to destroy machine from current state: '{machine.state}'")
        machine.destroy()
        return 200, {"ok": True}

    # Machines: start and stop

    async def _machines_start(self, call: Call) -> Done:
        machine, knobs = self._deployed(call.operation).machine, self._world.knobs
        before = machine.state
        if before in (State.STARTING, State.STARTED):
            if not machine.take_start():
                raise ApiError(429, "rate limit exceeded")
            if knobs.start_when_started == "refused":
                raise RefusedError("PM08", 412, f"unable to start machine from current state: '{before}'")
        elif machine.state is State.STOPPED:
            self._check_capacity(machine.region, create=False, machine=machine.id)
        machine.start("api", nonce=call.nonce)
        return 200, {"previous_state": str(before), "migrated": False, "new_host": ""}

    async def _machines_stop(self, call: Call) -> Done:
        machine = self._deployed(call.operation).machine
        # flyctl sends "0s" for what was not set.
        timeout_s = _within(call.body.get("timeout", 0.0)) or None
        machine.stop(STOP_SIGNALS.get(call.body.get("signal", "")), timeout_s)
        return 200, {"ok": True}

    async def _machines_restart(self, call: Call) -> Done:
        name, text = call.word("signal"), call.word("timeout") or "0"
        if name is not None and name not in STOP_SIGNALS:
            raise ApiError(400, f"invalid request: signal: expected one of {', '.join(STOP_SIGNALS)}")
        timeout_s = _within(seconds(text, "timeout", [])) or None
        if call.flag("force_stop"):
            name = "SIGKILL"
        self._deployed(call.operation).machine.restart(STOP_SIGNALS.get(name or ""), timeout_s)
        return 200, {"ok": True}

    async def _machines_signal(self, call: Call) -> Done:
        machine, name = self._deployed(call.operation).machine, call.body.get("signal")
        if name is None:
            raise ApiError(400, f"invalid request: signal: expected one of {', '.join(SIGNALS)}")
        if machine.guest is None:
            raise RefusedError("PM08", 412, f"unable to signal machine from current state: '{machine.state}'")
        machine.guest.signal(SIGNALS[name])
        return 200, {"ok": True}

    async def _machines_cordon(self, call: Call) -> Done:
        self._deployed(call.operation).machine.cordoned = True
        return 200, {"ok": True}

    async def _machines_uncordon(self, call: Call) -> Done:
        self._deployed(call.operation).machine.cordoned = False
        return 200, {"ok": True}

    async def _machines_wait(self, call: Call) -> Done:
        """Answer as soon as the machine is, or was since the call began, in one of the states."""
        world, deployed = self._world, self._deployed(call.operation)
        machine, knobs = deployed.machine, world.knobs
        wanted = [state for word in call.query.get("state", []) for state in word.split(",") if state] or ["started"]
        if unknown := [state for state in wanted if state not in WAITABLE]:
            raise ApiError(400, f"invalid request: state: expected {', '.join(WAITABLE)}, not {unknown[0][:MAX_NAME]}")
        timeout_s = call.number("timeout")
        timeout_s = knobs.wait_max_s if timeout_s is None else timeout_s
        if not 1 <= timeout_s <= knobs.wait_max_s:
            raise ApiError(400, f"invalid request: timeout: expected 1 to {knobs.wait_max_s} seconds")
        version = call.word("version") or call.word("instance_id")
        if version is None and wanted == ["stopped"] and knobs.wait_stopped_needs_version:
            raise ApiError(400, "instance_id required when waiting for stopped machine")
        if version is not None and version not in [each for each, _ in deployed.versions]:
            raise ApiError(400, f"invalid request: no such version of machine {machine.id}")
        since = machine.steps
        if (event_id := call.word("from_event_id")) is not None:
            told = deployed.history.find(event_id)
            if told is None:
                raise ApiError(400, f"invalid request: no such event of machine {machine.id}")
            since = told.step + 1
        try:
            async with asyncio.timeout(timeout_s):
                while (stage := self._reached(machine, wanted, version, since)) is None:
                    if version not in (None, machine.version):
                        raise ApiError(400, f"invalid request: version {version} of the machine was replaced")
                    await world.changed.wait()
        except TimeoutError:
            raise ApiError(
                408, f"machine failed to reach desired state, {', '.join(wanted)}, currently {machine.state}"
            ) from None
        newest = next(iter(deployed.history), None)
        return 200, {
            "ok": True,
            "state": str(stage.state),
            "version": stage.version,
            "event_id": "" if newest is None else newest.id,
        }

    def _reached(self, machine: Machine, wanted: list[str], version: str | None, since: int) -> Stage | None:
        """The first stage since step *since* that was waited for; a transient state is none that settles."""
        for stage in machine.stages:
            if stage.number < since:
                continue
            passing = stage.state is State.CREATED and (machine.due or machine.state is not State.CREATED)
            settled = stage.state in SETTLED and not passing
            if version in (None, stage.version) and (stage.state in wanted or (settled and "settled" in wanted)):
                return stage
        return None

    async def _machines_exec(self, call: Call) -> Done:
        machine, body = self._deployed(call.operation).machine, call.body
        if body.get("container"):
            raise NotEmulatedError("Machines_exec in a container")
        try:
            command = body.get("command") or shlex.split(body.get("cmd", ""))
        except ValueError:
            raise ApiError(400, "invalid request: cmd: its quotes do not match") from None
        if not command:
            raise ApiError(400, "invalid request: command: expected at least one word")
        timeout_s = body.get("timeout") or EXEC_S
        if not 0 < timeout_s <= MAX_EXEC_S:
            raise ApiError(400, f"invalid request: timeout: expected 1 to {MAX_EXEC_S} seconds")
        if machine.guest is None:
            raise RefusedError("PM08", 412, f"machine not running, current state: '{machine.state}'")
        try:
            outcome = await machine.guest.execute(command, body.get("stdin", "").encode(), timeout_s)
        except TimeoutError:
            raise ApiError(408, f"deadline_exceeded: the command did not end in {timeout_s} seconds") from None
        except NotImplementedError as error:
            raise NotEmulatedError(str(error)) from None
        except OSError as error:
            raise ApiError(400, f"invalid request: cannot run the command: {error.strerror}") from None
        return 200, {
            "exit_code": outcome.exit_code,
            "exit_signal": outcome.signal,
            "stdout": outcome.out[:MAX_OUTPUT].decode(errors="replace"),
            "stderr": outcome.err[:MAX_OUTPUT].decode(errors="replace"),
        }

    # Leases

    def _lease(self, machine: Machine, ttl_s: float, owner: str, description: str, nonce: str | None = None) -> Lease:
        now = self._world.now()
        until = now + ttl_s
        machine.lease = Lease(
            nonce or next(self._nonces), owner, until, int(self._world.epoch + until), machine.version, description
        )
        return machine.lease

    def _enveloped(self, lease: Lease, *, nonce: bool = True) -> dict[str, Any]:
        data: dict[str, Any] = {
            "owner": lease.owner,
            "expires_at": lease.expires_at,
            "version": lease.version,
            "description": lease.description,
        }
        data["nonce"] = lease.nonce if nonce else ""
        return {"status": "success", "data": data} if self._world.knobs.lease_envelope else data

    async def _machines_show_lease(self, call: Call) -> Done:
        lease = self._deployed(call.operation).machine.lease
        if lease is None or not lease.blocks(None, self._world.now()):
            raise ApiError(404, "lease not found")
        return 200, self._enveloped(lease, nonce=call.nonce == lease.nonce)

    async def _machines_create_lease(self, call: Call) -> Done:
        """Take it, or with the nonce refresh it."""
        machine, world = self._deployed(call.operation).machine, self._world
        # The OpenAPI file has the ttl in the body, fly-go sends it as a parameter.
        ttl = self._ttl(call.body.get("ttl") or call.number("ttl")) or world.knobs.lease_ttl_s
        if world.strikes("lease_held", machine.id):
            self._lease(machine, world.knobs.lease_held_s, SOMEBODY, "fault: lease_held")
        try:
            machine.check_lease(call.nonce)
        except RefusedError as refused:
            if not world.knobs.lease_envelope:
                raise
            return 409, {"status": "error", "message": refused.reason, "code": "lease_held"}
        held = machine.lease is not None and machine.lease.blocks(None, world.now())
        nonce = machine.lease.nonce if held and machine.lease is not None else None
        lease = self._lease(machine, ttl, OWNER, call.body.get("description", ""), nonce)
        return 201, self._enveloped(lease)

    async def _machines_release_lease(self, call: Call) -> Done:
        machine, now = self._deployed(call.operation).machine, self._world.now()
        if call.nonce is None:
            raise ApiError(400, f"invalid request: the header {NONCE} is required")
        if machine.lease is None or not machine.lease.blocks(None, now):
            raise ApiError(404, "lease not found")
        if machine.lease.nonce != call.nonce:
            raise ApiError(400, "invalid request: the nonce is not that of the machine's lease")
        machine.lease = None
        return 200, {"ok": True}

    # Metadata: no version of the machine is made for it

    def _metadata(self, call: Call) -> dict[str, str]:
        config = self._deployed(call.operation).config
        found: dict[str, str] = config.setdefault("metadata", {})
        return found

    async def _machines_show_metadata(self, call: Call) -> Done:
        return 200, dict(self._metadata(call))

    async def _machines_update_metadata(self, call: Call) -> Done:
        """PUT and PATCH read the same in the OpenAPI file: null and the empty string remove a key."""
        version = call.body.get("machine_version")
        if version not in (None, "", self._deployed(call.operation).machine.version):
            raise ApiError(412, "failed_precondition: machine_version does not match the machine's version")
        metadata = self._metadata(call)
        for name, value in call.body.get("metadata", {}).items():
            metadata[name] = value
            if not value:
                del metadata[name]
        return 204, None

    async def _machines_get_metadata_key(self, call: Call) -> Done:
        metadata, key = self._metadata(call), call.operation.path["key"]
        if key not in metadata:
            raise ApiError(404, "metadata key not found")
        return 200, {"value": metadata[key]}

    async def _machines_upsert_metadata(self, call: Call) -> Done:
        key, value = call.operation.path["key"], call.body.get("value")
        if value is None:
            raise ApiError(400, "invalid request: value: expected a string")
        self._metadata(call)[key] = value
        return 204, None

    async def _machines_delete_metadata(self, call: Call) -> Done:
        self._metadata(call).pop(call.operation.path["key"], None)
        return 204, None

    # Volumes

    async def _volumes_list(self, call: Call) -> Done:
        call.flag("summary")
        return 200, [shown.volume(self._world, volume) for volume in self._app(call.operation).volumes.values()]

    async def _volumes_create(self, call: Call) -> Done:
        body, region = call.body, call.body.get("region") or self._region
        if region not in REGIONS and region != self._region:
            raise ApiError(400, f"invalid_argument: region {region[:MAX_NAME]} not found")
        for name in ("snapshot_id", "source_volume_id"):
            if body.get(name):
                raise NotEmulatedError(f"Volumes_create with {name}")
        name, size_gb = body.get("name", ""), body.get("size_gb", 3)
        if not re.fullmatch(r"[a-z0-9_]{1,30}", name):
            raise ApiError(400, "invalid_argument: name: expected 1 to 30 lowercase letters, digits and underscores")
        if not 1 <= size_gb <= 500:
            raise ApiError(400, "invalid_argument: size_gb: expected 1 to 500")
        if region in [each.strip() for each in self._world.knobs.full_regions.split(",")]:
            raise ApiError(400, "no capacity")  # as Kilo-Org/cloud#787 has seen it
        volume = self._cloud.create_volume(self._app(call.operation), name, region, size_gb)
        volume.encrypted = body.get("encrypted", True)
        self._settings(volume, body)
        return 200, shown.volume(self._world, volume)

    def _settings(self, volume: Volume, body: Mapping[str, Any]) -> None:
        retention = body.get("snapshot_retention", volume.snapshot_retention)
        if not 1 <= retention <= 60:
            raise ApiError(400, "invalid_argument: snapshot_retention: expected 1 to 60 days")
        volume.snapshot_retention = retention
        volume.auto_backup = body.get("auto_backup_enabled", volume.auto_backup)

    async def _volumes_get_by_id(self, call: Call) -> Done:
        return 200, shown.volume(self._world, self._volume(call.operation))

    async def _volumes_update(self, call: Call) -> Done:
        volume = self._volume(call.operation)
        self._settings(volume, call.body)
        return 200, shown.volume(self._world, volume)

    async def _volume_delete(self, call: Call) -> Done:
        volume = self._volume(call.operation)
        if volume.machine is not None:
            raise ApiError(412, f"failed_precondition: volume is attached to machine {volume.machine}")
        self._cloud.delete_volume(self._app(call.operation), volume)
        return 200, {**shown.volume(self._world, volume), "state": "destroyed"}

    async def _volumes_extend(self, call: Call) -> Done:
        volume, size_gb = self._volume(call.operation), call.body.get("size_gb", 0)
        if not volume.size_gb < size_gb <= 500:
            raise ApiError(400, f"invalid_argument: size_gb: expected more than {volume.size_gb}, and at most 500")
        volume.size_gb = size_gb
        return 200, {"volume": shown.volume(self._world, volume), "needs_restart": volume.machine is not None}


def _within(timeout_s: float) -> float:
    """A stop timeout the platform takes: up to five minutes (Fly docs: reference/configuration)."""
    if not 0 <= timeout_s <= 300:
        raise ApiError(400, "invalid request: timeout: expected 0 to 300 seconds")
    return timeout_s


def _whatever(create: Callable[[], object]) -> None:
    """Do it now; nobody waits for what comes of it."""
    try:
        create()
    except (WrongError, NotThereError, TakenError, UnknownImageError, RefusedError):
        pass


def _json(status: int, body: Any, headers: Headers = ()) -> Answer:
    content = b"" if body is None else json.dumps(body).encode() + b"\n"
    kind = () if body is None else (("content-type", "application/json; charset=utf-8"),)
    return _answer(status, content, (*kind, *headers))


def _answer(status: int, content: bytes, headers: Headers) -> Answer:
    length = () if status == 204 else (("content-length", str(len(content))),)
    return Answer(status, (*headers, *length), _chunks(content))


async def _chunks(content: bytes) -> AsyncGenerator[bytes, None]:
    if content:
        yield content


async def _broken(body: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Half of it, then a reset."""
    async for chunk in body:
        yield chunk[: len(chunk) // 2]
    raise ConnectionResetError("fault: api_reset_mid_answer")
