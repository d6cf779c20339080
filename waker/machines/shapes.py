"""What people write (15m, 512mb, a command, files) → what a machine's configuration says. Pure.

Whatever cannot be is a UsageError that says what was expected.
"""

import base64
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError

__all__ = ["command", "environment", "files", "guest", "metadata", "mounts", "name", "seconds", "size_mb"]

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {"": 1, "m": 1, "mb": 1, "mib": 1, "g": 1024, "gb": 1024, "gib": 1024}
# A shared CPU has between one step and eight of memory (platform: 5.4).
SHARED_STEP_MB = 256
SHARED_STEPS_PER_CPU = 8
MAX_FILE_BYTES = 1024 * 1024
MAX_COMMAND_WORDS = 1000


def seconds(text: str, what: str = "a duration") -> float:
    """Read a duration: 90, 2.5s, 15m, 1h30m, 7d."""
    said = text.strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[smhd]?)", said)
    if not parts or "".join(number + unit for number, unit in parts) != said:
        raise UsageError(f"{what} {text!r}: expected seconds, or something like 90s, 15m or 1h30m")
    if len(parts) > 1 and not all(unit for _, unit in parts):
        raise UsageError(f"{what} {text!r}: a number has no unit; expected something like 1h30m")
    return math.fsum(float(number) * _UNITS[unit or "s"] for number, unit in parts)


def size_mb(text: str, what: str = "a size") -> int:
    """Read a size in MB: 512, 512mb, 2gb."""
    match = re.fullmatch(r"(\d+)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _SIZES or not int(match[1]):
        raise UsageError(f"{what} {text!r}: expected megabytes, or something like 512mb or 2gb")
    return int(match[1]) * _SIZES[match[2]]


def guest(said: Mapping[str, Any] | str | None, *, cpus: int | None = None, memory_mb: int | None = None,
          kind: str | None = None) -> dict[str, Any] | None:  # fmt: skip
    """A machine's size: the API's own words, a name like shared-cpu-2x or performance-1x, or single figures; or None.

    Checks what is documented of shared CPUs; the platform refuses what else it does not have.
    """
    if isinstance(said, str):
        match = re.fullmatch(r"(shared)-cpu-(\d+)x|(performance)-(\d+)x", said.strip().lower())
        if match is None:
            raise UsageError(f"guest {said!r}: expected a name like shared-cpu-1x or performance-2x")
        made: dict[str, Any] = {"cpu_kind": match[1] or match[3], "cpus": int(match[2] or match[4])}
    else:
        made = dict(said or {})
    given = {"cpu_kind": kind, "cpus": cpus, "memory_mb": memory_mb}
    made.update({key: value for key, value in given.items() if value is not None})
    if not made:
        return None
    made.setdefault("cpu_kind", "shared")
    made.setdefault("cpus", 1)
    count, shared = made["cpus"], made["cpu_kind"] == "shared"
    if made["cpu_kind"] not in ("shared", "performance"):
        raise UsageError(f"guest: cpu_kind {made['cpu_kind']!r}: expected shared or performance")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UsageError(f"guest: cpus {count!r}: expected a number from 1")
    memory = made.setdefault("memory_mb", SHARED_STEP_MB * count if shared else 2048 * count)
    if not isinstance(memory, int) or isinstance(memory, bool) or memory < 1:
        raise UsageError(f"guest: memory_mb {memory!r}: expected megabytes, like 512")
    most = SHARED_STEP_MB * SHARED_STEPS_PER_CPU * count
    if shared and (memory % SHARED_STEP_MB or memory > most):
        raise UsageError(
            f"guest: {memory} MB with {count} shared CPU{'s' * (count != 1)}: expected a multiple of {SHARED_STEP_MB} "
            f"up to {most}"
        )
    return made


def command(words: Sequence[str]) -> list[str]:
    """The words of a command."""
    if isinstance(words, str):
        raise UsageError(f"command {words!r}: expected a list of words, like ['curl', 'https://example.com']")
    said = list(words)
    if not said or not all(isinstance(word, str) and "\0" not in word for word in said) or not said[0]:
        raise UsageError(f"command {said!r}: expected words, like ['curl', 'https://example.com']")
    if len(said) > MAX_COMMAND_WORDS:
        raise UsageError(f"command: {len(said)} words; expected {MAX_COMMAND_WORDS} at most")
    return said


def environment(said: Mapping[str, str] | None) -> dict[str, str]:
    """Variables of a machine; FLY_ names are the platform's (5.4)."""
    made: dict[str, str] = {}
    for name, value in (said or {}).items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name.startswith("FLY_"):
            raise UsageError(f"env {name!r}: expected a name of letters, digits and _ that does not begin with FLY_")
        if not isinstance(value, str):
            raise UsageError(f"env {name}: expected text, not {type(value).__name__}")
        made[name] = value
    return made


def files(said: Mapping[str, str | bytes] | None) -> list[dict[str, Any]]:
    """Files in a machine: path there → content."""
    made = []
    for path, content in (said or {}).items():
        if not path.startswith("/") or path.endswith("/"):
            raise UsageError(f"file {path!r}: expected an absolute path in the machine, like /etc/job.json")
        data = content.encode() if isinstance(content, str) else bytes(content)
        if len(data) > MAX_FILE_BYTES:
            raise UsageError(f"file {path}: {len(data)} bytes; expected {MAX_FILE_BYTES} at most: put it on a volume")
        made.append({"guest_path": path, "raw_value": base64.b64encode(data).decode()})
    return made


def mounts(said: Mapping[str, str] | None) -> list[dict[str, Any]]:
    """Volumes in a machine: path there → volume id. One volume per Machine is what the platform has (5.4)."""
    made = []
    for path, volume in (said or {}).items():
        if not path.startswith("/") or path == "/":
            raise UsageError(f"mount {path!r}: expected an absolute path in the machine, like /data")
        if not volume:
            raise UsageError(f"mount {path}: expected a volume's id, like vol_123456789")
        made.append({"volume": volume, "path": path})
    if len(made) > 1:
        raise UsageError(f"mounts: {len(made)} volumes; the platform gives a machine one")
    return made


def name(text: str, what: str = "a name") -> str:
    """A name for machines: short, lower case, with digits and dashes."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", text):
        raise UsageError(f"{what} {text!r}: expected lower-case letters, digits and dashes, like nightly-report")
    return text


def metadata(pairs: Mapping[str, str]) -> dict[str, str]:
    """Only what has a value."""
    return {key: value for key, value in pairs.items() if value}
