"""The Machines API's calls: what to send, what an answer means, when to ask again, and how fast. Pure.

Sources are parts of the platform's description: 6.2 the calls, 6.5 leases, 6.7 errors, 6.8 rate limits.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from .errors import (
    MachineBusy,
    MachinesError,
    NoAnswer,
    NoCapacity,
    NotFound,
    PlatformError,
    RateLimited,
    RequestError,
    TokenRefused,
    Unreachable,
)

__all__ = [
    "MAX_WAIT_S",
    "OPERATIONS",
    "Answer",
    "Bucket",
    "Call",
    "Limit",
    "Operation",
    "again",
    "duration",
    "read",
    "wait_slice_s",
]

# A wait is answered after so long at most (6.4): a longer one is several calls.
MAX_WAIT_S = 60
MAX_SAID = 300

LEASE_NONCE = "fly-machine-lease-nonce"
REQUEST_ID = "fly-request-id"
CAPACITY = "insufficient_capacity"
NO_ROOM = ("insufficient capacity", "insufficient resources", "insufficient memory", "insufficient cpu")


@dataclass(frozen=True, slots=True)
class Limit:
    """So many calls a second, and so many at once after a pause."""

    per_s: float
    burst: int


# Per action and identifier: a machine's id, or the app (6.8).
ONE = Limit(1, 3)
GET = Limit(5, 10)

LEASED = frozenset({409})
BUSY = frozenset({409, 412})
NEVER: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the table.

    *busy*: refusals that pass with time and leave nothing done, so that the call is repeated after them. *repeat*:
    whether it may be repeated when nobody knows if it was done (no answer, or a 5xx): only if twice comes to the same
    as once. What was surely not done (no connection, 429) is repeated, where *refused* does not say otherwise.
    """

    does: str  # "start {subject}", for messages
    method: str
    path: str
    limit: Limit = ONE
    busy: frozenset[int] = NEVER
    repeat: bool = False
    gone_is_done: bool = False  # a 404 means that it was done before
    refused: bool = True  # whether what was surely not done is repeated


APP = "/apps/{app}"
MACHINES = APP + "/machines"
MACHINE = MACHINES + "/{machine}"

