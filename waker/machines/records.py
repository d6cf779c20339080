"""What the Machines API tells, as frozen records. Pure.

Unknown fields are ignored and absent ones have a default: the platform adds fields as it likes. What is not of the
documented shape at all raises ValueError.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Address", "App", "Event", "ExecResult", "Exit", "Lease", "Machine", "Waited"]

# A group of machines that fly deploy made, or that FLY_PROCESS_GROUP names.
GROUP = "fly_process_group"
_PRIVATE = "fdaa:"


@dataclass(frozen=True, slots=True)
class Exit:
    """How one run of a machine ended (platform: 6.6). *exit_code* is the main process's; None: it was not told."""

    exit_code: int | None
    signal: int | None = None
    oom_killed: bool = False
    requested_stop: bool = False
    restarting: bool = False
    at: float | None = None  # unix time


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a machine. *at*: unix time."""

    id: str
    type: str
    status: str
    source: str
    at: float | None
    request: Mapping[str, Any] = field(repr=False)

    @classmethod
    def read(cls, data: object) -> "Event":
        """Read one from JSON."""
        said = _object(data, "an event")
        stamp = said.get("timestamp")
        at = stamp / 1000 if isinstance(stamp, int | float) and not isinstance(stamp, bool) else None
        request = said.get("request")
        return cls(
            _text(said, "id"),
            _text(said, "type"),
            _text(said, "status"),
            _text(said, "source"),
            at,
            request if isinstance(request, Mapping) else {},
        )

    @property
    def exit(self) -> Exit | None:
        """How the run ended, if this is its end."""
        if self.type != "exit":
            return None
        monitor = self.request.get("MonitorEvent")
        places = (monitor.get("exit_event") if isinstance(monitor, Mapping) else None, self.request.get("exit_event"))
        said = next((place for place in places if isinstance(place, Mapping)), None)
        if said is None:
            return Exit(None, at=self.at)
        code = _number(said, "exit_code")
        # Absent means zero: some of the platform's own tools drop zeros. -1 stands for no signal.
        code = 0 if code is None else code
        signal = max(_number(said, "signal") or 0, _number(said, "guest_signal") or 0)
        if signal <= 0 and 128 < code <= 192:
            signal = code - 128
        return Exit(
            code,
            signal if signal > 0 else None,
            said.get("oom_killed") is True,
            said.get("requested_stop") is True,
            said.get("restarting") is True,
            self.at,
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as it was when it was asked for. *version* is the instance id; *events*: newest first."""

    id: str
    name: str
    state: str
    region: str
    version: str
    private_ip: str
    created_at: str
    updated_at: str
    host_status: str
    config: Mapping[str, Any] = field(repr=False)
    events: tuple[Event, ...] = field(repr=False)
    nonce: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, data: object) -> "Machine":
        """Read one from JSON; ValueError if it has no id."""
        said = _object(data, "a machine")
        if not _text(said, "id"):
            raise ValueError("a machine without an id")
        config = said.get("config") or said.get("incomplete_config")
        events = said.get("events")
        return cls(
            _text(said, "id"),
            _text(said, "name"),
            _text(said, "state"),
            _text(said, "region"),
            _text(said, "instance_id") or _text(said, "version"),
            _text(said, "private_ip"),
            _text(said, "created_at"),
            _text(said, "updated_at"),
            _text(said, "host_status"),
            config if isinstance(config, Mapping) else {},
            _newest_first(Event.read(event) for event in events) if isinstance(events, list) else (),
            _text(said, "nonce") or None,
        )

    @property
    def image(self) -> str:
        """The image it was made from; empty if that was not told."""
        return _text(self.config, "image")

    @property
    def metadata(self) -> Mapping[str, str]:
        """Its metadata."""
        said = self.config.get("metadata")
        return {str(k): str(v) for k, v in said.items()} if isinstance(said, Mapping) else {}

    @property
    def env(self) -> Mapping[str, str]:
        """The variables that its configuration sets."""
        said = self.config.get("env")
        return {str(k): str(v) for k, v in said.items()} if isinstance(said, Mapping) else {}

    @property
    def group(self) -> str:
        """Its process group; empty if it has none."""
        return self.metadata.get(GROUP) or self.env.get("FLY_PROCESS_GROUP", "")

    @property
    def services(self) -> tuple[Mapping[str, Any], ...]:
        """What the proxy knows of it."""
        said = self.config.get("services")
        return tuple(each for each in said if isinstance(each, Mapping)) if isinstance(said, list) else ()

    @property
    def exit(self) -> Exit | None:
        """How its last run ended; None while one is on its way, or if there was none."""
        for event in self.events:
            if event.exit is not None:
                return event.exit
            if event.type == "start":
                return None
        return None

    @property
    def last_exit(self) -> Exit | None:
        """How the last run that ended did, whatever came after it."""
        return next((event.exit for event in self.events if event.exit is not None), None)

    @property
    def started_at(self) -> float | None:
        """Unix time of its last start, as far as the events reach."""
        return next((event.at for event in self.events if event.status == "started"), None)


