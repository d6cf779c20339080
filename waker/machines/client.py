"""Machines and AsyncMachines: the Machines API as typed calls, thin shells on httpx.

requests.py says what to send, what an answer means and when to ask again; here it is sent, within one deadline, no
faster than the platform allows.
"""

import asyncio
import functools
import logging
import os
import random
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import httpx

from ..client import _run
from ..errors import UsageError
from . import requests
from .config import ApiConfig
from .errors import (
    MachinesError,
    NoAnswer,
    NoCapacity,
    NotFound,
    OutcomeUnknown,
    PlatformError,
    RateLimited,
    RequestError,
    Unreachable,
)
from .records import Address, App, Event, ExecResult, Lease, Machine, Waited
from .requests import Answer, Bucket, Call, Limit

__all__ = ["AsyncMachines", "Machines", "Pacer"]

TIMEOUT_S = 30.0
# A create makes the image ready first, and queues behind others of its app at one a second.
CREATE_TIMEOUT_S = 300.0
# One attempt: how long an answer may take, besides what a wait takes on purpose.
ATTEMPT_S = 30.0
CREATE_ATTEMPT_S = 60.0
CONNECT_S = 5.0
MIN_ATTEMPT_S = 0.2
MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_CREATES = 3
# When to look for a machine whose create was not answered: it may appear a little later.
LOOKS_S = (0.0, 1.0, 3.0)
# Many may look at once, and lists are one a second.
LOOK_TIMEOUT_S = 120.0

log = logging.getLogger("waker.machines")
T = TypeVar("T")


class Pacer:
    """The rate limits of all actions on all identifiers, for all who share it. *speed*: 10 is ten times as fast."""

    _MAX_BUCKETS = 10_000

    def __init__(self, speed: float = 1.0) -> None:
        self._speed = speed
        self._buckets: dict[tuple[str, ...], Bucket] = {}  # guarded by the lock
        self._lock = threading.Lock()

    def reserve(self, where: str, call: Call, now: float) -> float:
        """Take a turn for *call*; how long to wait for it."""
        with self._lock:
            return self._bucket(where, call, now).reserve(now)

    def give_back(self, where: str, call: Call, now: float) -> None:
        """The turn is not used."""
        with self._lock:
            self._bucket(where, call, now).give_back()

    def refused(self, where: str, call: Call, now: float) -> None:
        """The platform said that it was too fast."""
        with self._lock:
            self._bucket(where, call, now).refused(now)

    def _bucket(self, where: str, call: Call, now: float) -> Bucket:
        key = (where, call.operation.method, call.operation.path, call.app, call.machine)
        if key not in self._buckets:
            if len(self._buckets) >= self._MAX_BUCKETS:
                self._buckets = {key: bucket for key, bucket in self._buckets.items() if not bucket.idle(now)}
            limit = call.operation.limit
            self._buckets[key] = Bucket(Limit(limit.per_s * self._speed, limit.burst))
        return self._buckets[key]

    def forget(self) -> None:
        """Start anew, in a child after a fork: another thread may have held the lock, and its turns are its own."""
        self._lock = threading.Lock()
        self._buckets = {}


# One for the process: several clients and threads are one caller to the platform.
_PACER = Pacer()
os.register_at_fork(after_in_child=_PACER.forget)


