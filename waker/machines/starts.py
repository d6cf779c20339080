"""Waking through the Machines API: which machines are started, and when one of them counts.

A machine counts with a receipt alone, asked at its private address: the API's "started" says that a VM is up, not that
a drainer will look, and one that was up already may just be leaving. httpx and asyncio are imported by the first wake.
"""

import random
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from .. import protocol
from ..client import WakeReport, WokenMachine, _quote
from ..errors import NotWoken, Unauthorized, UsageError
from .config import ApiConfig

if TYPE_CHECKING:
    import httpx

    from .client import AsyncMachines, Pacer
    from .records import Machine

__all__ = ["STRATEGIES", "Starter", "Strategy", "candidates"]

Strategy = Literal["next", "oldest", "all"] | Sequence[str]
STRATEGIES = ("next", "oldest", "all")

DEFAULT_PORT = 8080
UP = ("started", "starting", "restarting")
CANNOT_START = ("destroyed", "destroying", "replaced", "migrated", "failed", "launch_failed")
# A machine has so long to listen after its start before it is started again, and one that was up before it is started.
CONFIRM_S = 10.0
CONFIRM_UP_S = 2.0
# How long a machine may refuse to start before another one is tried in its place; then it is its turn again.
REFUSED_S = 5.0
START_GAP_S = 1.0
ASK_GAP_S = 0.25
ASK_GAP_MAX_S = 1.0
ASK_S = 10.0
CONNECT_S = 2.0
LIST_S = 30.0
AT_ONCE = 100
UNCONFIRMED = "started, unconfirmed"


def candidates(
    machines: "Sequence[Machine]", strategy: Strategy, *, group: str | None = None, last: str = ""
) -> "list[Machine]":
    """The machines that may be started, in the order in which they should be. Pure.

    *last* is the id of the machine that was started last, for "next". Jobs' machines, and scheduled ones that were not
    asked for by name, are not for waking.
    """
    from .jobs import JOB

    fit = [
        machine
        for machine in machines
        if machine.state not in CANNOT_START and JOB not in machine.metadata and group in (None, machine.group)
    ]
    if not isinstance(strategy, str):
        known = {machine.id: machine for machine in fit}
        return [known[each] for each in dict.fromkeys(strategy) if each in known]
    fit = sorted((machine for machine in fit if not machine.config.get("schedule")), key=lambda machine: machine.id)
    if strategy == "next":
        return [machine for machine in fit if machine.id > last] + [machine for machine in fit if machine.id <= last]
    if strategy == "oldest":
        return sorted(fit, key=lambda machine: machine.started_at or 0.0)
    return fit


class Starter:
    """Starts machines of one app, and asks each for a receipt. Threads may share it."""

    def __init__(
        self,
        config: ApiConfig,
        *,
        strategy: Strategy = "next",
        group: str | None = None,
        region: str | None = None,
        metadata: Mapping[str, str] | None = None,
        transport: "httpx.AsyncBaseTransport | None" = None,
        pacer: "Pacer | None" = None,
    ) -> None:
        """Raises UsageError for a strategy that there is not."""
        if isinstance(strategy, str) and strategy not in STRATEGIES:
            raise UsageError(f"strategy={strategy!r}: expected next, oldest, all, or a list of machine ids")
        if not strategy:
            raise UsageError("strategy=[]: expected at least one machine id")
        self._config = config
        self._strategy = strategy
        self._group = group
        self._region = region
        self._metadata = dict(metadata or {})
        self._transport = transport
        self._pacer = pacer
        self._last = ""  # guarded by the lock
        self._lock = threading.Lock()

    @property
    def app(self) -> str:
        """Whose machines they are."""
        return self._config.app

    async def wake(
        self,
        machines: int,
        timeout_s: float,
        *,
        token: str | None,
        busy_counts: bool,
        known: frozenset[str] = frozenset(),
    ) -> WakeReport:
        """Start machines until *machines* of them hold a receipt, no more can be started, or *timeout_s* has passed.

        "all" and a list start every one of them. *known*: machines that need not be started. Raises NotWoken if nobody
        gave a receipt, and MachinesError if the API could not be asked at all.
        """
        import asyncio

        from ..transport import WakeTransport
        from .client import AsyncMachines

        deadline = asyncio.get_running_loop().time() + timeout_s
        async with AsyncMachines(config=self._config, transport=self._transport, pacer=self._pacer) as api:
            found = await api.list(
                region=self._region, metadata=self._metadata, timeout_s=max(0.001, min(LIST_S, timeout_s))
            )
            with self._lock:
                line = [each for each in candidates(found, self._strategy, group=self._group, last=self._last)
                        if each.id not in known]  # fmt: skip
                chosen = machines if self._strategy in ("next", "oldest") else len(line)
                if line and chosen:
                    self._last = line[: chosen or 1][-1].id
            if not line:
                raise NotWoken(f"{self._name}: {self._nothing(len(found), known)}")
            call = _Starting(api, self._transport or WakeTransport(), token, deadline, busy_counts=busy_counts)
            return await call.run(self._name, line, chosen)

    @property
    def _name(self) -> str:
        return f"api:{self.app}"

    def _nothing(self, found: int, known: frozenset[str]) -> str:
        asked = {"process group": self._group, "region": self._region, "metadata": self._metadata or None}
        filters = ", ".join(f"{name} {value}" for name, value in asked.items() if value)
        which = f" with {filters}" if filters else ""
        more = f" besides {', '.join(sorted(known))}" if known else ""
        return f"no machine{which} can be started{more}; the app has {found} there"


