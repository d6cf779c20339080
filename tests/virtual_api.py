"""The Machines API's client on the emulator's virtual clock: no sockets, no real time."""

import random

import httpx

from waker.emulator import Knobs, Platform, run_virtual
from waker.machines import AsyncMachines
from waker.machines.client import Pacer

__all__ = ["Wire", "on_platform"]


class Wire(httpx.AsyncBaseTransport):
    """Carries requests to the platform that runs in this very process."""

    def __init__(self, platform):
        self._platform = platform
        self.sent = []  # (virtual time, method, path)
        self.instead = None  # answers in the platform's place, if it returns something

    async def handle_async_request(self, request):
        self.sent.append((self._platform.now, request.method, request.url.path))
        if self.instead is not None and (answer := self.instead(request)) is not None:
            return answer
        body = await request.aread()
        headers = {name: value for name, value in request.headers.items() if name != "content-length"}
        try:
            reply = await self._platform.fetch(request.method, str(request.url), headers=headers, body=body)
        except ConnectionRefusedError as error:
            raise httpx.ConnectError(str(error), request=request) from error
        except ConnectionError as error:
            raise httpx.RemoteProtocolError(str(error) or "reset", request=request) from error
        return httpx.Response(reply.status, headers=[*reply.headers], stream=httpx.ByteStream(reply.body))


def on_platform(story, program=None, *, knobs=None, seed=0, **options):
    """Run *story(machines, platform, wire)* on a virtual clock; *machines* is a client of the platform's API."""

    async def main():
        options.setdefault("log", lambda machine, line: None)
        async with Platform(program, api=True, knobs=knobs or Knobs(), seed=seed, **options) as platform:
            wire = Wire(platform)
            async with AsyncMachines(
                "my-worker", token=platform.api_token, base_url=platform.api_url, transport=wire, pacer=Pacer()
            ) as machines:
                return await story(machines, platform, wire)

    random.seed(seed)  # the client's jitter
    return run_virtual(main(), seed)
