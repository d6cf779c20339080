"""Waker and AsyncWaker: one call wakes so many machines, and reports which.

Both are thin: policy.py says how many wakes to send next, transport.py sends them, nudge.py coalesces those that
nobody waits for. httpx and asyncio are imported when the first wake is sent.
"""

import dataclasses
import functools
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

from . import protocol
from .config import MAX_TIMEOUT_S, WakerConfig
from .errors import NotWoken, Unauthorized, UsageError, WakeError
from .nudge import FLUSH_AT_EXIT_S, NUDGE_INTERVAL_S, Nudger
from .policy import Answer, Done, Pressure, Send, Spread
from .target import Target

if TYPE_CHECKING:
    import ssl

    import httpx

    from .machines.starts import Starter, Strategy

    Sender = Callable[[httpx.Request], Awaitable[httpx.Response]]

__all__ = ["AsyncWaker", "WakeReport", "Waker", "WokenMachine"]

# How long a fan-out asks its answers to be held, so that the proxy sees each machine occupied; the worker bounds it.
HOLD_S = 1.0
# The proxy holds a wake while it starts a machine, and gives a machine about eight seconds to listen.
ATTEMPT_S = 20.0
CONNECT_S = 5.0
# What a stranger answers is quoted in the error, this much of it, if it comes this soon.
QUOTE_CHARS = 120
QUOTE_S = 1.0

# How much of a call's time the proxy has where there is a fallback.
FALLBACK_SHARE = 0.5

MAX_MACHINES = 10_000
# File descriptors left alone for the rest of the process.
RESERVED_FILES = 64

log = logging.getLogger("waker")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WokenMachine:
    """A machine that gave a receipt. *cold*: it was started by this call. *busy*: all its slots were taken.

    *elapsed_s*: from the start of the call to its first receipt.
    """

    id: str
    boot: str
    cold: bool
    busy: bool
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class WakeReport:
    """What a wake came to. Fewer machines than requested is not an error: look at *missing*.

    *machines*: each machine that gave a receipt, in the order they came, busy ones included. *distinct*: how many of
    them count; a machine that was up and busy before the call does not. *seen*: how often each kind of answer came.
    *unconfirmed*: machines that the Machines API started, and that gave no receipt.
    """

    target: str
    requested: int
    machines: tuple[WokenMachine, ...]
    distinct: int
    rounds: int
    requests: int
    elapsed_s: float
    seen: Mapping[str, int]
    unconfirmed: tuple[str, ...] = ()

    @property
    def missing(self) -> int:
        """How many of the machines asked for gave no receipt that counts."""
        return max(0, self.requested - self.distinct)

    @property
    def cold(self) -> int:
        """How many machines this call started."""
        return sum(machine.cold for machine in self.machines)

    @property
    def ok(self) -> bool:
        """Whether as many machines as asked for are there."""
        return not self.missing

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "target": self.target,
            "requested": self.requested,
            "distinct": self.distinct,
            "cold": self.cold,
            "missing": self.missing,
            "rounds": self.rounds,
            "requests": self.requests,
            "elapsed_s": round(self.elapsed_s, 4),
            "machines": [
                {"id": m.id, "boot": m.boot, "cold": m.cold, "busy": m.busy, "elapsed_s": round(m.elapsed_s, 4)}
                for m in self.machines
            ],
            "seen": dict(self.seen),
            "unconfirmed": list(self.unconfirmed),
        }