class AsyncMachines:
    """An app's machines, from async code: `async with AsyncMachines("my-worker") as machines: await machines.list()`.

    *app*, *token* and *base_url* default to what the platform's own tools read: FLY_APP_NAME, FLY_API_TOKEN or
    FLY_ACCESS_TOKEN, FLY_FLAPS_BASE_URL; inside a machine the internal address. *transport* sends the requests instead
    of our own, *pacer* keeps to other limits than the platform's.

    Each call takes *timeout_s* at most, the wait for its turn included (a create and an update five minutes, unless
    they are told). What was surely not done is asked again until then, what may have been done only where twice is the
    same as once. All raise MachinesError and UsageError.
    """

    def __init__(
        self,
        app: str | None = None,
        *,
        token: str | None = None,
        base_url: str | None = None,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
        pacer: Pacer | None = None,
        config: ApiConfig | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config or ApiConfig.from_environ(app=app, token=token, base_url=base_url)
        self._timeout_s = _positive("timeout_s", timeout_s)
        self._transport = transport
        self._pacer = _PACER if pacer is None else pacer
        self._tls = tls
        self._client: httpx.AsyncClient | None = None

    @property
    def app(self) -> str:
        """Whose machines they are."""
        return self._config.app

    @property
    def base_url(self) -> str:
        """Where the API is."""
        return self._config.base_url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.app!r}, base_url={self.base_url!r})"

    async def __aenter__(self) -> "AsyncMachines":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections; the next call opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    # Apps

    async def get_app(self, *, timeout_s: float | None = None) -> App:
        """The app itself."""
        return await self._get(App.read, Call("app", self.app), timeout_s)

    async def addresses(self, *, timeout_s: float | None = None) -> list[Address]:
        """The app's addresses; wakes need a private one."""
        return await self._get(_addresses, Call("addresses", self.app), timeout_s)

    # Machines

    async def create(
        self,
        config: Mapping[str, Any],
        *,
        name: str | None = None,
        region: str | None = None,
        skip_launch: bool = False,
        lease_ttl_s: int | None = None,
        timeout_s: float | None = None,
    ) -> Machine:
        """Make a machine, which starts unless *skip_launch*. Never repeated once it may have been done: create_once."""
        call = requests.create(
            self.app, config, name=name, region=region, skip_launch=skip_launch, lease_ttl_s=lease_ttl_s
        )
        return await self._get(Machine.read, call, CREATE_TIMEOUT_S if timeout_s is None else timeout_s)

    async def create_once(
        self,
        config: Mapping[str, Any],
        *,
        name: str,
        region: str | None = None,
        skip_launch: bool = False,
        timeout_s: float = CREATE_TIMEOUT_S,
    ) -> Machine:
        """Make the machine called *name*, which nobody else uses, at most once.

        A create that was not answered is looked up by the name, and repeated only if the machine is not there: a name
        is unique within an app, so the first one that comes through late makes the second one fail, never two.
        Raises OutcomeUnknown if that cannot be told; after any other error there is no such machine.
        """
        deadline = _now() + timeout_s
        lost: MachinesError | None = None
        for _ in range(MAX_CREATES):
            refused: MachinesError | None = None
            try:
                return await self.create(
                    config, name=name, region=region, skip_launch=skip_launch, timeout_s=max(0.1, deadline - _now())
                )
            except (NoCapacity, Unreachable) as error:
                refused = error
            except PlatformError as error:
                log.warning("machines.create_lost name=%s error=%s", name, error)
                lost = error
            except MachinesError as error:
                refused = error
            if lost is None:
                assert refused is not None  # noqa: S101 - one of the two is why we are here
                raise refused
            found = await self._look_for(name, lost)
            if found is not None:
                return found
            if refused is not None:
                if _is_taken(refused):
                    break
                raise refused
            if _now() >= deadline:
                break
        raise OutcomeUnknown(
            f"machine {name} of app {self.app} may have been made, and is not to be seen; if it appears, delete it: "
            f"{lost}"
        ) from lost

    async def _look_for(self, name: str, lost: MachinesError) -> Machine | None:
        for pause_s in LOOKS_S:
            await asyncio.sleep(pause_s)
            try:
                found = [each for each in await self.list(timeout_s=LOOK_TIMEOUT_S) if each.name == name]
            except MachinesError as error:
                raise OutcomeUnknown(
                    f"machine {name} of app {self.app} may have been made, and cannot be looked for: {error}"
                ) from lost
            if found:
                return found[0]
        return None

    async def get(self, machine: str, *, timeout_s: float | None = None) -> Machine:
        """One machine. A deleted one is still to be seen for a while, in state destroyed."""
        return await self._get(Machine.read, Call("get", self.app, _id(machine)), timeout_s)

    async def list(
        self,
        *,
        states: Sequence[str] = (),
        region: str | None = None,
        metadata: Mapping[str, str] | None = None,
        include_deleted: bool = False,
        timeout_s: float | None = None,
    ) -> list[Machine]:
        """All machines, or those that the filters leave."""
        call = requests.listing(
            self.app, states=states, region=region, metadata=metadata, include_deleted=include_deleted
        )
        return await self._get(_machines, call, timeout_s)

    async def update(
        self,
        machine: str,
        config: Mapping[str, Any],
        *,
        version: str | None = None,
        skip_launch: bool = False,
        nonce: str | None = None,
        timeout_s: float | None = None,
    ) -> Machine:
        """Replace the whole configuration; with *version* only if it is still that one."""
        call = requests.update(self.app, _id(machine), config, version=version, skip_launch=skip_launch, nonce=nonce)
        return await self._get(Machine.read, call, CREATE_TIMEOUT_S if timeout_s is None else timeout_s)

    async def start(
        self, machine: str, *, repeat: bool = True, nonce: str | None = None, timeout_s: float | None = None
    ) -> str:
        """Start it; returns the state it was in.

        Asked again while the platform says that the machine is not ready for it, unless *repeat* is false.
        """
        call = Call("start" if repeat else "try-start", self.app, _id(machine), nonce=nonce)
        said = await self._ask(call, timeout_s)
        state = said.get("previous_state") if isinstance(said, Mapping) else None
        return state if isinstance(state, str) else ""

    async def stop(
        self,
        machine: str,
        *,
        signal: str | None = None,
        kill_after_s: float | None = None,
        nonce: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Ask it to stop; does not wait for it. *signal* and *kill_after_s* default to the machine's own."""
        call = requests.stop(self.app, _id(machine), signal=signal, timeout_s=kill_after_s, nonce=nonce)
        await self._ask(call, timeout_s)

    async def wait(
        self, machine: str, *states: str, version: str = "", timeout_s: float | None = None
    ) -> Waited | None:
        """Wait until it is in one of *states*, *timeout_s* at most; None if that did not come true.

        The platform holds a wait for a minute at most: a longer one is several calls. *version*: the machine's, which a
        wait for `stopped` needs; `started` says that the VM is up, not that anybody listens in it.
        """
        if not states:
            raise UsageError("wait: expected at least one state, like started")
        deadline = _now() + (self._timeout_s if timeout_s is None else timeout_s)
        while (left_s := deadline - _now()) > 0:
            slice_s = requests.wait_slice_s(left_s)
            call = requests.wait(self.app, _id(machine), states, version=version, timeout_s=slice_s)
            try:
                return await self._get(Waited.read, call, left_s)
            except RequestError as error:
                if error.status != 408:
                    raise
            except (NoAnswer, RateLimited):
                if _now() < deadline:
                    raise
        return None

    async def delete(
        self, machine: str, *, force: bool = False, nonce: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Delete it for good; with *force* also while it runs. One that is gone is no error."""
        await self._ask(requests.delete(self.app, _id(machine), force=force, nonce=nonce), timeout_s)

    async def events(self, machine: str, *, limit: int | None = None, timeout_s: float | None = None) -> "_Events":
        """What happened to it, newest first: the last 20, or *limit* (50 at most)."""
        query = () if limit is None else (("limit", str(limit)),)
        return await self._get(_events, Call("events", self.app, _id(machine), query=query), timeout_s)

    async def execute(
        self, machine: str, command: Sequence[str], *, stdin: str | None = None, timeout_s: float | None = None
    ) -> ExecResult:
        """Run a command in a machine that is up. Never repeated: it may have run."""
        left_s = self._timeout_s if timeout_s is None else timeout_s
        call = requests.execute(self.app, _id(machine), command, timeout_s=left_s, stdin=stdin)
        return await self._get(ExecResult.read, call, left_s)

    # Leases: whoever changes a leased machine must have the nonce; the proxy does not start one.

    async def lease(self, machine: str, *, timeout_s: float | None = None) -> Lease | None:
        """The lease on it, without its nonce; None if there is none."""
        try:
            return await self._get(Lease.read, Call("lease", self.app, _id(machine)), timeout_s)
        except NotFound:
            return None

    async def acquire_lease(
        self,
        machine: str,
        ttl_s: int,
        *,
        description: str = "",
        nonce: str | None = None,
        timeout_s: float | None = None,
    ) -> Lease:
        """Lease it for *ttl_s* seconds; with the *nonce* of a lease, make that one last so long from now.

        Raises MachineBusy if somebody else has one.
        """
        call = requests.acquire(self.app, _id(machine), ttl_s=ttl_s, description=description, nonce=nonce)
        return await self._get(Lease.read, call, timeout_s)

    async def release_lease(self, machine: str, nonce: str, *, timeout_s: float | None = None) -> None:
        """Give a lease back."""
        await self._ask(Call("release", self.app, _id(machine), nonce=nonce), timeout_s)

    # Metadata: a change makes no new version.

    async def metadata(self, machine: str, *, timeout_s: float | None = None) -> dict[str, str]:
        """All of it."""
        return await self._get(_metadata, Call("metadata", self.app, _id(machine)), timeout_s)

    async def set_metadata(self, machine: str, key: str, value: str, *, timeout_s: float | None = None) -> None:
        """Set one value."""
        call = Call("set-metadata", self.app, _id(machine), _id(key, "a metadata key"), body={"value": value})
        await self._ask(call, timeout_s)

    async def delete_metadata(self, machine: str, key: str, *, timeout_s: float | None = None) -> None:
        """Delete one; one that is not there is no error."""
        await self._ask(Call("delete-metadata", self.app, _id(machine), _id(key, "a metadata key")), timeout_s)

    # How a call is made

    async def _get(self, shape: Callable[[Any], T], call: Call, timeout_s: float | None) -> T:
        data = await self._ask(call, timeout_s)
        try:
            return shape(data)
        except ValueError as error:
            raise NoAnswer(f"cannot {call.does}: the answer is not what is documented: {error}") from None

    async def _ask(self, call: Call, timeout_s: float | None) -> Any:
        """Send *call* until it is answered for good, at its pace, within *timeout_s*."""
        deadline = _now() + _positive("timeout_s", self._timeout_s if timeout_s is None else timeout_s)
        error: MachinesError | None = None
        attempt, pause_s = 0, 0.0
        while True:
            turn_s = max(self._pacer.reserve(self.base_url, call, _now()), pause_s)
            # A last attempt without time for an answer would turn "surely not done" into "nobody knows".
            if turn_s >= deadline - _now() - (MIN_ATTEMPT_S if error else 0.0):
                self._pacer.give_back(self.base_url, call, _now())
                if error is not None:
                    raise error
                raise RateLimited(
                    f"cannot {call.does}: its turn comes in {turn_s:.0f} s, after the deadline; the platform allows "
                    f"{call.operation.limit.per_s:g} a second"
                )
            try:
                await asyncio.sleep(turn_s)
            except asyncio.CancelledError:
                self._pacer.give_back(self.base_url, call, _now())
                raise
            try:
                return await self._attempt(call, deadline - _now())
            except MachinesError as failed:
                error = failed
            if isinstance(error, RateLimited):
                self._pacer.refused(self.base_url, call, _now())
            again_s = requests.again(call, error, attempt, random.random())
            if again_s is None:
                raise error
            log.info("machines.asked_again call=%s machine=%s error=%s", call.name, call.machine or "-", error)
            attempt, pause_s = attempt + 1, again_s

    async def _attempt(self, call: Call, left_s: float) -> Any:
        attempt_s = (CREATE_ATTEMPT_S if call.name in ("create", "update") else ATTEMPT_S) + call.holds_s
        attempt_s = max(0.001, min(attempt_s, left_s))
        timeout = httpx.Timeout(attempt_s, connect=min(CONNECT_S, attempt_s), pool=None)
        headers = {**call.headers, "authorization": self._config.authorization, "user-agent": "wake-on-request"}
        client = self._open()
        request = client.build_request(
            call.operation.method,
            self.base_url + call.path,
            params=call.query or None,
            headers=headers,
            content=call.content or None,
            timeout=timeout,
        )
        try:
            async with asyncio.timeout(attempt_s):
                answer = await _exchange(client, request)
        except TimeoutError:
            raise requests.unanswered(call, f"no answer within {attempt_s:.3g} s") from None
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol) as error:
            raise requests.unreachable(call, _words(error)) from None
        except httpx.HTTPError as error:
            raise requests.unanswered(call, f"the answer broke off: {_words(error)}") from None
        answer = Answer(answer.status, answer.headers, self._config.hide(answer.content))
        return requests.read(call, answer)

    def _open(self) -> httpx.AsyncClient:
        if self._client is None:
            # Never a redirect: the token goes to the configured address alone. Plain http needs no certificates.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
            self._client = httpx.AsyncClient(
                transport=self._transport,
                verify=self._tls or (False if self._config.direct else _tls()),
                trust_env=not self._config.direct,
                follow_redirects=False,
                limits=limits,
            )
        return self._client


async def _exchange(client: httpx.AsyncClient, request: httpx.Request) -> Answer:
    response = await client.send(request, stream=True)
    try:
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > MAX_ANSWER_BYTES:
                raise httpx.DecodingError(f"more than {MAX_ANSWER_BYTES} bytes", request=request)
        return Answer(response.status_code, response.headers, bytes(content))
    finally:
        await response.aclose()


class Machines:
    """An app's machines, from any code: `Machines("my-worker").list()`; arguments and promises as AsyncMachines.

    A thread may share it with others, and a process with its forks: each call opens its own connection.
    """

    def __init__(
        self,
        app: str | None = None,
        *,
        token: str | None = None,
        base_url: str | None = None,
        timeout_s: float = TIMEOUT_S,
        pacer: Pacer | None = None,
    ) -> None:
        self._config = ApiConfig.from_environ(app=app, token=token, base_url=base_url)
        self._timeout_s = _positive("timeout_s", timeout_s)
        self._pacer = pacer

    @property
    def app(self) -> str:
        """Whose machines they are."""
        return self._config.app

    @property
    def base_url(self) -> str:
        """Where the API is."""
        return self._config.base_url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.app!r}, base_url={self.base_url!r})"

    def asynchronous(self) -> AsyncMachines:
        """The async twin, with the same settings."""
        return AsyncMachines(config=self._config, timeout_s=self._timeout_s, pacer=self._pacer)

    def _do(self, work: Callable[[AsyncMachines], Awaitable[T]]) -> T:
        async def do() -> T:
            async with self.asynchronous() as machines:
                return await work(machines)

        return _run(do)

    def get_app(self, *, timeout_s: float | None = None) -> App:
        """The app itself."""
        return self._do(lambda machines: machines.get_app(timeout_s=timeout_s))

    def addresses(self, *, timeout_s: float | None = None) -> list[Address]:
        """The app's addresses; wakes need a private one."""
        return self._do(lambda machines: machines.addresses(timeout_s=timeout_s))

    def create(
        self,
        config: Mapping[str, Any],
        *,
        name: str | None = None,
        region: str | None = None,
        skip_launch: bool = False,
        lease_ttl_s: int | None = None,
        timeout_s: float | None = None,
    ) -> Machine:
        """Make a machine, which starts unless *skip_launch*. Never repeated once it may have been done: create_once."""
        return self._do(
            lambda machines: machines.create(
                config,
                name=name,
                region=region,
                skip_launch=skip_launch,
                lease_ttl_s=lease_ttl_s,
                timeout_s=timeout_s,
            )
        )

    def create_once(
        self,
        config: Mapping[str, Any],
        *,
        name: str,
        region: str | None = None,
        skip_launch: bool = False,
        timeout_s: float = CREATE_TIMEOUT_S,
    ) -> Machine:
        """Make the machine called *name*, which nobody else uses, at most once; as AsyncMachines.create_once."""
        return self._do(
            lambda machines: machines.create_once(
                config, name=name, region=region, skip_launch=skip_launch, timeout_s=timeout_s
            )
        )

    def get(self, machine: str, *, timeout_s: float | None = None) -> Machine:
        """One machine. A deleted one is still to be seen for a while, in state destroyed."""
        return self._do(lambda machines: machines.get(machine, timeout_s=timeout_s))

    def list(
        self,
        *,
        states: Sequence[str] = (),
        region: str | None = None,
        metadata: Mapping[str, str] | None = None,
        include_deleted: bool = False,
        timeout_s: float | None = None,
    ) -> list[Machine]:
        """All machines, or those that the filters leave."""
        return self._do(
            lambda machines: machines.list(
                states=states, region=region, metadata=metadata, include_deleted=include_deleted, timeout_s=timeout_s
            )
        )

    def update(
        self,
        machine: str,
        config: Mapping[str, Any],
        *,
        version: str | None = None,
        skip_launch: bool = False,
        nonce: str | None = None,
        timeout_s: float | None = None,
    ) -> Machine:
        """Replace the whole configuration; with *version* only if it is still that one."""
        return self._do(
            lambda machines: machines.update(
                machine, config, version=version, skip_launch=skip_launch, nonce=nonce, timeout_s=timeout_s
            )
        )

    def start(
        self, machine: str, *, repeat: bool = True, nonce: str | None = None, timeout_s: float | None = None
    ) -> str:
        """Start it; returns the state it was in. Asked again while it is not ready for it, unless *repeat* is false."""
        return self._do(lambda machines: machines.start(machine, repeat=repeat, nonce=nonce, timeout_s=timeout_s))

    def stop(
        self,
        machine: str,
        *,
        signal: str | None = None,
        kill_after_s: float | None = None,
        nonce: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Ask it to stop; does not wait for it. *signal* and *kill_after_s* default to the machine's own."""
        self._do(
            lambda machines: machines.stop(
                machine, signal=signal, kill_after_s=kill_after_s, nonce=nonce, timeout_s=timeout_s
            )
        )

    def wait(self, machine: str, *states: str, version: str = "", timeout_s: float | None = None) -> Waited | None:
        """Wait until it is in one of *states*, *timeout_s* at most; None if that did not come true."""
        return self._do(lambda machines: machines.wait(machine, *states, version=version, timeout_s=timeout_s))

    def delete(
        self, machine: str, *, force: bool = False, nonce: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Delete it for good; with *force* also while it runs. One that is gone is no error."""
        self._do(lambda machines: machines.delete(machine, force=force, nonce=nonce, timeout_s=timeout_s))

    def events(self, machine: str, *, limit: int | None = None, timeout_s: float | None = None) -> "_Events":
        """What happened to it, newest first: the last 20, or *limit* (50 at most)."""
        return self._do(lambda machines: machines.events(machine, limit=limit, timeout_s=timeout_s))

    def execute(
        self, machine: str, command: Sequence[str], *, stdin: str | None = None, timeout_s: float | None = None
    ) -> ExecResult:
        """Run a command in a machine that is up. Never repeated: it may have run."""
        return self._do(lambda machines: machines.execute(machine, command, stdin=stdin, timeout_s=timeout_s))

    def lease(self, machine: str, *, timeout_s: float | None = None) -> Lease | None:
        """The lease on it, without its nonce; None if there is none."""
        return self._do(lambda machines: machines.lease(machine, timeout_s=timeout_s))

    def acquire_lease(
        self,
        machine: str,
        ttl_s: int,
        *,
        description: str = "",
        nonce: str | None = None,
        timeout_s: float | None = None,
    ) -> Lease:
        """Lease it for *ttl_s* seconds; with the *nonce* of a lease, make that one last so long from now."""
        return self._do(
            lambda machines: machines.acquire_lease(
                machine, ttl_s, description=description, nonce=nonce, timeout_s=timeout_s
            )
        )

    def release_lease(self, machine: str, nonce: str, *, timeout_s: float | None = None) -> None:
        """Give a lease back."""
        self._do(lambda machines: machines.release_lease(machine, nonce, timeout_s=timeout_s))

    def metadata(self, machine: str, *, timeout_s: float | None = None) -> dict[str, str]:
        """All of it."""
        return self._do(lambda machines: machines.metadata(machine, timeout_s=timeout_s))

    def set_metadata(self, machine: str, key: str, value: str, *, timeout_s: float | None = None) -> None:
        """Set one value."""
        self._do(lambda machines: machines.set_metadata(machine, key, value, timeout_s=timeout_s))

    def delete_metadata(self, machine: str, key: str, *, timeout_s: float | None = None) -> None:
        """Delete one; one that is not there is no error."""
        self._do(lambda machines: machines.delete_metadata(machine, key, timeout_s=timeout_s))


def _now() -> float:
    return asyncio.get_running_loop().time()


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def _id(text: str, what: str = "a machine's id") -> str:
    # A dot alone would be a step up in the path; everything else is quoted.
    if not isinstance(text, str) or not text.strip() or text in (".", ".."):
        raise UsageError(f"{text!r}: expected {what}, like e2865641be9d86")
    return text


def _positive(name: str, seconds: float) -> float:
    if not 0 < seconds < float("inf"):
        raise UsageError(f"{name}={seconds!r}: expected seconds above 0, like 30")
    return seconds


def _words(error: Exception) -> str:
    return str(error).lower() or type(error).__name__


def _is_taken(error: MachinesError) -> bool:
    """Whether a create was refused for its name (6.7: the code is young, so the words count too)."""
    said = error.said.lower()
    return error.code == "name_taken" or ("name" in said and any(word in said for word in ("taken", "exist", "use")))


def _listed(data: Any, what: str) -> "list[Any]":
    if not isinstance(data, list):
        raise ValueError(f"expected a list of {what}, got {type(data).__name__}")  # noqa: TRY004 - from outside
    return data


_Events = list[Event]


def _machines(data: Any) -> list[Machine]:
    return [Machine.read(each) for each in _listed(data, "machines")]


def _events(data: Any) -> list[Event]:
    return [Event.read(each) for each in _listed(data, "events")]


def _addresses(data: Any) -> list[Address]:
    ips = data.get("ips") if isinstance(data, Mapping) else data
    return [Address.read(each) for each in _listed(ips or [], "addresses")]


def _metadata(data: Any) -> dict[str, str]:
    if not isinstance(data, Mapping):
        raise ValueError(f"expected metadata, got {type(data).__name__}")  # noqa: TRY004 - from outside
    return {str(key): str(value) for key, value in data.items()}
