"""The proxy: takes a request, finds or starts a machine for it, and stays with it until the answer is over.

The choice is made in routing.py; what is done here can fail at every step. Each failure has the proxy's code
(Fly docs: monitoring/error-codes) and is either `_ElsewhereError` (another machine, or the same one a little later, may
take the request) or `FailedError` (the caller gets it). Which HTTP status a code has is undocumented: 502 where a
machine answered wrongly, 503 where none could answer.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from . import replay as fly_replay
from .guest import Connection, Guest
from .machine import Machine, RefusedError
from .message import Answer, Body, Headers, Request, TooLargeToReplayError, without
from .routing import DOWN, UP, Full, Limits, Nobody, View, Wish, route
from .states import STARTABLE, State
from .world import World

__all__ = ["FailedError", "Proxy", "Service"]

# A start that was refused may be granted a moment later; everything else is final when no other machine is left.
WORTH_WAITING = frozenset({"PM01", "PM07", "PM08"})
ADDED_TO_REQUESTS = frozenset(
    {"fly-client-ip", "fly-forwarded-port", "fly-region", "fly-request-id", "x-forwarded-for", "x-forwarded-proto"}
    | {"x-forwarded-port", "x-forwarded-ssl", "via"}
)
VIA = "1.1 fly.io (emulator)"
SERVER = "Fly (emulator)"


@dataclass(frozen=True, slots=True)
class Service:
    """The part of a machine's config that the proxy acts on."""

    app: str
    region: str  # the edge's own
    limits: Limits
    auto_start: bool = True
    concurrency: str = "requests"  # "connections": a new connection for each request
    port: int = 80


class FailedError(Exception):
    """The caller gets this answer."""

    def __init__(self, status: int, code: str, reason: str) -> None:
        super().__init__(f"[{code}] {reason}")
        self.status = status
        self.code = code