# Which calls are safe to repeat. A create is not (a second machine), nor a start (a second run, if the first is over
# by then), an exec or a lease; what looks, stops or deletes is, and so is what sets a value.
OPERATIONS: Mapping[str, Operation] = {
    "app": Operation("look at {subject}", "GET", APP, repeat=True),
    "addresses": Operation("list the addresses of {subject}", "GET", APP + "/ip_assignments", repeat=True),
    "list": Operation("list the machines of {subject}", "GET", MACHINES, repeat=True),
    "create": Operation("create a machine in {subject}", "POST", MACHINES),
    "get": Operation("look at {subject}", "GET", MACHINE, limit=GET, repeat=True),
    "update": Operation("update {subject}", "POST", MACHINE, busy=BUSY),
    "delete": Operation("delete {subject}", "DELETE", MACHINE, busy=LEASED, repeat=True, gone_is_done=True),
    "destroy": Operation("delete {subject}", "DELETE", MACHINE, busy=BUSY, repeat=True, gone_is_done=True),
    "start": Operation("start {subject}", "POST", MACHINE + "/start", busy=BUSY),
    "try-start": Operation("start {subject}", "POST", MACHINE + "/start", refused=False),
    "stop": Operation("stop {subject}", "POST", MACHINE + "/stop", busy=BUSY, repeat=True),
    "wait": Operation("wait for {subject}", "GET", MACHINE + "/wait", repeat=True),
    "events": Operation("list the events of {subject}", "GET", MACHINE + "/events", repeat=True),
    "exec": Operation("run a command in {subject}", "POST", MACHINE + "/exec"),
    "lease": Operation("look at the lease of {subject}", "GET", MACHINE + "/lease", repeat=True),
    "acquire": Operation("lease {subject}", "POST", MACHINE + "/lease"),
    "release": Operation(
        "give the lease of {subject} back", "DELETE", MACHINE + "/lease", repeat=True, gone_is_done=True
    ),
    "metadata": Operation("read the metadata of {subject}", "GET", MACHINE + "/metadata", repeat=True),
    "set-metadata": Operation(
        "set the metadata of {subject}", "POST", MACHINE + "/metadata/{key}", busy=LEASED, repeat=True
    ),
    "delete-metadata": Operation(
        "delete metadata of {subject}",
        "DELETE",
        MACHINE + "/metadata/{key}",
        busy=LEASED,
        repeat=True,
        gone_is_done=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call: a row of the table, and what it is filled with."""

    name: str
    app: str
    machine: str = ""
    key: str = ""
    query: tuple[tuple[str, str], ...] = ()
    body: Mapping[str, Any] | None = None
    nonce: str | None = field(default=None, repr=False)
    holds_s: float = 0.0  # how long the platform may sit on its answer on purpose

    @property
    def operation(self) -> Operation:
        """Its row."""
        return OPERATIONS[self.name]

    @property
    def path(self) -> str:
        """Below the API's address."""
        parts = {"app": self.app, "machine": self.machine, "key": self.key}
        return "/v1" + self.operation.path.format_map({name: quote(value, safe="") for name, value in parts.items()})

    @property
    def headers(self) -> dict[str, str]:
        """Besides the token's."""
        headers = {"accept": "application/json"}
        if self.body is not None:
            headers["content-type"] = "application/json"
        if self.nonce is not None:
            headers[LEASE_NONCE] = self.nonce
        return headers

    @property
    def content(self) -> bytes:
        """The body; a call without fields has none."""
        return b"" if self.body is None else json.dumps(self.body).encode()

    @property
    def does(self) -> str:
        """The call in words."""
        subject = f"machine {self.machine}" if self.machine else f"app {self.app}"
        return self.operation.does.format(subject=subject)

    @property
    def identifier(self) -> str:
        """What the platform's rate limit counts by."""
        return self.machine or self.app


def listing(
    app: str,
    *,
    states: Sequence[str] = (),
    region: str | None = None,
    metadata: Mapping[str, str] | None = None,
    include_deleted: bool = False,
) -> Call:
    """List machines; the filters are the platform's own."""
    query: list[tuple[str, str]] = []
    if states:
        query.append(("state", ",".join(states)))
    if region:
        query.append(("region", region))
    if include_deleted:
        query.append(("include_deleted", "true"))
    query += [(f"metadata.{key}", value) for key, value in (metadata or {}).items()]
    return Call("list", app, query=tuple(query))


def create(
    app: str,
    config: Mapping[str, Any],
    *,
    name: str | None = None,
    region: str | None = None,
    skip_launch: bool = False,
    lease_ttl_s: int | None = None,
) -> Call:
    """Make a machine, which starts unless *skip_launch*."""
    body: dict[str, Any] = {"config": dict(config)}
    if name:
        body["name"] = name
    if region:
        body["region"] = region
    if skip_launch:
        body["skip_launch"] = True
    if lease_ttl_s is not None:
        body["lease_ttl"] = lease_ttl_s
    return Call("create", app, body=body)


def update(
    app: str, machine: str, config: Mapping[str, Any], *, version: str | None, skip_launch: bool, nonce: str | None
) -> Call:
    """Replace the whole configuration; with *version* only if it is still that one."""
    body: dict[str, Any] = {"config": dict(config)}
    if version:
        body["current_version"] = version
    if skip_launch:
        body["skip_launch"] = True
    return Call("update", app, machine, body=body, nonce=nonce)


def stop(app: str, machine: str, *, signal: str | None, timeout_s: float | None, nonce: str | None) -> Call:
    """Ask a machine to stop: *signal*, and the kill after *timeout_s*; its own settings unless given."""
    body: dict[str, Any] = {}
    if signal:
        body["signal"] = signal
    if timeout_s is not None:
        body["timeout"] = duration(timeout_s)
    return Call("stop", app, machine, body=body, nonce=nonce)


def delete(app: str, machine: str, *, force: bool, nonce: str | None) -> Call:
    """Delete a machine; with *force* also one that runs."""
    if force:
        return Call("destroy", app, machine, query=(("force", "true"),), nonce=nonce)
    return Call("delete", app, machine, nonce=nonce)


def wait(app: str, machine: str, states: Sequence[str], *, version: str, timeout_s: int) -> Call:
    """Wait for one of *states*. The version is always sent: a stopped machine is not waited for without it (6.4)."""
    query = [("state", state) for state in states]
    if version:
        query += [("version", version), ("instance_id", version)]
    query.append(("timeout", str(timeout_s)))
    return Call("wait", app, machine, query=tuple(query), holds_s=timeout_s)


def execute(app: str, machine: str, command: Sequence[str], *, timeout_s: float, stdin: str | None) -> Call:
    """Run a command in a machine that is up."""
    body: dict[str, Any] = {"command": list(command), "timeout": max(1, math.ceil(timeout_s))}
    if stdin is not None:
        body["stdin"] = stdin
    return Call("exec", app, machine, body=body, holds_s=timeout_s)


def acquire(app: str, machine: str, *, ttl_s: int, description: str, nonce: str | None) -> Call:
    """Lease a machine; with its nonce, for longer. The time goes into body and query: the documents disagree (6.5)."""
    body: dict[str, Any] = {"ttl": ttl_s}
    if description:
        body["description"] = description
    return Call("acquire", app, machine, query=(("ttl", str(ttl_s)),), body=body, nonce=nonce)


def duration(seconds: float) -> str:
    """Seconds as the platform writes them, like 5s or 1500ms."""
    return f"{seconds:.0f}s" if float(seconds).is_integer() else f"{max(1, round(seconds * 1000))}ms"


def wait_slice_s(left_s: float) -> int:
    """How long one call of a wait that has *left_s* should take: whole seconds, within what the platform allows."""
    return max(1, min(MAX_WAIT_S, math.floor(left_s)))


# -- what an answer means ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it came, its header names in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes = field(repr=False)


def read(call: Call, answer: Answer) -> Any:
    """The JSON of a good answer, None if it has none. Raises the MachinesError that a bad one means."""
    status = answer.status
    if 200 <= status < 300:
        if not answer.content.strip():
            return None
        try:
            return json.loads(answer.content)
        except ValueError:
            raise _error(PlatformError, call, answer, "answered, but not with JSON") from None
    if status == 404 and call.operation.gone_is_done:
        return None
    said, code = _said(answer)
    kind: type[MachinesError]
    if code == CAPACITY or (status not in (401, 403, 404, 429) and any(word in said.lower() for word in NO_ROOM)):
        kind = NoCapacity
    elif status == 429 or "rate limit exceeded" in said.lower():
        kind = RateLimited
    elif status in (401, 403):
        kind = TokenRefused
    elif status == 404:
        kind = NotFound
    elif status in (409, 412):
        kind = MachineBusy
    elif 400 <= status < 500:
        kind = RequestError
    else:
        kind = PlatformError
    if 300 <= status < 400:
        said = "it leads to another address, where the token is not sent"
    raise _error(kind, call, answer, said, code)


def _error(kind: type[MachinesError], call: Call, answer: Answer, said: str, code: str = "") -> MachinesError:
    hint = ""
    if kind is TokenRefused:
        hint = "; is the token in FLY_API_TOKEN for this app's organization, and still good?"
    elif kind is NotFound:
        hint = f"; does the token see app {call.app}?"
    elif kind is NoCapacity:
        hint = "; take another region or a smaller guest, or try later"
    return kind(
        f"cannot {call.does}: {answer.status} {said}{hint}".rstrip(),
        status=answer.status,
        request_id=_printable(answer.headers.get(REQUEST_ID, "")) or None,
        said=said,
        code=code,
    )


def unreachable(call: Call, why: str) -> Unreachable:
    """Nothing was sent."""
    return Unreachable(f"cannot {call.does}: no connection: {why}")


def unanswered(call: Call, why: str) -> NoAnswer:
    """It was sent, and who knows."""
    return NoAnswer(f"cannot {call.does}: {why}")


def _said(answer: Answer) -> tuple[str, str]:
    """The platform's words and its code; a body that is no JSON is quoted."""
    try:
        data = json.loads(answer.content)
    except ValueError:
        return _printable(answer.content.decode("utf-8", "replace")), ""
    if not isinstance(data, Mapping):
        return "", ""
    # Some answers say message, some an error that is an object; the status is a word in some and a number in others.
    words = next((data[key] for key in ("error", "message") if isinstance(data.get(key), str)), "")
    code = data.get("status")
    return _printable(words), code if isinstance(code, str) else ""


def _printable(text: str) -> str:
    line = " ".join(text.split())[:MAX_SAID]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


# -- asking again, and how fast ----------------------------------------------------------------------------------------

MAX_ATTEMPTS = 100
BUSY_PAUSE_S = 1.0  # what was seen to do in the window after an exit (1.6)
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 8.0


def again(call: Call, error: MachinesError, attempt: int, chance: float) -> float | None:
    """How long to pause before the call is repeated after its *attempt*-th failure; None if it must not be.

    *chance* (0 to 1) is the jitter.
    """
    operation = call.operation
    grown = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(attempt, 10)) * (0.5 + chance / 2)
    if attempt > MAX_ATTEMPTS or isinstance(error, NoCapacity) or not operation.refused:
        return None
    if isinstance(error, RateLimited):
        return grown
    if isinstance(error, Unreachable):
        return grown
    if isinstance(error, MachineBusy):
        return BUSY_PAUSE_S * (0.75 + chance / 2) if error.status in operation.busy else None
    if isinstance(error, NoAnswer) or (error.status is not None and error.status >= 500):
        return grown if operation.repeat else None
    return None


class Bucket:
    """The platform's rate limit of one action on one identifier, kept on our side. The caller guards it with a lock.

    Turns are given in the order they are asked for, each at the earliest time that keeps to the limit.
    """

    def __init__(self, limit: Limit) -> None:
        self._interval_s = 1.0 / limit.per_s
        self._ahead_s = (limit.burst - 1) * self._interval_s
        self._full_at = -math.inf  # when the burst is whole again

    def reserve(self, now: float) -> float:
        """Take a turn; how long to wait until it comes."""
        self._full_at = max(self._full_at, now) + self._interval_s
        return max(0.0, self._full_at - self._interval_s - self._ahead_s - now)

    def give_back(self) -> None:
        """A turn was not used."""
        self._full_at -= self._interval_s

    def refused(self, now: float) -> None:
        """The platform counted more than we did: somebody else asks too. The next turn is an interval away."""
        self._full_at = max(self._full_at, now + self._ahead_s + self._interval_s)

    def idle(self, now: float) -> bool:
        """Whether it remembers nothing."""
        return self._full_at <= now