class _Starting:
    """One call: starts, asks, counts."""

    def __init__(
        self,
        api: "AsyncMachines",
        transport: "httpx.AsyncBaseTransport",
        token: str | None,
        deadline: float,
        *,
        busy_counts: bool,
    ) -> None:
        import asyncio

        self._api = api
        self._transport = transport
        self._token = token
        self._now = asyncio.get_running_loop().time
        self._began = self._now()
        self._deadline = deadline
        self._busy_counts = busy_counts
        self._seen: Counter[str] = Counter()
        self._woken: dict[str, WokenMachine] = {}
        self._counts: set[str] = set()
        self._started: set[str] = set()
        self._requests = 0
        self._why: dict[str, str] = {}  # machine → why it has not been confirmed, in the last words heard of it

    async def run(self, name: str, line: "list[Machine]", wanted: int) -> WakeReport:
        """Try machines of *line* until *wanted* count; a machine that refuses makes room for the next."""
        import asyncio

        waiting, rounds = list(line), 1
        trying: set[asyncio.Task[Machine | None]] = set()
        done: set[asyncio.Task[Machine | None]] = set()
        try:
            while len(self._counts) < wanted:
                while waiting and len(trying) < min(wanted - len(self._counts), AT_ONCE):
                    trying.add(asyncio.create_task(self._try(waiting.pop(0), others=bool(waiting))))
                if not trying:
                    break
                done, trying = await asyncio.wait(trying, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    refused = task.result()
                    if refused is not None:
                        waiting.append(refused)
                        rounds += 1
                if self._now() >= self._deadline:
                    break
        finally:
            for task in trying:
                task.cancel()
            await asyncio.gather(*trying, *done, return_exceptions=True)
        unconfirmed = tuple(sorted(self._started - self._woken.keys()))
        if unconfirmed:
            self._seen[UNCONFIRMED] += len(unconfirmed)
        if not self._woken:
            raise NotWoken(self._complaint(name, unconfirmed))
        return WakeReport(
            target=name,
            requested=wanted,
            machines=tuple(self._woken.values()),
            distinct=len(self._counts),
            rounds=rounds,
            requests=self._requests,
            elapsed_s=self._now() - self._began,
            seen=dict(self._seen),
            unconfirmed=unconfirmed,
        )

    async def _try(self, machine: "Machine", *, others: bool) -> "Machine | None":
        """Start it and ask it until it gives a receipt; the machine itself if another one should be tried first."""
        import asyncio

        up = machine.state in UP
        give_up_at = self._now() + CONFIRM_UP_S
        start_at, refused_at, gap_s = self._now(), float("inf"), ASK_GAP_S
        while (left_s := self._deadline - self._now()) > 0:
            if not up and self._now() >= start_at:
                refused = await self._start(machine, left_s)
                if refused is None:
                    up, refused_at, gap_s = True, float("inf"), ASK_GAP_S
                    give_up_at = self._now() + CONFIRM_S
                elif not refused:
                    return None
                else:
                    refused_at = min(refused_at, self._now())
                    start_at = self._now() + START_GAP_S * (0.75 + random.random() / 2)
            closed = await self._ask(machine)
            if machine.id in self._woken:
                return None
            if closed or self._now() >= give_up_at:
                up = False
            if others and self._now() - refused_at > REFUSED_S:
                return machine
            await asyncio.sleep(min(gap_s, max(0.0, self._deadline - self._now())))
            gap_s = min(ASK_GAP_MAX_S, gap_s * 1.5)
        return None

    async def _start(self, machine: "Machine", left_s: float) -> bool | None:
        """None: it is started. True: not now. False: never."""
        from .errors import MachineBusy, MachinesError, NoCapacity, NotFound, PlatformError, RateLimited

        try:
            await self._api.start(machine.id, repeat=False, timeout_s=max(0.001, min(left_s, LIST_S)))
        except (MachineBusy, RateLimited, NoCapacity) as error:
            self._note(machine, error)
            return True
        except NotFound as error:
            self._note(machine, error)
            return False
        except PlatformError as error:
            self._note(machine, error)
            return True
        except MachinesError:
            raise
        self._started.add(machine.id)
        return None

    def _note(self, machine: "Machine", error: Exception) -> None:
        said, status = getattr(error, "said", ""), getattr(error, "status", None)
        words = f"{status} {said}".strip() if status else str(error)
        # One kind of refusal is one line in the report, whichever machine it is about.
        self._seen[f"start: {words.replace(machine.id, '…')}"] += 1
        self._why[machine.id] = words

    async def _ask(self, machine: "Machine") -> bool:
        """Ask for a receipt; whether the machine said that its door is closed."""
        import asyncio

        import httpx

        headers = {"user-agent": "wake-on-request", "connection": "close", "accept": "*/*"}
        headers[protocol.VERSION] = protocol.WIRE_VERSION
        if self._token is not None:
            headers[protocol.AUTHORIZATION] = f"Bearer {self._token}"
        ask_s = max(0.001, min(ASK_S, self._deadline - self._now()))
        timeout = httpx.Timeout(ask_s, connect=min(CONNECT_S, ask_s), pool=None)
        request = httpx.Request("GET", address(machine), headers=headers, extensions={"timeout": timeout.as_dict()})
        self._requests += 1
        try:
            async with asyncio.timeout(ask_s):
                response = await self._transport.handle_async_request(request)
            try:
                return self._take(machine, response, await _quote(response) if response.status_code != 200 else "")
            finally:
                await response.aclose()
        except (httpx.HTTPError, TimeoutError) as error:
            said = str(error).lower() or "no answer in time"
            self._why[machine.id] = f"{request.url.netloc.decode()}: {said}"
            return False

    def _take(self, machine: "Machine", response: "httpx.Response", quote: str) -> bool:
        status, elapsed_s = response.status_code, self._now() - self._began
        receipt = protocol.receipt_from(response.headers) if status == 200 else None
        if receipt is not None and receipt.machine == machine.id:
            self._seen["200 with a receipt" + (", busy" if receipt.busy else "")] += 1
            cold = receipt.up_s <= elapsed_s
            self._woken[machine.id] = WokenMachine(receipt.machine, receipt.boot, cold, receipt.busy, elapsed_s)
            if self._busy_counts or cold or not receipt.busy:
                self._counts.add(machine.id)
            return False
        if status == 401 and not self._woken:
            has = "refused the token" if self._token is not None else "wants a token, and none was given"
            raise Unauthorized(
                f"machine {machine.id}: the worker answered 401: it {has}; set WAKER_TOKEN to one of its WORKER_TOKENS"
            )
        self._seen[f"{status} {response.headers.get(protocol.STATE) or 'without a receipt' + quote}"] += 1
        self._why[machine.id] = f"it answers {status}"
        return status == 503 and protocol.MACHINE in response.headers

    def _complaint(self, name: str, unconfirmed: Sequence[str]) -> str:
        seen = ", ".join(f"{text} ({times}×)" if times > 1 else text for text, times in self._seen.most_common(5))
        why = "; ".join(f"{machine}: {why}" for machine, why in list(self._why.items())[:3])
        hint = "; is this inside the private network, where machines' own addresses are?" if unconfirmed else ""
        return (
            f"{name}: nobody promised anything in {self._now() - self._began:.1f} s; saw: {seen or 'nothing'}"
            f"{f'; {why}' if why else ''}{hint}"
        )


def address(machine: "Machine") -> str:
    """Where a machine itself answers: its private address, and the port that its worker listens on. Pure."""
    ports = [service.get("internal_port") for service in machine.services]
    port = next((port for port in ports if isinstance(port, int)), None)
    if port is None:
        text = machine.env.get("WORKER_PORT", "")
        port = int(text) if text.isdigit() else DEFAULT_PORT
    host = f"[{machine.private_ip}]" if ":" in machine.private_ip else machine.private_ip
    return f"http://{host or 'no-private-address'}:{port}/"
