"""fly-replay: what an answer asks the proxy to do with the request instead. Values in, values out.

Source: Fly docs, networking/dynamic-request-routing.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from .message import Answer, Headers

__all__ = [
    "MEDIA_TYPE",
    "InvalidReplayError",
    "NotEmulatedError",
    "Replay",
    "from_header",
    "from_json",
    "source_header",
]

MEDIA_TYPE = "application/vnd.fly.replay+json"
FIELDS = frozenset(
    {"region", "instance", "prefer_instance", "app", "state", "elsewhere", "timeout", "fallback", "transform", "cache"}
)
FALLBACKS = ("force_self", "prefer_self")
ALIASES = frozenset({"apac", "eu", "na", "sa", "us", "usa", "any"})
UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0}
FIELD = re.compile(r'\s*([a-z_]+)\s*=\s*("[^"]*"|[^;]*?)\s*(?:;|$)')
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m)")


class InvalidReplayError(Exception):
    """The answer's fly-replay cannot be read (PA03)."""


class NotEmulatedError(Exception):
    """The real proxy may do this; this one does not and says so (501)."""


@dataclass(frozen=True, slots=True)
class Replay:
    """Where the request is to go."""

    regions: tuple[str, ...] = ()
    instance: str | None = None
    prefer_instance: str | None = None
    app: str | None = None
    state: str | None = None
    elsewhere: bool = False
    timeout_s: float | None = None
    fallback: str | None = None


def asked(answer: Answer) -> bool:
    """Whether *answer* is a replay in either form."""
    return answer.header("fly-replay") is not None or (answer.header("content-type") or "").startswith(MEDIA_TYPE)


def from_header(value: str) -> Replay:
    """Read `instance=148e…;timeout=800ms`."""
    found: dict[str, Any] = {}
    position = 0
    while position < len(value):
        match = FIELD.match(value, position)
        if match is None or match.end() == position:
            raise InvalidReplayError(f"cannot read fly-replay: {value!r}")
        found[match[1]] = match[2].strip('"')
        position = match.end()
    return _replay(found)


def from_json(body: bytes) -> Replay:
    """Read the JSON form."""
    try:
        found = json.loads(body)
    except ValueError as error:
        raise InvalidReplayError(f"cannot read the replay's JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidReplayError("the replay's JSON is not an object")
    return _replay(found)


def _replay(found: dict[str, Any]) -> Replay:
    unknown = sorted(set(found) - FIELDS)
    if unknown or not found:
        raise InvalidReplayError(f"unknown fields in fly-replay: {', '.join(unknown) or 'none at all'}")
    for name in ("transform", "cache"):
        if name in found:
            raise NotEmulatedError(f"fly-replay with {name}")
    listed = found.get("region") or ""
    regions = tuple(str(each).strip() for each in (listed if isinstance(listed, list) else str(listed).split(",")))
    regions = tuple(region for region in regions if region)
    if ALIASES.intersection(regions) - {"any"}:
        raise NotEmulatedError("fly-replay to a region alias")
    fallback = found.get("fallback")
    if fallback is not None and fallback not in FALLBACKS:
        raise InvalidReplayError(f"fallback={fallback!r}: expected one of {', '.join(FALLBACKS)}")
    timeout = found.get("timeout")
    matched = None if timeout is None else DURATION.fullmatch(str(timeout))
    if timeout is not None and matched is None:
        raise InvalidReplayError(f"timeout={timeout!r}: expected a duration like 10s or 800ms")
    return Replay(
        regions=() if "any" in regions else regions,
        instance=found.get("instance"),
        prefer_instance=found.get("prefer_instance"),
        app=found.get("app"),
        state=found.get("state"),
        elsewhere=str(found.get("elsewhere", "")).lower() == "true",
        timeout_s=float(matched[1]) * UNIT_S[matched[2]] if matched else None,
        fallback=fallback,
    )


def source_header(machine: str, region: str, at_s: float, state: str | None, separator: str) -> Headers:
    """The fly-replay-src that the target sees; *at_s* is Unix time."""
    fields = [f"instance={machine}", f"region={region}", f"t={int(at_s * 1_000_000)}"]
    if state is not None:
        fields.append(f"state={state}")
    return (("fly-replay-src", separator.join(fields)),)
