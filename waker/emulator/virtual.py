"""Machines whose program is a callable in this process: no sockets, no processes, the loop's own clock."""

import asyncio
import signal
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any

from .guest import Boot, Outcome
from .message import Answer, Request

__all__ = ["CallableMachine", "CallableRunner", "IncomingRequest"]

Program = Callable[["CallableMachine"], Coroutine[Any, Any, int | None]]

CRASHED = 1


class IncomingRequest:
    """A request that reached the program; it waits for `answer`."""

    def __init__(self, request: Request, body: bytes) -> None:
        self.method = request.method
        self.target = request.target
        self.headers = {name.lower(): value for name, value in request.headers}
        self.body = body
        self._answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    @property
    def open(self) -> bool:
        """Whether somebody still waits for an answer."""
        return not self._answer.done()

    def answer(self, status: int = 200, headers: Mapping[str, str] | None = None, body: bytes = b"") -> bool:
        """Answer it; False if it has an answer or its caller left."""
        if not self.open:
            return False
        self._answer.set_result(Answer(status, tuple((headers or {}).items()), _once(body)))
        return True


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    if body:
        yield body


class CallableMachine:
    """What the program sees of its machine. It listens from its first look at `requests`."""

    def __init__(self, boot: Boot, log: Callable[[str, str], None]) -> None:
        self.id = boot.machine
        self.env = boot.env
        self.command = boot.command  # what a real machine would run: the config's init and the image's command
        self.files = {file.path: file.content for file in boot.files}
        self._log = log
        self._waiting: deque[IncomingRequest] = deque()
        self._arrived = asyncio.Event()
        self._listening = False
        self._handler: Callable[[int], None] | None = None
        self._beside: set[asyncio.Task[Any]] = set()

    def listen(self) -> None:
        """Bind the port: from now on a connect succeeds."""
        self._listening = True

    @property
    async def requests(self) -> AsyncIterator[IncomingRequest]:
        """The requests in the order they came; never ends by itself."""
        self.listen()
        while True:
            while self._waiting:
                yield self._waiting.popleft()
            self._arrived.clear()
            await self._arrived.wait()

    @property
    def waiting(self) -> int:
        """How many requests have come and were not looked at."""
        return len(self._waiting)

    def on_signal(self, handler: Callable[[int], None]) -> None:
        """Call *handler* with a signal's number. Without a handler a signal ends the program, as it does a process."""
        self._handler = handler

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run *work* beside the program; it is killed when the machine ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
        return task

    def print(self, line: str) -> None:
        """Write a line to the machine's log."""
        self._log(self.id, line)


class CallableRunner:
    """Boots machines whose program is *program*."""

    def __init__(self, program: Program, *, log: Callable[[str, str], None]) -> None:
        self._program = program
        self._log = log

    async def boot(self, boot: Boot) -> "CallableGuest":
        """Begin the program."""
        return CallableGuest(self._program, CallableMachine(boot, self._log))


class CallableGuest:
    """One run of the program."""

    def __init__(self, program: Program, machine: CallableMachine) -> None:
        loop = asyncio.get_running_loop()
        self._machine = machine
        self._signalled = 0
        self._in_hand: set[IncomingRequest] = set()
        self.exited: asyncio.Future[int] = loop.create_future()
        self._task = loop.create_task(self._run(program))
        self._task.add_done_callback(self._over)

    @property
    def pids(self) -> Sequence[int]:
        """A callable has no processes."""
        return ()

    @property
    def ended_by(self) -> int:
        """The signal that ended it, or 0."""
        return self._signalled if self._task.cancelled() else 0

    async def execute(self, command: Sequence[str], stdin: bytes, timeout_s: float) -> Outcome:
        """A callable has no second command."""
        raise NotImplementedError("exec in a machine whose program is a callable")

    async def _run(self, program: Program) -> int:
        try:
            code = await program(self._machine)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        return 0 if code is None else code

    def _over(self, task: "asyncio.Task[int]") -> None:
        for beside in tuple(self._machine._beside):
            beside.cancel()
        for request in self._in_hand:
            if request.open:
                request._answer.set_exception(ConnectionResetError("the machine is gone"))
        if task.cancelled():
            code = 128 + self._signalled
        elif (error := task.exception()) is None:
            code = task.result()
        else:
            self._machine.print(f"{type(error).__name__}: {error}")
            code = CRASHED
        if not self.exited.done():
            self.exited.set_result(code)

    def signal(self, number: int) -> None:
        """To the program's handler; without one, or for SIGKILL, it is the end."""
        if self._machine._handler is not None and number != signal.SIGKILL:
            self._machine._handler(number)
        else:
            self._signalled = self._signalled or number
            self._task.cancel()

    def kill(self) -> None:
        """End the program where it waits."""
        self._machine._handler = None
        self.signal(signal.SIGKILL)

    async def connect(self) -> "CallableConnection":
        """Refused unless the program listens."""
        if self._task.done() or not self._machine._listening:
            raise ConnectionRefusedError("nothing listens")
        return CallableConnection(self)

    async def deliver(self, request: Request) -> Answer:
        """Hand *request* to the program and wait for its answer."""
        if self._task.done():
            raise ConnectionResetError("the machine is gone")
        incoming = IncomingRequest(request, b"".join([chunk async for chunk in request.body.stream()]))
        self._in_hand.add(incoming)
        self._machine._waiting.append(incoming)
        self._machine._arrived.set()
        try:
            return await incoming._answer
        finally:
            self._in_hand.discard(incoming)
            incoming._answer.cancel()


class CallableConnection:
    """A connection to a program."""

    def __init__(self, guest: CallableGuest) -> None:
        self._guest = guest

    @property
    def reusable(self) -> bool:
        """As long as the program runs."""
        return not self._guest.exited.done()

    async def send(self, request: Request) -> Answer:
        """Deliver *request*."""
        return await self._guest.deliver(request)

    def close(self) -> None:
        """Nothing to close."""
