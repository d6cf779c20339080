"""What a request's body may look like: small checks that are put together, and what they make of it.

A shape takes a value, the place where it stands and a list of notes; it returns the value as the platform stores it, or
raises WrongError. Unknown fields are dropped, as the platform does, and noted; null is the same as absent. Where
documents and real clients disagree (Fly docs, the OpenAPI file, fly-go), all forms are taken and one is kept.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "SIGNALS",
    "STOP_SIGNALS",
    "Shape",
    "WrongError",
    "anything",
    "autostop",
    "duration",
    "flag",
    "go_duration",
    "integer",
    "list_of",
    "map_of",
    "number",
    "one_of",
    "record",
    "seconds",
    "seconds_in",
    "signal_of",
    "text",
]

Shape = Callable[[Any, str, list[str]], Any]

# OpenAPI: StopRequest and fly.StopConfig; SignalRequest. fly-go sends numbers too.
STOP_SIGNALS = {"SIGHUP": 1, "SIGINT": 2, "SIGQUIT": 3, "SIGKILL": 9, "SIGUSR1": 10, "SIGUSR2": 12, "SIGTERM": 15}
SIGNALS = {**STOP_SIGNALS, "SIGILL": 4, "SIGTRAP": 5, "SIGABRT": 6, "SIGFPE": 8, "SIGSEGV": 11, "SIGPIPE": 13}
SIGNALS["SIGALRM"] = 14

INT64 = 1 << 63
UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
TERM = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")


class WrongError(ValueError):
    """This request can never be granted: what is wrong, and where."""


def text(value: Any, where: str, notes: list[str]) -> str:
    """A string that a process can be given: no null character, no half of a surrogate pair."""
    if not isinstance(value, str):
        raise WrongError(f"{where}: expected a string, not {_kind(value)}")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise WrongError(f"{where}: expected a string without null characters and lone surrogates")
    return value


def integer(value: Any, where: str, notes: list[str]) -> int:
    """An integer of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not -INT64 <= value < INT64:
        raise WrongError(f"{where}: expected an integer, not {_kind(value)}")
    return value


def number(value: Any, where: str, notes: list[str]) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < INT64:
        raise WrongError(f"{where}: expected a number, not {_kind(value)}")
    return value


def flag(value: Any, where: str, notes: list[str]) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise WrongError(f"{where}: expected true or false, not {_kind(value)}")
    return value


def anything(value: Any, where: str, notes: list[str]) -> Any:
    """An object that means nothing here."""
    if not isinstance(value, dict):
        raise WrongError(f"{where}: expected an object, not {_kind(value)}")
    return value


def list_of(shape: Shape) -> Shape:
    """A list of such values."""

    def check(value: Any, where: str, notes: list[str]) -> list[Any]:
        if not isinstance(value, list):
            raise WrongError(f"{where}: expected a list, not {_kind(value)}")
        return [shape(each, f"{where}[{index}]", notes) for index, each in enumerate(value)]

    return check


def map_of(shape: Shape) -> Shape:
    """An object with names of the user's own."""

    def check(value: Any, where: str, notes: list[str]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise WrongError(f"{where}: expected an object, not {_kind(value)}")
        return {
            text(name, where, notes): shape(each, f"{where}.{name}", notes)
            for name, each in value.items()
            if each is not None
        }

    return check


def one_of(*words: str) -> Shape:
    """One of these words; the empty string is the same as absent, as Go clients send it."""

    def check(value: Any, where: str, notes: list[str]) -> str | None:
        if value == "":
            return None
        if value not in words:
            raise WrongError(f"{where}: expected one of {', '.join(words)}")
        return str(value)

    return check


def record(**fields: Shape) -> Shape:
    """An object with these fields, each of them optional."""

    def check(value: Any, where: str, notes: list[str]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise WrongError(f"{where}: expected an object, not {_kind(value)}")
        found = {}
        for name, each in value.items():
            place = f"{where}.{name}" if where else name
            if name not in fields:
                notes.append(place)
            elif each is not None:
                cleaned = fields[name](each, place, notes)
                if cleaned is not None:
                    found[name] = cleaned
        return found

    return check


def go_duration(value: str) -> float:
    """Seconds of a Go duration like "1m30s"; ValueError if it is none."""
    sign, rest = (-1.0, value[1:]) if value[:1] == "-" else (1.0, value.removeprefix("+"))
    if rest == "0":
        return 0.0
    terms = TERM.findall(rest)
    if not terms or "".join(amount + unit for amount, unit in terms) != rest:
        raise ValueError(value)
    total = sign * sum(float(amount) * UNITS_S[unit] for amount, unit in terms)
    if not math.isfinite(total) or abs(total) * 1e9 >= INT64:
        raise ValueError(value)
    return total


def duration(value: Any, where: str, notes: list[str]) -> str:
    """In a config: a Go string, or a number of nanoseconds (docs and OpenAPI file disagree); kept as a string."""
    try:
        length_s = go_duration(value) if isinstance(value, str) else number(value, where, notes) / 1e9
    except ValueError:
        raise WrongError(f"{where}: expected a duration like '15s'") from None
    return seconds_in(length_s)


def seconds(value: Any, where: str, notes: list[str]) -> float:
    """In a request to stop: a Go string, or a number of seconds, also as a string."""
    try:
        if isinstance(value, str):
            return go_duration(f"{value}s" if value[-1:].isdigit() else value or "0")
        return number(value, where, notes)
    except ValueError:
        raise WrongError(f"{where}: expected a duration like '10s'") from None


def seconds_in(length_s: float) -> str:
    """A Go duration of *length_s*."""
    millis = round(length_s * 1000)
    return f"{millis // 1000}s" if millis % 1000 == 0 else f"{millis}ms"


def autostop(value: Any, where: str, notes: list[str]) -> str | None:
    """`off`, `stop` or `suspend`; false and true are the older words for the first two."""
    if isinstance(value, bool):
        return "stop" if value else "off"
    return one_of("off", "stop", "suspend")(value, where, notes)  # type: ignore[no-any-return]


def signal_of(names: Mapping[str, int]) -> Shape:
    """The name of a signal, or its number; kept as the name."""

    def check(value: Any, where: str, notes: list[str]) -> str | None:
        if isinstance(value, int) and not isinstance(value, bool):
            value = next((name for name, each in names.items() if each == value), value)
        if value in ("", 0):
            return None
        if value not in names:
            raise WrongError(f"{where}: expected one of {', '.join(names)}")
        return str(value)

    return check


def _kind(value: Any) -> str:
    """What *value* is, in JSON's words; never the value, which may be a secret."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