class _Waker:
    """What both wakers share: the configuration, the nudges, and the one way to wake."""

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | None = None,
        timeout_s: float | None = None,
        hold_s: float = HOLD_S,
        nudge_interval_s: float = NUDGE_INTERVAL_S,
        flush_at_exit_s: float = FLUSH_AT_EXIT_S,
        transport: "httpx.AsyncBaseTransport | None" = None,
        fallback: "_Waker | None" = None,
    ) -> None:
        """*target*, *token* and *timeout_s* default to WAKER_TARGET, WAKER_TOKEN and WAKER_TIMEOUT_S.

        *timeout_s* bounds a whole call of wake(). *hold_s* is the hold a fan-out asks for. *nudge_interval_s* is the
        least time between two wakes that nudges bring about; *flush_at_exit_s* bounds how long the end of the process
        waits for what is owed. *transport* sends the requests instead of our own. *fallback*, a waker made by via_api,
        starts the machines that the proxy did not bring in half the time.
        Raises UsageError for a target that can never wake anything; nothing is looked up or sent.
        """
        self._config = WakerConfig.from_environ(target=target, token=token, timeout_s=timeout_s)
        if not 0 <= hold_s <= protocol.MAX_HOLD_S:
            raise UsageError(f"hold_s={hold_s!r}: expected seconds from 0 to {protocol.MAX_HOLD_S:.0f}, like {HOLD_S}")
        self._hold_s = hold_s
        if fallback is not None and fallback._starter is None:
            raise UsageError("fallback: expected a waker that uses the Machines API, like Waker.via_api('my-worker')")
        self._transport = transport
        self._fallback = fallback
        self._starter: Starter | None = None
        self._tls: ssl.SSLContext | None = None
        # A drainer's next reading sees the job: it need not be woken for it.
        drained_here = self._config.target.serves(self._config.drains)
        self._nudger = Nudger(
            None if drained_here else self._wake_for_nudge,
            name=self._config.target.url,
            interval_s=nudge_interval_s,
            flush_at_exit_s=flush_at_exit_s,
        )

    @classmethod
    def via_api(
        cls,
        app: str | None = None,
        *,
        strategy: "Strategy" = "next",
        group: str | None = None,
        region: str | None = None,
        metadata: Mapping[str, str] | None = None,
        token: str | None = None,
        timeout_s: float | None = None,
        api_token: str | None = None,
        base_url: str | None = None,
        nudge_interval_s: float = NUDGE_INTERVAL_S,
        flush_at_exit_s: float = FLUSH_AT_EXIT_S,
        transport: "httpx.AsyncBaseTransport | None" = None,
    ) -> Self:
        """A waker that starts machines through the Machines API: for where no Flycast address is at hand.

        *strategy*: "next" in turn, the "oldest" start first, "all" of them, or a list of ids; of these only those of a
        process *group*, a *region* or with *metadata*. *app*, *api_token* and *base_url* default to FLY_APP_NAME,
        FLY_API_TOKEN or FLY_ACCESS_TOKEN, and FLY_FLAPS_BASE_URL. Whoever wakes must be in the machines' private
        network: each counts only with a receipt from its own address, and is else reported as unconfirmed.
        """
        from .machines.config import ApiConfig
        from .machines.starts import Starter

        config = ApiConfig.from_environ(app=app, token=api_token, base_url=base_url)
        waker = cls(
            f"http://{config.app}.flycast",
            token=token,
            timeout_s=timeout_s,
            nudge_interval_s=nudge_interval_s,
            flush_at_exit_s=flush_at_exit_s,
            transport=transport,
        )
        waker._starter = Starter(
            config, strategy=strategy, group=group, region=region, metadata=metadata, transport=transport
        )
        return waker

    @property
    def target(self) -> Target:
        """Where the wakes go."""
        return self._config.target

    def nudge(self, machines: int = 1) -> None:
        """Have *machines* machines woken soon, in the background; call it after the enqueue is committed.

        Never blocks, never raises. Nudges coalesce: there is one wake in flight and at most one after it, which takes
        the largest number asked, and every nudge is followed by a wake that began after it. A wake that failed stays
        owed and is tried again until it succeeds; the end of the process waits a bounded time for it. A process that
        ends by os._exit or a signal loses what is owed: the watch is for that. In a drainer of the same app it does
        nothing. Where no thread can start (the interpreter is ending), it wakes in the caller, once.
        """
        self._nudger.nudge(machines)

    def flush(self, timeout_s: float = FLUSH_AT_EXIT_S) -> bool:
        """Wait until nothing is owed, *timeout_s* at most; whether that came true. Blocks the calling thread."""
        return self._nudger.flush(timeout_s)

    def close(self, timeout_s: float = FLUSH_AT_EXIT_S) -> None:
        """Flush, then drop what is still owed. A nudge after it works as before."""
        self._nudger.close(timeout_s)

    def __repr__(self) -> str:
        if self._starter is not None:
            return f"{type(self).__name__}.via_api({self._starter.app!r})"
        return f"{type(self).__name__}({self._config.target.url!r})"

    def _wake_for_nudge(self, machines: int, timeout_s: float) -> None:
        _run(lambda: self._wake(machines, max(timeout_s, 0.001), busy_counts=False))

    async def _wake(self, machines: int, timeout_s: float | None, *, busy_counts: bool) -> WakeReport:
        if not 1 <= machines <= MAX_MACHINES:
            raise UsageError(f"machines={machines!r}: expected a number from 1 to {MAX_MACHINES}")
        timeout_s = self._config.timeout_s if timeout_s is None else timeout_s
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise UsageError(
                f"timeout_s={timeout_s!r}: expected seconds above 0 and up to {MAX_TIMEOUT_S:.0f}, like 2.5"
            )
        if self._starter is not None:
            return await self._start(machines, timeout_s, busy_counts=busy_counts)
        if self._fallback is not None:
            return await self._wake_or_start(self._fallback, machines, timeout_s, busy_counts=busy_counts)
        return await self._wake_by_proxy(machines, timeout_s, busy_counts=busy_counts)

    async def _start(
        self, machines: int, timeout_s: float, *, busy_counts: bool, known: frozenset[str] = frozenset()
    ) -> WakeReport:
        assert self._starter is not None  # noqa: S101 - made by via_api
        return await self._starter.wake(
            machines, timeout_s, token=self._config.token, busy_counts=busy_counts, known=known
        )

    async def _wake_or_start(
        self, fallback: "_Waker", machines: int, timeout_s: float, *, busy_counts: bool
    ) -> WakeReport:
        """Wake through the proxy, then start what is missing."""
        began = time.monotonic()
        report: WakeReport | None = None
        first: NotWoken | None = None
        try:
            report = await self._wake_by_proxy(machines, timeout_s * FALLBACK_SHARE, busy_counts=busy_counts)
        except Unauthorized:
            raise
        except NotWoken as error:
            first = error
        if report is not None and report.ok:
            return report
        missing = machines if report is None else report.missing
        known = frozenset(machine.id for machine in report.machines) if report else frozenset[str]()
        spent_s = time.monotonic() - began
        try:
            started = await fallback._start(
                missing, max(0.001, timeout_s - spent_s), busy_counts=busy_counts, known=known
            )
        except WakeError as error:
            if report is None:
                raise NotWoken(f"{first}; and through the Machines API: {error}") from error
            return dataclasses.replace(report, seen={**report.seen, f"fallback: {error}": 1})
        machines_started = tuple(
            dataclasses.replace(machine, elapsed_s=spent_s + machine.elapsed_s) for machine in started.machines
        )
        return WakeReport(
            target=self._config.target.url,
            requested=machines,
            machines=(report.machines if report else ()) + machines_started,
            distinct=(report.distinct if report else 0) + started.distinct,
            rounds=(report.rounds if report else 0) + started.rounds,
            requests=(report.requests if report else 0) + started.requests,
            elapsed_s=spent_s + started.elapsed_s,
            seen=dict(Counter(report.seen if report else {f"proxy: {first}": 1}) + Counter(started.seen)),
            unconfirmed=started.unconfirmed,
        )

    async def _wake_by_proxy(self, machines: int, timeout_s: float, *, busy_counts: bool) -> WakeReport:
        import httpx

        from .transport import WakeTransport

        spread = Spread(machines, busy_counts=busy_counts)
        transport = self._transport
        if transport is None and self._config.target.direct:
            transport = WakeTransport()
        if transport is not None:
            # No client around it: redirects, cookies and proxies are not for wakes, and a thousand would pay for them.
            return await _Call(self._config, transport.handle_async_request, self._hold_s, spread, timeout_s).run()
        # A public https address: TLS, and the proxies of the environment, as httpx has them. Nothing waits in a pool.
        if self._tls is None:
            self._tls = httpx.create_ssl_context()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(verify=self._tls, limits=limits) as client:
            send = functools.partial(client.send, stream=True)
            return await _Call(self._config, send, self._hold_s, spread, timeout_s).run()