@dataclass(frozen=True, slots=True)
class App:
    """An app. Empty is what was not told."""

    name: str
    status: str = ""
    organization: str = ""
    network: str = ""

    @classmethod
    def read(cls, data: object) -> "App":
        """Read one from JSON."""
        said = _object(data, "an app")
        organization = said.get("organization")
        slug = _text(organization, "slug") if isinstance(organization, Mapping) else ""
        return cls(_text(said, "name"), _text(said, "status"), slug, _text(said, "network"))


@dataclass(frozen=True, slots=True)
class Address:
    """An address of an app. *private*: a Flycast address, which leads through the proxy from the private network."""

    ip: str
    region: str = ""
    shared: bool = False

    @classmethod
    def read(cls, data: object) -> "Address":
        """Read one from JSON."""
        said = _object(data, "an address")
        return cls(_text(said, "ip"), _text(said, "region"), said.get("shared") is True)

    @property
    def private(self) -> bool:
        """Whether it is reached from the private network alone."""
        return self.ip.lower().startswith(_PRIVATE)


@dataclass(frozen=True, slots=True)
class Lease:
    """A right to change a machine that nobody else has until *expires_at* (unix time). The nonce proves it."""

    nonce: str = field(repr=False)
    expires_at: float | None = None
    owner: str = ""
    description: str = ""

    @classmethod
    def read(cls, data: object) -> "Lease":
        """Read one from JSON, in the envelope of the documents or bare as in the OpenAPI file (platform: 6.5)."""
        said = _object(data, "a lease")
        if isinstance(said.get("data"), Mapping):
            said = said["data"]
        return cls(_text(said, "nonce"), _number(said, "expires_at"), _text(said, "owner"), _text(said, "description"))


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a command in a machine came to. A command that failed is an answer like any other."""

    exit_code: int
    exit_signal: int
    stdout: str
    stderr: str

    @classmethod
    def read(cls, data: object) -> "ExecResult":
        """Read one from JSON."""
        said = _object(data, "a command's result")
        return cls(
            _number(said, "exit_code") or 0,
            _number(said, "exit_signal") or 0,
            _text(said, "stdout"),
            _text(said, "stderr"),
        )


@dataclass(frozen=True, slots=True)
class Waited:
    """A wait that came true. Empty is what was not told."""

    state: str = ""
    version: str = ""
    event_id: str = ""

    @classmethod
    def read(cls, data: object) -> "Waited":
        """Read one from JSON."""
        said = _object(data, "a wait's answer")
        return cls(_text(said, "state"), _text(said, "version"), _text(said, "event_id"))


def _newest_first(events: Iterable[Event]) -> tuple[Event, ...]:
    # They come newest first; sorting is stable, so that those of one millisecond stay as they came.
    return tuple(sorted(events, key=lambda event: -(event.at or 0.0)))


def _object(data: object, what: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"expected {what}, got {type(data).__name__}")  # noqa: TRY004 - a wrong value from outside
    return data


def _text(said: Mapping[str, Any], key: str) -> str:
    value = said.get(key)
    return value if isinstance(value, str) else ""


def _number(said: Mapping[str, Any], key: str) -> int | None:
    value = said.get(key)
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
