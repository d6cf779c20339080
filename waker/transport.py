"""An httpx transport for wakes: one connection per request, no pool, no TLS context, a bounded answer.

httpx's pool is scanned for every queued request, and the point of a fan-out is that nothing is queued.
"""

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator

import h11
import httpx

__all__ = ["WakeTransport"]

# Bounds on an answer: a receipt is a few hundred bytes, and a stranger's page is of no interest.
MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 64 * 1024

# A name's addresses are looked up once for all the wakes of a round, and again a little later: Flycast addresses stay.
RESOLVED_S = 5.0

# Where a request keeps its head in h11's form.
_HEAD = "waker.head"

Address = tuple[socket.AddressFamily, str]


class WakeTransport(httpx.AsyncBaseTransport):
    """Send each request over a connection of its own, and close it after the answer. Plain http alone."""

    def __init__(self) -> None:
        self._resolved: dict[str, tuple[float, asyncio.Future[list[Address]]]] = {}  # guarded by the event loop

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Connect, send, and return the answer as soon as its head is complete."""
        timeouts = request.extensions.get("timeout", {})
        url = request.url
        if url.scheme != "http":
            raise httpx.UnsupportedProtocol(f"cannot send {url.scheme}:// without TLS", request=request)
        exchange = await self._connect(url.host, url.port or 80, timeouts.get("connect"), request)
        try:
            exchange.send(request)
            try:
                async with asyncio.timeout(timeouts.get("read")):
                    head = await exchange.head
            except TimeoutError:
                raise httpx.ReadTimeout("no answer in time", request=request) from None
        except BaseException:
            exchange.close()
            raise
        return httpx.Response(head.status_code, headers=head.headers.raw_items(), stream=exchange)

    async def _connect(self, host: str, port: int, timeout_s: float | None, request: httpx.Request) -> "_Exchange":
        loop = asyncio.get_running_loop()
        error: OSError | None = None
        try:
            async with asyncio.timeout(timeout_s):
                for family, address in await self._resolve(host):
                    try:
                        _, exchange = await loop.create_connection(_Exchange, address, port, family=family)
                        return exchange
                    except OSError as failed:
                        error = failed
        except TimeoutError:
            raise httpx.ConnectTimeout("no connection in time", request=request) from None
        except socket.gaierror as failed:
            raise httpx.ConnectError(
                f"the name {host!r} has no address: {failed.strerror}", request=request
            ) from failed
        if error is None:
            raise httpx.ConnectError(f"the name {host!r} has no address", request=request)
        raise httpx.ConnectError(os.strerror(error.errno) if error.errno else str(error), request=request) from error

    async def _resolve(self, host: str) -> list[Address]:
        if ":" in host:
            return [(socket.AF_INET6, host)]
        if host.replace(".", "").isdigit():
            return [(socket.AF_INET, host)]
        loop = asyncio.get_running_loop()
        until, future = self._resolved.get(host, (0.0, None))
        if future is None or (future.done() and (loop.time() > until or future.exception() is not None)):
            future = _look_up(loop, host)
            self._resolved[host] = (loop.time() + RESOLVED_S, future)
        # Many wait for one look-up: one that gives up must not take it from the others.
        return await asyncio.shield(future)


def _look_up(loop: asyncio.AbstractEventLoop, host: str) -> "asyncio.Future[list[Address]]":
    future: asyncio.Future[list[Address]] = loop.create_future()
    # Nobody may be left to fetch an error: then it is not an event.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def look() -> list[Address] | OSError:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            return error
        except UnicodeError:
            return socket.gaierror(socket.EAI_NONAME, "not a host name")
        return [(family, str(sockaddr[0])) for family, _, _, _, sockaddr in found]

    def settle(result: list[Address] | OSError) -> None:
        if future.done():
            return
        if isinstance(result, OSError):
            future.set_exception(result)
        else:
            future.set_result(result)

    def run() -> None:
        result = look()
        try:
            loop.call_soon_threadsafe(settle, result)
        except RuntimeError:
            pass  # the loop was closed: nobody waits any more

    try:
        # A daemon of our own, not the loop's executor: a look-up that hangs must not hold up the end of the process.
        threading.Thread(target=run, name="wake-resolve", daemon=True).start()
    except RuntimeError:
        # No thread can start any more (the interpreter is ending): look up here, there is nothing else left to run.
        settle(look())
    return future


class _Exchange(asyncio.Protocol, httpx.AsyncByteStream):
    """One connection: a request out, an answer's head in, and its body for those who read it."""

    def __init__(self) -> None:
        self._wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._body = bytearray()
        self._more: asyncio.Future[None] | None = None  # somebody waits for the rest of the body
        self._ended = False
        self.head: asyncio.Future[h11.Response] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream socket has no other
        self._transport = transport

    def send(self, request: httpx.Request) -> None:
        """Write the whole request; it has no body worth a wait."""
        if self._transport is None or self._transport.is_closing():
            raise httpx.WriteError("the connection was closed before the request was sent", request=request)
        head = request.extensions.get(_HEAD)
        if head is None:
            # Checked once for all the wakes that share this request.
            head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
            request.extensions[_HEAD] = head
        self._transport.write((self._wire.send(head) or b"") + (self._wire.send(h11.EndOfMessage()) or b""))

    def data_received(self, data: bytes) -> None:
        self._wire.receive_data(data)
        self._read()

    def eof_received(self) -> None:
        if self._wire.their_state is h11.SEND_RESPONSE and not self._wire.trailing_data[0]:
            return  # nothing came: connection_lost says so
        self._wire.receive_data(b"")
        self._read()

    def connection_lost(self, error: Exception | None) -> None:
        reason = "reset" if isinstance(error, ConnectionResetError) else "closed"
        self._fail(httpx.RemoteProtocolError(f"the connection was {reason} without an answer"))

    def _read(self) -> None:
        try:
            while not self._ended:
                event = self._wire.next_event()
                if isinstance(event, h11.Response):
                    if not self.head.done():
                        self.head.set_result(event)
                elif isinstance(event, h11.Data):
                    self._body += event.data[: MAX_BODY_BYTES - len(self._body)]
                    if len(self._body) >= MAX_BODY_BYTES:
                        self._end()
                elif isinstance(event, h11.InformationalResponse):
                    continue
                elif event is h11.NEED_DATA:
                    return
                else:
                    self._end()
        except h11.RemoteProtocolError as error:
            self._fail(httpx.RemoteProtocolError(f"not an HTTP answer: {error}"))

    def _fail(self, error: httpx.RemoteProtocolError) -> None:
        if not self.head.done():
            self.head.set_exception(error)
            self.head.exception()  # seen: a caller who gave up does not fetch it
        self._end()

    def _end(self) -> None:
        """The answer is complete, or as much of it as we take."""
        self._ended = True
        if self._more is not None and not self._more.done():
            self._more.set_result(None)
        self.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if not self._ended:
            self._more = self._loop.create_future()
            await self._more
        yield bytes(self._body)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    async def aclose(self) -> None:
        self.close()