class AsyncWaker(_Waker):
    """Wake machines from async code (asyncio)."""

    async def wake(self, machines: int = 1, *, timeout_s: float | None = None, busy_counts: bool = False) -> WakeReport:
        """Wake until *machines* distinct machines hold a receipt, no more can be found, or *timeout_s* has passed.

        A receipt means: a drainer of that machine reads its queue after the wake arrived, or the machine's exit code is
        not 0. So enqueue and commit first. A machine that was busy before the call does not count, unless
        *busy_counts*.
        Raises NotWoken if nobody gave a receipt (Unauthorized at once if the token is refused), and UsageError.
        """
        return await self._wake(machines, timeout_s, busy_counts=busy_counts)


class Waker(_Waker):
    """Wake machines from any code. A thread may share it with others, and a process with its forks."""

    def wake(self, machines: int = 1, *, timeout_s: float | None = None, busy_counts: bool = False) -> WakeReport:
        """Wake until *machines* distinct machines hold a receipt, no more can be found, or *timeout_s* has passed.

        A receipt means: a drainer of that machine reads its queue after the wake arrived, or the machine's exit code is
        not 0. So enqueue and commit first. A machine that was busy before the call does not count, unless
        *busy_counts*.
        Raises NotWoken if nobody gave a receipt (Unauthorized at once if the token is refused), and UsageError.
        """
        return _run(lambda: self._wake(machines, timeout_s, busy_counts=busy_counts))


