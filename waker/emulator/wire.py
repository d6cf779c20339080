"""HTTP/1.1 from the proxy to a machine: one connection, one request at a time."""

import asyncio
from collections.abc import AsyncGenerator

import h11

from .message import HOP_BY_HOP, Answer, Request, TooLargeToReplayError, without

__all__ = ["HttpConnection"]

READ_SIZE = 65_536
MAX_HEAD = 65_536


class HttpConnection:
    """A TCP connection to a machine's port."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        self._upload: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, host: str, port: int) -> "HttpConnection":
        """Connect; raise OSError as the kernel says it."""
        return cls(*await asyncio.open_connection(host, port))

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent on it, as far as we know."""
        return self._h11.our_state is h11.IDLE and not self._reader.at_eof() and not self._writer.is_closing()

    async def send(self, request: Request) -> Answer:
        """Send *request*; return its answer as soon as the head is there, with the body still to be streamed.

        Raise ConnectionError if the machine breaks off or does not speak HTTP; ConnectionAbortedError if the request
        cannot be sent as it is.
        """
        # Beside: a machine may answer before it has read everything, and one that does not read must not block us.
        upload = self._upload = asyncio.create_task(self._send(request))
        upload.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            while not isinstance(event := await self._event(), h11.Response):
                if not isinstance(event, h11.InformationalResponse):
                    raise ConnectionResetError("the machine closed the connection before it answered")
        except BaseException as error:
            self.close()
            if isinstance(error, ConnectionError) and upload.done() and not upload.cancelled():
                failure = upload.exception()
                if failure is not None and not isinstance(failure, ConnectionResetError | BrokenPipeError):
                    raise failure from error
            raise
        headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers.raw_items())
        reason = bytes(event.reason).decode("latin-1")
        return Answer(event.status_code, without(headers, HOP_BY_HOP), self._receive(upload), reason)

    async def _send(self, request: Request) -> None:
        headers = without(request.headers, {*HOP_BY_HOP, "expect"})
        if not request.body.empty and request.header("content-length") is None:
            headers = (*headers, ("transfer-encoding", "chunked"))
        try:
            head = h11.Request(method=request.method, target=request.target, headers=list(headers))
            self._writer.write(self._h11.send(head) or b"")
            async for chunk in request.body.stream():
                self._writer.write(self._h11.send(h11.Data(data=chunk)) or b"")
                await self._writer.drain()
            self._writer.write(self._h11.send(h11.EndOfMessage()) or b"")
            await self._writer.drain()
        except h11.LocalProtocolError as error:
            self._writer.close()
            raise ConnectionAbortedError(f"cannot send this request: {error}") from error
        except (TooLargeToReplayError, ConnectionError):
            self._writer.close()
            raise
        except Exception as error:
            self._writer.close()
            raise ConnectionAbortedError(f"cannot read this request to its end: {error}") from error

    async def _receive(self, upload: "asyncio.Task[None]") -> AsyncGenerator[bytes, None]:
        try:
            while not isinstance(event := await self._event(), h11.EndOfMessage):
                if not isinstance(event, h11.Data):
                    raise ConnectionResetError("the machine broke off its answer")
                yield bytes(event.data)
            # Answered before the request was sent to its end: the rest is not sent, the connection not used again.
            if upload.done() and self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
                self._h11.start_next_cycle()
        finally:
            if self._h11.our_state is not h11.IDLE:
                self.close()

    async def _event(self) -> object:
        try:
            while (event := self._h11.next_event()) is h11.NEED_DATA:
                self._h11.receive_data(await self._reader.read(READ_SIZE))
        except h11.RemoteProtocolError as error:
            raise ConnectionResetError(f"the machine does not answer in HTTP: {error}") from error
        return event

    def close(self) -> None:
        """End it at once."""
        if self._upload is not None:
            self._upload.cancel()
        self._writer.close()