class _ElsewhereError(Exception):
    """This machine does not take the request."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class _GoneError(Exception):
    """The machine ended while we were connecting."""


class Proxy:
    """One edge. Belongs to the platform's event loop."""

    def __init__(self, world: World, service: Service, machines: Mapping[str, Machine]) -> None:
        self._world = world
        self._service = service
        self._machines = machines
        self._numbers = itertools.count(1)
        self._pools: dict[str, deque[tuple[Connection, Guest, float]]] = {}
        self._open = 0  # requests that are not over
        self._queued = 0  # of them, those waiting at the hard limit

    async def handle(self, request: Request) -> Answer:
        """Answer *request*; the caller streams the body and then calls `aclose`."""
        world, number = self._world, next(self._numbers)
        request_id = f"01EMULATOR{number:016d}-{self._service.region}"
        world.emit("request.arrived", request=number, method=request.method, path=request.target)
        began = world.now()
        machine: Machine | None = None
        code = None
        self._open += 1
        try:
            if self._open > world.knobs.max_connections:
                raise FailedError(503, "PL01", "connection concurrency limit reached")
            answer, machine = await self._journey(self._as_forwarded(request, request_id), number)
        except FailedError as failed:
            code = failed.code
            answer = _plain(failed.status, str(failed))
        except fly_replay.NotEmulatedError as error:
            answer = _plain(501, f"not emulated: {error}")
        except BaseException:
            self._open -= 1
            world.emit("request.gone", request=number)
            raise
        answer.headers = (
            *without(answer.headers, ("server", "via", "fly-request-id")),
            ("server", SERVER),
            ("via", VIA),
            ("fly-request-id", request_id),
        )
        status = answer.status

        def over() -> None:
            self._open -= 1
            elapsed_s = round(world.now() - began, 6)
            fields: dict[str, object] = {"request": number, "status": status, "elapsed_s": elapsed_s}
            if code is not None:
                fields["code"] = code
            world.emit("request.answered", None if machine is None else machine.id, **fields)

        answer.on_close.insert(0, over)
        return answer

    def _as_forwarded(self, request: Request, request_id: str) -> Request:
        """With the headers that the proxy adds (Fly docs: networking/request-headers)."""
        headers = (
            *without(request.headers, ADDED_TO_REQUESTS),
            ("fly-client-ip", request.client),
            ("fly-forwarded-port", str(self._service.port)),
            ("fly-region", self._service.region),
            ("fly-request-id", request_id),
            ("x-forwarded-for", request.client),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-port", str(self._service.port)),
            ("x-forwarded-ssl", "off"),
            ("via", VIA),
        )
        return replace(request, headers=headers)

    # Replays

    async def _journey(self, request: Request, number: int) -> tuple[Answer, Machine]:
        """From machine to machine, as their answers ask for it."""
        knobs = self._world.knobs
        wish = self._wished(request)
        hops = 0
        while True:
            answer, source = await self._reach(request, wish, number)
            try:
                replay = await self._replay_in(answer)
                if replay is None:
                    return answer, source
                hops += 1
                if hops > knobs.replay_max_hops:
                    raise FailedError(502, "PA02", f"more than {knobs.replay_max_hops} fly-replay hops")
            except fly_replay.InvalidReplayError as error:
                await answer.aclose()
                raise FailedError(502, "PA03", str(error)) from error
            except BaseException:
                await answer.aclose()
                raise
            await answer.aclose()
            if replay.app not in (None, self._service.app):
                raise FailedError(502, "PA04", f"there is no app {replay.app!r} here to replay to")
            self._world.emit("request.replayed", source.id, request=number)
            wish = Wish(
                only=replay.instance,
                prefer=replay.prefer_instance,
                regions=replay.regions,
                besides=frozenset({source.id} if replay.elsewhere else ()),
                may_start=knobs.elsewhere_starts or not replay.elsewhere,
            )
            original = request
            at_s = self._world.epoch + self._world.now()
            origin = fly_replay.source_header(source.id, source.region, at_s, replay.state, knobs.replay_src_separator)
            request = replace(request, headers=(*without(request.headers, ("fly-replay-src",)), *origin))
            if replay.fallback is not None or replay.timeout_s is not None:
                answer, machine = await self._or_back(original, request, wish, replay, source, number)
                if machine is source or not fly_replay.asked(answer):
                    return answer, machine
                await answer.aclose()
                raise fly_replay.NotEmulatedError("a second fly-replay behind one with a timeout or a fallback")

    async def _or_back(
        self, original: Request, request: Request, wish: Wish, replay: fly_replay.Replay, source: Machine, number: int
    ) -> tuple[Answer, Machine]:
        """Replay within the time-out; if that fails, back to where it came from, with the reason."""
        began = self._world.now()
        try:
            async with asyncio.timeout(replay.timeout_s):
                return await self._reach(request, wish, number)
        except TimeoutError:
            reason, failure = "timeout", FailedError(503, "PR04", "the replay timed out")
        except FailedError as failed:
            reason, failure = ("no_candidate" if failed.code in ("PR02", "PR04") else "retries_exhausted"), failed
        if replay.fallback is None:
            raise failure
        fields = {
            "instance": replay.instance or replay.prefer_instance,
            "app": replay.app or self._service.app,
            "region": ",".join(replay.regions),
            "replay_source": source.id,
            "reason": reason,
            "elapsed_ms": str(int(1000 * (self._world.now() - began))),
        }
        told = ";".join(f"{name}={value}" for name, value in fields.items() if value)
        back = replace(original, headers=(*original.headers, ("fly-replay-failed", told)))
        home = Wish(only=source.id) if replay.fallback == "force_self" else Wish(prefer=source.id)
        answer, machine = await self._reach(back, home, number)
        if fly_replay.asked(answer):
            await answer.aclose()
            raise FailedError(502, "PA03", "a fallback request cannot be replayed again")
        return answer, machine

    def _wished(self, request: Request) -> Wish:
        """The routing headers that a caller may send (Fly docs: networking/dynamic-request-routing)."""
        only = request.header("fly-force-instance-id")
        force_region = request.header("fly-force-region")
        prefer_region = request.header("fly-prefer-region")
        return Wish(
            only=only,
            prefer=request.header("fly-prefer-instance-id"),
            regions=(force_region,) if force_region else (),
            prefer_regions=(prefer_region,) if prefer_region else (),
            may_start=only is None or self._world.knobs.force_instance_wakes,
        )

    async def _replay_in(self, answer: Answer) -> fly_replay.Replay | None:
        if not fly_replay.asked(answer):
            return None
        if answer.header("fly-replay-cache") is not None:
            raise fly_replay.NotEmulatedError("fly-replay-cache")
        value = answer.header("fly-replay")
        if value is not None:
            return fly_replay.from_header(value)
        body = b""
        async for chunk in answer.body:
            body += chunk
            if len(body) > self._world.knobs.replay_max_bytes:
                raise fly_replay.InvalidReplayError("the replay's JSON is too large")
        return fly_replay.from_json(body)

    # One request to some machine

    def _views(self) -> list[View]:
        return [
            View(
                each.id,
                each.belief,
                each.in_flight,
                each.region,
                each.distance,
                each.recently_stopped,
                exposed.limits,
                exposed.auto_start,
            )
            for each in self._machines.values()
            if (exposed := each.exposed) is not None
        ]

    async def _reach(self, request: Request, wish: Wish, number: int) -> tuple[Answer, Machine]:
        """Deliver *request* to a machine that fits *wish*, trying as many as the knobs allow."""
        world, knobs = self._world, self._world.knobs
        tried: set[str] = set()
        failure: _ElsewhereError | None = None
        attempts = rounds = 0
        queued_at = None
        while attempts < knobs.candidate_attempts:
            views = self._views()
            choice = route(
                views,
                replace(wish, besides=wish.besides | tried),
                self._service.limits,
                knobs,
                world.rng,
                auto_start=self._service.auto_start,
                start_another=_idle_beside_stopped(views) and world.strikes("start_too_many"),
                turn=number,
            )
            if isinstance(choice, Full):
                queued_at = world.now() if queued_at is None else queued_at
                await self._queue(number, queued_at)
                continue
            if isinstance(choice, Nobody):
                if failure is None:
                    code, reason = ("PR02", f"no machine {wish.only}") if wish.only else ("PR04", "no candidate")
                    raise FailedError(503, code, f"could not find a good candidate: {reason}")
                rounds += 1
                if failure.code not in WORTH_WAITING or rounds >= knobs.start_attempts:
                    break
                tried.clear()
                await asyncio.sleep(world.scaled(knobs.connect_retry_s))
                continue
            attempts += 1
            machine = self._machines[choice.machine]
            machine.in_flight += 1  # in one step with the choice: the next request sees it
            sent = request
            if wish.prefer not in (None, machine.id):
                missed = ("fly-preferred-instance-unavailable", str(wish.prefer))
                sent = replace(request, headers=(*request.headers, missed))
            try:
                others = replace(wish, besides=wish.besides | tried | {machine.id}, prefer=None)
                alone = isinstance(
                    route(views, others, self._service.limits, knobs, world.rng, auto_start=self._service.auto_start),
                    Nobody | Full,
                )
                answer = await self._deliver(machine, sent, number, alone=alone, may_start=wish.may_start)
            except _ElsewhereError as error:
                self._release(machine)
                tried.add(machine.id)
                failure = error
                world.emit("request.moved", machine.id, request=number, code=error.code)
                continue
            except BaseException:
                self._release(machine)
                raise
            answer.on_close.insert(0, partial(self._release, machine))
            return answer, machine
        assert failure is not None  # noqa: S101 - the loop ends by a failure
        if failure.code in WORTH_WAITING or failure.code.startswith("PM"):
            raise FailedError(503, failure.code, str(failure))
        raise FailedError(503, "PR03", f"could not find a good candidate within {attempts} attempts: {failure}")

    def _release(self, machine: Machine) -> None:
        machine.in_flight -= 1
        self._world.changed.fire()

    async def _queue(self, number: int, queued_at: float) -> None:
        """Wait until something changes; give up when it was too long or too many wait."""
        world, knobs = self._world, self._world.knobs
        left_s = queued_at + knobs.queue_timeout_s - world.now()
        if left_s <= 0 or self._queued >= knobs.queue_size:
            raise FailedError(503, "PL02", "request concurrency limit reached on every machine")
        world.emit("request.queued", request=number)
        self._queued += 1
        try:
            async with asyncio.timeout(left_s):
                await world.changed.wait()
        except TimeoutError:
            pass
        finally:
            self._queued -= 1

    async def _deliver(
        self, machine: Machine, request: Request, number: int, *, alone: bool, may_start: bool
    ) -> Answer:
        """To this machine: start it if need be, connect, send, and wait for the head of the answer."""
        world, knobs = self._world, self._world.knobs
        connection, guest = await self._connected(machine, number, alone=alone, may_start=may_start)
        if world.strikes("delivered_twice", machine.id):
            world.spawn(self._deliver_again(machine, guest, request))
        world.emit("request.sent", machine.id, request=number)
        try:
            async with asyncio.timeout(knobs.idle_timeout_s):
                answer = await connection.send(request)
        except TimeoutError:
            connection.close()
            raise FailedError(502, "PC05", "the machine did not answer in time") from None
        except ConnectionAbortedError as error:
            raise FailedError(400, "PU02", str(error)) from error
        except ConnectionError as error:
            connection.close()
            if knobs.on_reset == "retry":
                raise _ElsewhereError("PC03", str(error)) from error
            raise FailedError(502, "PC03", f"connection reset by the machine: {error}") from error
        except TooLargeToReplayError:
            connection.close()
            raise FailedError(502, "PA01", "the request is too large to be sent again") from None
        body = answer.body
        answer.on_close.append(lambda: self._give_back(machine, connection, guest, body))
        if world.strikes("reset_before_answer", machine.id):
            await answer.aclose()
            raise FailedError(502, "PC03", "connection reset by the machine")
        if world.strikes("slow_answer", machine.id):
            try:
                await asyncio.sleep(world.scaled(knobs.slow_answer_s))
            except BaseException:
                await answer.aclose()
                raise
        if world.strikes("reset_mid_answer", machine.id):
            answer.body = _broken(body)
        return answer

    async def _deliver_again(self, machine: Machine, guest: Guest, request: Request) -> None:
        """The same request once more, on a connection of its own; nobody waits for its answer."""
        try:
            connection = await guest.connect()
            answer = await connection.send(
                replace(request, headers=without(request.headers, ("content-length",)), body=Body())
            )
            async for _ in answer.body:
                pass
            connection.close()
        except OSError:
            pass

    # Connections

    async def _connected(
        self, machine: Machine, number: int, *, alone: bool, may_start: bool
    ) -> tuple[Connection, Guest]:
        """A connection to *machine*, which is started if it is not up."""
        for _ in range(2):
            guest = await self._up(machine, number, alone=alone, may_start=may_start)
            pool = self._pools.get(machine.id, ())
            while pool:
                connection, kept_guest, until = pool.pop()
                if kept_guest is guest and connection.reusable and self._world.now() < until:
                    return connection, guest
                connection.close()
            try:
                return await self._connect(machine, guest), guest
            except _GoneError:
                continue
        raise _ElsewhereError("PM05", "failed to connect to machine: it ended twice while we tried")

    async def _up(self, machine: Machine, number: int, *, alone: bool, may_start: bool) -> Guest:
        """Wait until the machine's VM runs and we have learned of it, starting it first where that is ours to do."""
        world, knobs = self._world, self._world.knobs
        give_up_at = world.now() + knobs.wake_timeout_s
        held = False
        while True:
            if machine.state in (State.DESTROYING, State.DESTROYED):
                raise _ElsewhereError("PR02", f"machine {machine.id} not found")
            if machine.guest is not None and machine.belief is State.STARTED:
                return machine.guest
            if machine.state in (*STARTABLE, State.REPLACING) or (
                machine.state is State.STOPPING and machine.belief not in UP
            ):
                if machine.belief in UP and machine.recently_stopped and not alone:
                    raise _ElsewhereError("PM11", "machine was recently stopped, go elsewhere")
                exposed = machine.exposed
                auto_start = exposed is not None and exposed.auto_start
                if not may_start or not (self._service.auto_start if auto_start is None else auto_start):
                    raise _ElsewhereError("PR01", f"machine {machine.id} is not running and may not be started")
                try:
                    machine.start("proxy")
                except RefusedError as refused:
                    raise _ElsewhereError(refused.code, _start_failure(refused)) from refused
            if not held:
                world.emit("request.held", machine.id, request=number)
                held = True
            try:
                async with asyncio.timeout(give_up_at - world.now()):
                    await world.changed.wait()
            except TimeoutError:
                raise _ElsewhereError("PM03", "timed out waiting for the machine to start") from None

    async def _connect(self, machine: Machine, guest: Guest) -> Connection:
        """Connect, again and again while nothing listens yet."""
        world, knobs = self._world, self._world.knobs
        began = world.now()
        # On a quicker scale it tries more often in the same time.
        attempts = max(1, round(knobs.connect_attempts / min(1.0, knobs.time_scale)))
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(world.scaled(knobs.connect_retry_s))
            if machine.guest is not guest:
                raise _GoneError
            if world.strikes("drop_connect", machine.id):
                continue
            try:
                async with asyncio.timeout(knobs.connect_timeout_s):
                    return await guest.connect()
            except (OSError, TimeoutError):
                continue
        elapsed_s = world.now() - began
        reason = f"failed to connect to machine: gave up after {attempts} attempts (in {elapsed_s:.2f}s)"
        raise _ElsewhereError("PM05", reason)

    async def _give_back(
        self, machine: Machine, connection: Connection, guest: Guest, body: AsyncGenerator[bytes, None]
    ) -> None:
        """Keep the connection for the next request, or close it if it cannot be used again."""
        await body.aclose()
        if self._service.concurrency != "requests" or not connection.reusable:
            connection.close()
            return
        keep_s = self._world.knobs.pool_idle_s
        pool = self._pools.setdefault(machine.id, deque())
        pool.append((connection, guest, self._world.now() + keep_s))
        self._world.later(keep_s, self._expire, pool)

    def _expire(self, pool: deque[tuple[Connection, Guest, float]]) -> None:
        while pool and pool[0][2] <= self._world.now():
            pool.popleft()[0].close()

    @property
    def open_requests(self) -> int:
        """How many requests are not over."""
        return self._open

    def close(self) -> None:
        """Close the idle connections."""
        for pool in self._pools.values():
            while pool:
                pool.pop()[0].close()


def _idle_beside_stopped(views: Sequence[View]) -> bool:
    """Whether an idle machine could be overlooked and another one started."""
    return any(view.state in UP and not view.in_flight for view in views) and any(view.state in DOWN for view in views)


def _start_failure(refused: RefusedError) -> str:
    """As the proxy's log words it."""
    return f"failed to change machine state: {refused.reason}" if refused.code == "PM07" else refused.reason


def _plain(status: int, text: str) -> Answer:
    body = f"{text}\n".encode()
    headers: Headers = (("content-type", "text/plain; charset=utf-8"), ("content-length", str(len(body))))
    return Answer(status, headers, _chunks(body))


async def _chunks(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


async def _broken(body: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Half of the first piece, then a reset."""
    async for chunk in body:
        yield chunk[: len(chunk) // 2]
        break
    raise ConnectionResetError("fault: reset_mid_answer")