_HEADERS = {"user-agent": "wake-on-request", "connection": "close", "accept-encoding": "identity", "accept": "*/*"}

# One Pressure per address and process; guarded by the lock. The number of addresses is bounded: the oldest goes.
_MAX_ADDRESSES = 256
_pressures: dict[str, Pressure] = {}
_pressures_lock = threading.Lock()


def _forget_in_child() -> None:
    """Start anew after a fork: another thread may have held the lock, and the child presses on its own account."""
    global _pressures_lock
    _pressures_lock = threading.Lock()
    _pressures.clear()


os.register_at_fork(after_in_child=_forget_in_child)

# Held while a nudge's thread imports what a wake needs. A fork waits for it, a fifth of a second once: the child would
# have half of asyncio for ever, its own use of it included.
_importing = threading.RLock()
os.register_at_fork(before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release)


class _Call:
    """One call of wake(), from its first wake to its report."""

    def __init__(self, config: WakerConfig, send: "Sender", hold_s: float, spread: Spread, timeout_s: float) -> None:
        self._target = config.target
        self._token = config.token
        self._send = send
        self._hold_s = hold_s
        self._spread = spread
        self._began = time.monotonic()
        self._timeout_s = timeout_s
        self._deadline = self._began + timeout_s
        self._machines: dict[str, WokenMachine] = {}
        self._seen: Counter[str] = Counter()
        self._requests = 0
        self._rounds = 0

    async def run(self) -> WakeReport:
        action: Send | Done = self._spread.first()
        while isinstance(action, Send):
            if not await self._sleep(action.pause_s):
                break
            probing = await self._turn()
            if probing is None:
                break
            answers = await self._round(1 if probing else action.count, held=action.held and not probing)
            self._note(answers)
            if not self._machines and any(answer.status == 401 for answer in answers):
                raise Unauthorized(self._unauthorized())
            action = self._spread.next(answers, random.random())
        if not self._machines:
            raise NotWoken(self._complaint())
        return WakeReport(
            target=self._target.url,
            requested=self._spread.machines,
            machines=tuple(self._machines.values()),
            distinct=self._spread.machines - self._spread.missing,
            rounds=self._rounds,
            requests=self._requests,
            elapsed_s=time.monotonic() - self._began,
            seen=dict(self._seen),
        )

    def _left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    async def _sleep(self, seconds: float) -> bool:
        """Sleep within the deadline; whether there is time left."""
        import asyncio

        if seconds > 0:
            await asyncio.sleep(min(seconds, self._left_s()))
        return self._left_s() > 0

    async def _turn(self) -> bool | None:
        """Wait for leave to send: False in full, True one probe, None the deadline came first."""
        while True:
            with _pressures_lock:
                while len(_pressures) >= _MAX_ADDRESSES and self._target.url not in _pressures:
                    del _pressures[next(iter(_pressures))]
                pressure = _pressures.setdefault(self._target.url, Pressure())
                wait_s = pressure.ask(time.monotonic(), min(ATTEMPT_S, self._left_s()))
            if not wait_s:
                return wait_s is not None
            # In slices: a receipt that somebody else gets in the meantime ends the wait.
            if not await self._sleep(min(wait_s, 0.5)):
                if not self._seen and pressure.seen:
                    self._seen[f"{pressure.seen} (by another wake of this process)"] += 1
                return None

    def _note(self, answers: list[Answer]) -> None:
        with _pressures_lock:
            pressure = _pressures.get(self._target.url)
            if pressure is not None:
                pressure.note(answers, time.monotonic(), random.random())

    async def _round(self, count: int, *, held: bool) -> list[Answer]:
        """Send *count* wakes at once; their answers, as many as came before nothing was missing or time was up."""
        import asyncio

        import httpx

        headers = {**_HEADERS, protocol.VERSION: protocol.WIRE_VERSION}
        if held:
            headers[protocol.HOLD] = f"{self._hold_s:g}"
        if self._token is not None:
            headers[protocol.AUTHORIZATION] = f"Bearer {self._token}"
        attempt_s = min(ATTEMPT_S, self._left_s())
        timeout = httpx.Timeout(attempt_s, connect=min(CONNECT_S, attempt_s), pool=None)
        # One request object for all: they differ in nothing.
        request = httpx.Request("GET", self._target.url, headers=headers, extensions={"timeout": timeout.as_dict()})

        answers: list[Answer] = []
        decided = asyncio.Event()
        room = asyncio.Semaphore(_room_for(count))

        async def send() -> None:
            async with room:
                answer = await self._attempt(request)
            answers.append(answer)
            self._take(answer)
            if len(answers) == count or not self._spread.missing or (answer.status == 401 and not self._machines):
                decided.set()

        self._rounds += 1
        self._requests += count
        tasks = [asyncio.create_task(send()) for _ in range(count)]
        try:
            async with asyncio.timeout(self._left_s()):
                await decided.wait()
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            with _pressures_lock:
                if self._target.url in _pressures:
                    _pressures[self._target.url].abandon(time.monotonic())
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not answers:
            answers.append(Answer(None, f"no answer within {attempt_s:.3g} s"))
            self._take(answers[0])
        return answers

    def _take(self, answer: Answer) -> None:
        self._seen[answer.seen] += 1
        self._spread.take(answer)
        receipt = answer.receipt
        if receipt is not None and receipt.machine not in self._machines:
            elapsed_s = time.monotonic() - self._began
            self._machines[receipt.machine] = WokenMachine(
                receipt.machine, receipt.boot, answer.cold, receipt.busy, elapsed_s
            )

    async def _attempt(self, request: "httpx.Request") -> Answer:
        import httpx

        try:
            response = await self._send(request)
            try:
                return await self._read(response)
            finally:
                await response.aclose()
        except httpx.ConnectTimeout:
            return Answer(None, "no connection: the address does not react")
        except httpx.TimeoutException:
            return Answer(None, "no answer: connected, then silence")
        except httpx.HTTPError as error:
            return Answer(None, str(error).lower() or type(error).__name__)

    async def _read(self, response: "httpx.Response") -> Answer:
        headers, status = response.headers, response.status_code
        receipt = protocol.receipt_from(headers) if status == 200 else None
        if receipt is not None:
            cold = receipt.up_s <= time.monotonic() - self._began
            return Answer(receipt, "200 with a receipt" + (", busy" if receipt.busy else ""), status, cold=cold)
        if protocol.MACHINE in headers:
            seen = f"{status} from a worker, {headers.get(protocol.STATE) or 'no state'}"
        elif "location" in headers:
            seen = f"{status} to {headers['location'][:QUOTE_CHARS]}"
        else:
            seen = f"{status} without a receipt" + await _quote(response)
        return Answer(None, seen, status, retry_after_s=_seconds(headers.get(protocol.RETRY_AFTER)))

    def _unauthorized(self) -> str:
        has = "refused the token" if self._token is not None else "wants a token, and none was given"
        return f"{self._target}: the worker answered 401: it {has}; set WAKER_TOKEN to one of its WORKER_TOKENS"

    def _complaint(self) -> str:
        seen = ", ".join(f"{text} ({times}×)" if times > 1 else text for text, times in self._seen.most_common(5))
        tried = f"{self._requests} wake{'s' * (self._requests != 1)} in {time.monotonic() - self._began:.1f} s"
        return f"{self._target}: nobody promised anything; tried {tried}, saw: {seen or 'nothing'}{self._hint()}"

    def _hint(self) -> str:
        """What to look at, from what was seen; empty if that says it all."""
        text = " ".join(self._seen)
        if "has no address" in text and "." not in self._target.host:
            return f"; did you mean http://{self._target.host}.flycast?"
        if "has no address" in text:
            return "; Flycast names resolve inside the private network alone, for apps that have a private address"
        if " to https://" in text:
            return (
                "; the service redirects to https: turn force_https off, there is no certificate on a Flycast address"
            )
        if "without a receipt" in text or "not an http answer" in text:
            return "; that is not a worker, or not up yet: does the address lead to the worker app?"
        if "refused" in text:
            return "; is the port the service's external one (as a rule 80)?"
        return ""


