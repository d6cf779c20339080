"""A request and an answer on their way through the proxy; nothing here knows sockets."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field

__all__ = ["Answer", "Body", "Headers", "Reply", "Request", "TooLargeToReplayError", "header", "without"]

Headers = tuple[tuple[str, str], ...]

# RFC 9110 7.6.1: they belong to one connection and are not forwarded.
HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)


class TooLargeToReplayError(Exception):
    """The request is to be sent again, and more of it has gone by than the proxy keeps."""


def header(headers: Headers, name: str) -> str | None:
    """The first value of *name* (lower case)."""
    return next((value for key, value in headers if key.lower() == name), None)


def without(headers: Headers, names: Iterable[str]) -> Headers:
    """*headers* without those named (lower case)."""
    dropped = frozenset(names)
    return tuple((key, value) for key, value in headers if key.lower() not in dropped)


class Body:
    """A request's body: streamed, and kept up to *keep* bytes so that it can be sent again.

    *read* returns the next piece, b"" at the end; a cancelled read loses nothing.
    """

    def __init__(self, read: Callable[[], Awaitable[bytes]] | None = None, *, keep: int = 0) -> None:
        self._read = read
        self._kept: list[bytes] = []
        self._room = keep
        self.empty = read is None

    async def stream(self) -> AsyncIterator[bytes]:
        """The whole body from its beginning; raise TooLargeToReplayError if that is gone."""
        if self._room < 0:
            raise TooLargeToReplayError
        for chunk in tuple(self._kept):
            yield chunk
        while self._read is not None:
            chunk = await self._read()
            if not chunk:
                self._read = None
                return
            self._room -= len(chunk)
            if self._room >= 0:
                self._kept.append(chunk)
            else:
                self._kept.clear()
            yield chunk


@dataclass(frozen=True, slots=True)
class Request:
    """What came in at the edge."""

    method: str
    target: str  # path and query, as they were sent
    headers: Headers = ()
    body: Body = field(default_factory=Body)
    client: str = "127.0.0.1"

    def header(self, name: str) -> str | None:
        """The first value of header *name* (lower case)."""
        return header(self.headers, name)


@dataclass(slots=True)
class Answer:
    """What goes out: a head, a body to be streamed, and what must be done when it is over (`aclose`)."""

    status: int
    headers: Headers
    body: AsyncGenerator[bytes, None]
    reason: str | None = None
    on_close: list[Callable[[], Awaitable[None] | None]] = field(default_factory=list)

    def header(self, name: str) -> str | None:
        """The first value of header *name* (lower case)."""
        return header(self.headers, name)

    async def aclose(self) -> None:
        """Give everything back; harmless when called again."""
        while self.on_close:
            pending = self.on_close.pop()()
            if pending is not None:
                await pending


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that was read to its end."""

    status: int
    headers: Headers
    body: bytes

    def header(self, name: str) -> str | None:
        """The first value of header *name* (lower case)."""
        return header(self.headers, name)
