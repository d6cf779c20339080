"""A machine's private address: what 6PN is on the platform is an address of its own on loopback here.

On one host every machine has another port; whoever asks at the private address and the port of the machine's config
must find it all the same, but only while it runs.
"""

import asyncio
import contextlib

__all__ = ["PrivateAddress", "address_of"]

CHUNK = 65_536


def address_of(index: int) -> str:
    """The *index*th machine's, counted from 0: 127.101.0.1 and on."""
    number = index + 1
    return f"127.{101 + number // 65_536 % 100}.{number // 256 % 256}.{number % 256}"


class PrivateAddress:
    """Passes connections to address:port on to the machine's real port, byte by byte."""

    def __init__(self, address: str, port: int, real: tuple[str, int]) -> None:
        self._at = (address, port)
        self._real = real
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Begin; OSError if the port is somebody else's."""
        self._server = await asyncio.start_server(self._accepted, *self._at)

    def close(self) -> None:
        """End at once, with every connection."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            real_reader, real_writer = await asyncio.open_connection(*self._real)
        except OSError:
            writer.transport.abort()
            return
        try:
            await asyncio.gather(_copy(reader, real_writer), _copy(real_reader, writer))
        except asyncio.CancelledError:
            pass  # the machine has ended: nothing is told but the end of the connection
        finally:
            for each in (writer, real_writer):
                each.transport.abort() if not each.is_closing() else None


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(CHUNK):
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
