"""The proxy's public side: an HTTP/1.1 server on loopback."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from .message import Answer, Body, Request

__all__ = ["Front"]


class Front:
    """Accepts requests and hands them to *handle*."""

    def __init__(self, handle: Callable[[Request], Awaitable[Answer]], *, keep: int) -> None:
        self._handle = handle
        self._keep = keep
        # handler_cancellation: a caller that leaves frees its place at the machine.
        server = web.Server(self._serve, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=0.1)

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port."""
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, backlog=2048).start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        """Stop listening and break off what is in flight."""
        await self._runner.cleanup()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "CONNECT" or request.headers.get("upgrade"):
            what = request.headers.get("upgrade") or request.method
            return web.Response(status=501, text=f"not emulated: {what}\n")
        try:
            answer = await self._handle(self._as_request(request))
        except ConnectionError:  # a fault: there is no answer
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=500)  # nobody reads it
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        try:
            for name, value in answer.headers:
                response.headers.add(name, value)
            await response.prepare(request)
            async for chunk in answer.body:
                await response.write(chunk)
            await response.write_eof()
        except ConnectionError:
            # The machine or a fault broke the answer off, or the caller left: it must not look like a complete one.
            if request.transport is not None:
                request.transport.abort()
        finally:
            await answer.aclose()
        return response

    def _as_request(self, request: web.BaseRequest) -> Request:
        headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in request.raw_headers)
        body = Body(request.content.readany, keep=self._keep) if request.can_read_body else Body()
        return Request(request.method, request.raw_path, headers, body, request.remote or "127.0.0.1")