async def _quote(response: "httpx.Response") -> str:
    """The first line of what a stranger said, for the error message."""
    import asyncio

    said = bytearray()
    try:
        async with asyncio.timeout(QUOTE_S):
            async for chunk in response.aiter_raw():
                said += chunk[: QUOTE_CHARS * 4]
                if len(said) >= QUOTE_CHARS * 4:
                    break
    except (TimeoutError, OSError):
        pass
    line = said.decode("utf-8", "replace").strip().partition("\n")[0].strip()
    text = "".join(letter if letter.isprintable() else "?" for letter in line[:QUOTE_CHARS])
    return f": {text!r}" if text and not text.startswith("<") else ""


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; a date, or nonsense, is as good as none."""
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None


def _room_for(count: int) -> int:
    """How many connections may be open at once; raises the process's file limit if *count* needs it and it may."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or count + RESERVED_FILES * 4 <= soft:
            return count
        used = len(os.listdir("/proc/self/fd")) + RESERVED_FILES
        if used + count > soft:
            wanted = used + count if hard == resource.RLIM_INFINITY else min(used + count, hard)
            if wanted > soft:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                log.info("waker.file_limit_raised from=%d to=%d", soft, wanted)
                soft = wanted
    except (ImportError, OSError, ValueError):
        return count
    room = max(1, min(count, soft - used))
    if room < count:
        log.warning(
            "waker.fan_out_limited wanted=%d at_once=%d: the limit of open files (ulimit -n) is too low", count, room
        )
    return room


def _run(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end in this thread, or in one of its own if this one has a running event loop."""
    with _importing:
        import asyncio

        import httpx  # noqa: F401 - for the coroutine, which imports it where no fork can be kept waiting

        from . import transport  # noqa: F401 - likewise

    def run() -> T:
        # A loop of our own that nobody else sees: the thread's current event loop stays what it is.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            return runner.run(make())

    outer = asyncio._get_running_loop()
    if outer is None:
        return run()
    result: list[T] = []
    errors: list[BaseException] = []

    def keep() -> None:
        try:
            result.append(run())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=keep, name="wake", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # No thread can start. The outer loop stands still either way; hide it for the length of the wake.
        asyncio._set_running_loop(None)
        try:
            return run()
        finally:
            asyncio._set_running_loop(outer)
    thread.join()
    if errors:
        raise errors[0]
    return result[0]
