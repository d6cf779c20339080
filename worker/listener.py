"""The listener: answers any request, owns the door, and is the only one who promises anything.

It runs in a process of its own, so that a wake is answered while the user's library is busy. What it knows of the
drainer comes over the doorway; `worker/doorway.py` has the other end of that line and describes the words.
"""

import asyncio
import hmac
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Coroutine
from typing import Any, NoReturn

from aiohttp import hdrs, web

from waker import protocol

from .baton import EXIT_JOBS_LEFT
from .config import Config
from .door import LEFT, OPEN, SHUT, Door, Token
from .log import log
from .sockets import let_signals_in

__all__ = ["Listener", "listen"]

# A connection that has not sent its request yet counts as a wake on its way for so long after it was accepted,
ARRIVING_S = 0.5
# and a leave is put off for such connections at most so long in total.
ARRIVING_TOTAL_S = 2.0
# The drainer asks again after so long when its leave was put off.
ASK_AGAIN_S = 0.05
# A request's headers have to be complete by then; half-open connections cost memory.
HEADERS_S = 10.0
MAX_CONNECTIONS = 2048
# Released answers have so long to reach the kernel before the drainer may go.
FLUSH_S = 0.5
# Retry-After of a refusal: the machine is gone, or open again, in about this time.
RETRY_AFTER_S = "1"

# Nothing below it rings: a typing error in a scraper's path must not keep a machine up.
_RESERVED = "_worker"
_STATUS, _METRICS, _HEALTH = "/_worker/status", "/_worker/metrics", "/_worker/health"


class Drainer:
    """What the listener knows of the drainer attached to it."""

    def __init__(self, pid: int, writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self.writer = writer
        self.running = 0
        self.slots = 1
        self.done = 0
        self.failed = 0
        self.phase = "starting"
        self.left = False
        self.reported = asyncio.Event()  # set by each report; whoever waits for a fresh one clears it first

    @property
    def busy(self) -> bool:
        return self.running >= self.slots > 0

    def send(self, line: str) -> None:
        self.writer.write(line.encode() + b"\n")


class Listener:
    """Door, HTTP server and doorway server of one run of the listener. Everything happens on one event loop."""

    def __init__(self, config: Config, *, bound_at: float, boot: str, under_parent: bool) -> None:
        self.config = config
        self.bound_at = bound_at  # CLOCK_MONOTONIC, the same for all processes of the machine
        self.under_parent = under_parent
        self.door = Door(boot, _read_mark(config.mark))
        self.drainer: Drainer | None = None
        self.attached = asyncio.Event()
        self.released = asyncio.Event()  # held answers go out: the drainer leaves, or the door was shut
        self.over = asyncio.Event()
        self.exit_code = 0
        self.connections: set[Connection] = set()
        self.handling = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.leaving = False  # a leave was tried: answers carry Connection: close from then on
        self.put_off_until: float | None = None
        self.depth = 0  # how often the baton had been passed when it reached us
        self.stopping = False
        self.refused = dict.fromkeys(("closed", "excepted", "no-drainer", "token"), 0)
        self.answered = 0
        self.started_at = time.monotonic()
        self.public: socket.socket | None = None
        self._wedge_watch: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self._lines: set[asyncio.StreamWriter] = set()
        if self.door.state != OPEN:
            self.released.set()

    # -- the public side ---------------------------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request: a reserved path, or a wake."""
        self.handling += 1
        self.idle.clear()
        try:
            response = await self._answer(request)
            response.headers[protocol.VERSION] = protocol.WIRE_VERSION
            response.headers[protocol.MACHINE] = self.config.machine
            if self.leaving or self.door.state != OPEN:
                response.force_close()
            try:
                await response.prepare(request)
                await response.write_eof()
            except ConnectionError:
                pass  # the caller left while we held its answer; its wake counts all the same
            return response
        finally:
            self.handling -= 1
            if not self.handling:
                self.idle.set()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if not self._authorized(request):
            self.refused["token"] += 1
            return web.Response(status=401, text="this worker wants a token: Authorization: Bearer …\n",
                                headers={hdrs.WWW_AUTHENTICATE: "Bearer"})  # fmt: skip
        path = "/" + request.rel_url.raw_path.strip("/")
        if path == _STATUS:
            return web.json_response(self._status())
        if path == _METRICS:
            return web.Response(text=self._metrics(), content_type="text/plain")
        if path == _HEALTH:
            healthy = self.drainer is not None
            return web.Response(status=200 if healthy else 503, text="ready\n" if healthy else "no drainer yet\n")
        if path.split("/")[1] == _RESERVED:
            return web.Response(status=404, text=f"there are {_STATUS}, {_METRICS} and {_HEALTH}; this did not wake\n")
        return await self._wake(request)

    def _authorized(self, request: web.BaseRequest) -> bool:
        if not self.config.tokens:
            return True
        scheme, _, given = request.headers.get(protocol.AUTHORIZATION, "").partition(" ")
        presented = given.strip().encode("utf-8", "surrogateescape")
        # Every token is compared, so that the time tells nothing about which one was close.
        matches = [hmac.compare_digest(presented, token.encode()) for token in self.config.tokens]
        return scheme.lower() == "bearer" and any(matches)

    async def _wake(self, request: web.BaseRequest) -> web.StreamResponse:
        asked = _number(request.headers.get(protocol.HOLD), protocol.MAX_HOLD_S)
        if request.headers.get(protocol.EXCEPT) == self.config.machine:
            # We are the one who passes the baton. Held, so that the proxy sees us occupied and tries somebody else.
            await self._until(min(asked, self.config.hold_s), self.over)
            return self._refusal(request, "excepted")
        ring = self.door.ring()
        if ring is None:
            return self._refusal(request, "closed")
        arrived = time.monotonic()
        self.depth = int(_number(request.headers.get(protocol.DEPTH), protocol.MAX_BATON_DEPTH))
        if self.drainer is not None:
            self.drainer.reported.clear()
            self.drainer.send(f"!ring {ring}")
        self._watch_for_wedge()
        if not self.attached.is_set() and not await self._ready():
            return self._refusal(request, "no-drainer")
        drainer = self.drainer
        state = drainer.phase if drainer else "working"
        busy = await self._held(drainer, arrived, min(asked, self.config.hold_s))
        if drainer is not self.drainer and self.door.state == SHUT:
            # The drainer went without leaving while we held this answer: nobody is there to keep a promise.
            return self._refusal(request, "no-drainer")
        self.answered += 1
        up_s = time.monotonic() - self.bound_at
        log("wake.accepted", ring=ring, state=state, busy=busy, held_s=round(time.monotonic() - arrived, 3))
        return web.Response(
            text=f"awake: machine {self.config.machine}, ring {ring}, {state}{', busy' if busy else ''}\n",
            headers={
                protocol.BOOT: self.door.boot,
                protocol.RING: str(ring),
                protocol.STATE: state,
                protocol.BUSY: "yes" if busy else "no",
                protocol.UP: f"{up_s:.3f}",
            },
        )

    async def _ready(self) -> bool:
        """Wait for the first drainer: user code is imported and somebody will read the queue."""
        await self._until(self.started_at + self.config.boot_s - time.monotonic(), self.attached, self.released)
        return self.attached.is_set()

    async def _held(self, drainer: Drainer | None, arrived: float, asked_s: float) -> bool:
        """Hold an answer as long as it should be; True if every slot of the machine is taken."""
        limit = arrived + self.config.hold_s
        if drainer is not None and self.config.hold_s > 0:
            # No report within the hold means that user code does not let the drainer speak: that is busy, too.
            await self._until(limit - time.monotonic(), drainer.reported, self.released)
            busy = drainer.busy or not (drainer.reported.is_set() or self.released.is_set())
        else:
            busy = drainer is not None and drainer.busy
        until = limit if busy else arrived + asked_s
        await self._until(until - time.monotonic(), self.released)
        return busy

    @staticmethod
    async def _until(seconds: float, *events: asyncio.Event) -> None:
        """Wait for the first of *events*, so many seconds at most."""
        if seconds <= 0 or any(event.is_set() for event in events):
            return
        waiters = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waiters, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in waiters:
                waiter.cancel()

    def _refusal(self, request: web.BaseRequest, why: str) -> web.StreamResponse:
        self.refused[why] += 1
        headers = {protocol.RETRY_AFTER: RETRY_AFTER_S, protocol.STATE: self.door.state if why == "closed" else why}
        if self.config.replay and "fly-replay-src" not in request.headers:
            headers["fly-replay"] = "elsewhere=true;timeout=10s;fallback=force_self"
        return web.Response(status=503, text=f"not this machine now ({why}): ask again\n", headers=headers)

    def _status(self) -> dict[str, object]:
        drainer = self.drainer
        return {
            "machine": self.config.machine,
            "app": self.config.app,
            "boot": self.door.boot,
            "door": self.door.state,
            "rung": self.door.rung,
            "looked": self.door.looked,
            "drainer": None if drainer is None else {
                "pid": drainer.pid, "phase": drainer.phase, "running": drainer.running, "slots": drainer.slots,
                "done": drainer.done, "failed": drainer.failed,
            },
            "answered": self.answered,
            "refused": dict(self.refused),
            "connections": len(self.connections),
            "up_s": round(time.monotonic() - self.bound_at, 3),
        }  # fmt: skip

    def _metrics(self) -> str:
        drainer = self.drainer
        rows = [
            ("rings_total", "counter", "Wakes accepted since this listener started.", self.door.rung),
            ("answers_total", "counter", "Wakes answered 200.", self.answered),
            ("door_open", "gauge", "1 while a wake is accepted.", int(self.door.state == OPEN)),
            ("drainer_attached", "gauge", "1 while a drainer is ready.", int(drainer is not None)),
            ("jobs_running", "gauge", "Jobs running in this machine.", drainer.running if drainer else 0),
            ("jobs_done_total", "counter", "Jobs run by this drainer.", drainer.done if drainer else 0),
            ("jobs_failed_total", "counter", "Jobs that failed in this drainer.", drainer.failed if drainer else 0),
            ("up_seconds", "gauge", "Seconds since the port was bound.", round(time.monotonic() - self.bound_at, 3)),
        ]
        lines = []
        for name, kind, text, value in rows:
            lines += [f"# HELP worker_{name} {text}", f"# TYPE worker_{name} {kind}", f"worker_{name} {value}"]
        lines += ["# HELP worker_refusals_total Wakes not accepted.", "# TYPE worker_refusals_total counter"]
        lines += [f'worker_refusals_total{{reason="{why}"}} {count}' for why, count in self.refused.items()]
        return "\n".join(lines) + "\n"

    # -- the drainer's side ------------------------------------------------------------------------------------------

    async def serve_drainer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the doorway, for its whole life."""
        pid = _peer_pid(writer)
        drainer: Drainer | None = None
        self._lines.add(writer)
        try:
            while line := await reader.readline():
                verb, *words = line.decode("ascii", "replace").split()
                if verb == "attach":
                    if self.drainer is not None:
                        writer.write(b"refused another drainer is attached\n")
                        break
                    drainer = self.drainer = Drainer(pid, writer)
                    self.attached.set()
                    drainer.send("attached")
                    log("drainer.attached", pid=pid)
                    if self.stopping:
                        drainer.send("!stop")
                elif drainer is None:
                    writer.write(b"refused attach first\n")
                    break
                else:
                    await self._said(drainer, verb, words)
        except (OSError, ValueError) as error:
            log("doorway.broken", error=repr(str(error)))
        finally:
            self._lines.discard(writer)
            writer.close()
            if drainer is not None and drainer is self.drainer:
                self._drainer_ended(drainer)

    async def _said(self, drainer: Drainer, verb: str, words: list[str]) -> None:
        if verb == "look":
            if self.door.state == LEFT:
                _remove_mark(self.config.mark)
            token = self.door.look()
            drainer.left = False
            if self.door.state == OPEN:
                self.released.clear()
            drainer.send(f"token {token.boot} {token.rung}")
        elif verb == "leave":
            await self._leave(drainer, Token(words[0], int(words[1])))
        elif verb == "shut":
            self.shut("the drainer was told to stop")
            drainer.send(f"shut {self.depth}")
        elif verb == "state":
            drainer.running, drainer.slots, drainer.done, drainer.failed = (int(word) for word in words[:4])
            drainer.phase = words[4]
            drainer.reported.set()
        else:
            raise ValueError(f"unknown word on the doorway: {verb}")

    async def _leave(self, drainer: Drainer, token: Token) -> None:
        if self.door.state == OPEN:
            put_off = self._reason_to_stay()
            if put_off is not None:
                seconds, why = put_off
                drainer.send(f"wait {seconds:.3f} {why}")
                return
        self.leaving = True
        if not self.door.leave(token):
            drainer.send("rung")
            return
        try:
            # Before it is acknowledged: a listener that is started after us must not open a new door.
            _write_mark(self.config.mark, self.door.state)
        except OSError as error:
            self.door.look()
            log("door.not_closed", error=repr(str(error)))
            drainer.send("wait 1 mark")
            return
        self.released.set()
        await self._until(FLUSH_S, self.idle)
        drainer.left = True
        drainer.send("left")
        self._later(self._kill_unless_gone(drainer))

    def _reason_to_stay(self) -> tuple[float, str] | None:
        """Why a leave is put off, and for how many seconds: who woke us is on the way, or at the door."""
        now = time.monotonic()
        greet_left = self.bound_at + self.config.greet_s - now
        if self.door.rung == 0 and greet_left > 0:
            return greet_left, "greet"
        arriving = any(c.arriving(now) for c in self.connections) or _readable(self.public)
        if not arriving:
            self.put_off_until = None
            return None
        if self.put_off_until is None:
            self.put_off_until = now + ARRIVING_TOTAL_S
        self.leaving = True
        return (ASK_AGAIN_S, "arriving") if now < self.put_off_until else None

    def shut(self, why: str) -> None:
        """Close the door for good; what is held was promised by rings that count, and is answered now."""
        if self.door.state == SHUT:
            return
        was_open = self.door.state == OPEN
        self.door.shut()
        try:
            _write_mark(self.config.mark, SHUT, self.depth)
        except OSError as error:
            log("door.mark_failed", error=repr(str(error)))
        self.leaving = True
        self.released.set()
        if was_open:
            log("door.shut", why=repr(why))

    def _drainer_ended(self, drainer: Drainer) -> None:
        self.drainer = None
        if not drainer.left:
            self.shut("the drainer is gone without leaving")
        log("drainer.detached", pid=drainer.pid, left=drainer.left)
        if self.stopping or not self.under_parent:
            self.exit_code = 0 if drainer.left or self.stopping else EXIT_JOBS_LEFT
            self._later(self._end())

    async def _end(self) -> None:
        await self._until(FLUSH_S, self.idle)
        self.over.set()

    def stop(self) -> None:
        """A stop signal: no more wakes; refuse until the drainer has gone, then leave."""
        if self.stopping:
            return
        self.stopping = True
        self.shut("told to stop")
        if self.drainer is not None:
            self.drainer.send("!stop")
        elif self.attached.is_set():
            self._later(self._end())
            return
        # One that has not attached yet may still come, and needs a door to leave by.
        self._later(self._give_up())

    def machine_ended(self) -> None:
        """The parent closed our stdin, or is gone: the drainer has ended."""
        asyncio.get_running_loop().remove_reader(0)
        self.shut("the drainer has ended")
        # From here on a connect is refused, and the proxy tries another machine; a reset might cost somebody's wake.
        if self.public is not None and self.public.fileno() >= 0:
            self.public.shutdown(socket.SHUT_RDWR)
        for server in self._servers:
            server.close()
        self._later(self._end())

    async def _give_up(self) -> None:
        await asyncio.sleep(self.config.stop_timeout_s)
        self.over.set()

    # -- beginning and end -------------------------------------------------------------------------------------------

    async def open(self, public: socket.socket, doorway: socket.socket) -> None:
        """Serve both sockets, and hear stop signals."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stop)
        let_signals_in()
        if self.under_parent:
            loop.add_reader(0, self.machine_ended)
        else:
            self._later(self._leave_without_drainer())
        self.public = public
        self._servers.append(await loop.create_server(_Server(self), sock=public, backlog=1024))
        # What already waits at the public door is let in first, so that it counts before the drainer's first look.
        await asyncio.sleep(0.01)
        self._servers.append(await asyncio.start_unix_server(self.serve_drainer, sock=doorway))
        log("listener.ready", port=self.config.port, boot=self.door.boot, door=self.door.state)

    async def close(self) -> None:
        """Give everything back, for those who go on living in this process; a listener just exits."""
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            if connection.transport is not None:
                connection.transport.abort()
        for writer in self._lines:
            writer.close()
        if self._wedge_watch is not None:
            self._tasks.add(self._wedge_watch)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._until(FLUSH_S, self.idle)

    async def _leave_without_drainer(self) -> None:
        """In the form without a parent nobody else notices that the drainer never came."""
        await asyncio.sleep(self.config.boot_s)
        if not self.attached.is_set():
            log("listener.left", why=f"'no drainer within {self.config.boot_s:g} s'")
            self.exit_code = EXIT_JOBS_LEFT
            self.shut("no drainer came")
            self.over.set()

    # -- watching a drainer that hangs -------------------------------------------------------------------------------

    def _watch_for_wedge(self) -> None:
        if self._wedge_watch is None or self._wedge_watch.done():
            self._wedge_watch = asyncio.ensure_future(self._until_looked())

    async def _until_looked(self) -> None:
        """While somebody rang and nobody looked: a drainer without a job and without a sign of life is killed."""
        seen: tuple[object, ...] = ()
        alive_at = time.monotonic()
        while self.door.rung > self.door.looked and self.door.state == OPEN:
            await asyncio.sleep(self.config.wedge_s / 6)
            drainer = self.drainer
            if drainer is None:
                alive_at = time.monotonic()
                continue
            drainer.send("!ask")
            now_seen = (self.door.looked, drainer.done, drainer.phase)
            if drainer.running or now_seen != seen:
                alive_at, seen = time.monotonic(), now_seen
            elif time.monotonic() - alive_at >= self.config.wedge_s:
                self._kill(drainer, f"rung, but showed no sign of life for {self.config.wedge_s:g} s")
                return

    async def _kill_unless_gone(self, drainer: Drainer) -> None:
        await asyncio.sleep(self.config.exit_s)
        if self.drainer is drainer and drainer.left:
            self._kill(drainer, f"had left, but was still there after {self.config.exit_s:g} s")

    def _kill(self, drainer: Drainer, why: str) -> None:
        log("drainer.killed", pid=drainer.pid, why=repr(why))
        try:
            _write_mark(self.config.mark, "wedged")
            os.kill(drainer.pid, signal.SIGKILL)
        except OSError as error:
            log("drainer.kill_failed", pid=drainer.pid, error=repr(str(error)))

    def _later(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Connection(web.RequestHandler):
    """aiohttp's connection, which also knows whether it still owes us its first request."""

    __slots__ = ("_accepted_at", "_listener", "_patience")

    def __init__(self, server: web.Server, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        no_log: Any = None  # aiohttp writes none then, though its types want a logger
        super().__init__(server, loop=loop, access_log=no_log, keepalive_timeout=30.0, lingering_time=0.5)
        self._listener = listener
        self._accepted_at: float | None = None  # None once a request has come
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self._listener.connections) >= MAX_CONNECTIONS:
            transport.abort()  # type: ignore[attr-defined]  # every stream transport can
            return
        self._accepted_at = time.monotonic()
        self._listener.connections.add(self)
        self._patience = self._loop.call_later(HEADERS_S, self._too_slow)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._listener.connections.discard(self)
        self.request_came()
        super().connection_lost(exc)

    def arriving(self, now: float) -> bool:
        """Accepted a moment ago, and its request is not here yet."""
        return self._accepted_at is not None and now - self._accepted_at < ARRIVING_S

    def request_came(self) -> None:
        self._accepted_at = None
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _too_slow(self) -> None:
        self._patience = None
        if self.transport is not None:
            self.transport.abort()


class _Server(web.Server):
    def __init__(self, listener: Listener) -> None:
        super().__init__(self._handle)
        self._listener = listener

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        if isinstance(connection, Connection):
            connection.request_came()
        return await self._listener.handle(request)

    def __call__(self) -> Connection:
        return Connection(self, self._listener, asyncio.get_running_loop())


def listen(
    config: Config, public: socket.socket, doorway: socket.socket, *, bound_at: float, under_parent: bool
) -> NoReturn:
    """Serve until the drainer has left, or a stop signal; ends the process."""

    async def main() -> NoReturn:
        listener = Listener(config, bound_at=bound_at, boot=os.urandom(6).hex(), under_parent=under_parent)
        await listener.open(public, doorway)
        await listener.over.wait()
        # Taking the loop and its connections apart would cost the machine's last milliseconds.
        sys.stderr.flush()
        os._exit(listener.exit_code)

    asyncio.run(main())


def _read_mark(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            state = (file.read().split() or [SHUT])[0]
    except FileNotFoundError:
        return OPEN
    return LEFT if state == LEFT else SHUT


def _write_mark(path: str, state: str, depth: int = 0) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(f"{state} {depth}\n")


def _remove_mark(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _readable(sock: socket.socket | None) -> bool:
    """Does the accept queue hold a connection? poll() sees it before accept() does."""
    if sock is None or sock.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _peer_pid(writer: asyncio.StreamWriter) -> int:
    raw = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[0])


def _number(text: str | None, most: float) -> float:
    """A header's number between 0 and *most*; 0 for anything that is none."""
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return min(max(value, 0.0), most) if value == value else 0.0
