"""The app's side of the environment → one frozen WakerConfig; every error at once."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from . import target as targets
from .errors import UsageError
from .target import Target

__all__ = ["TIMEOUT_S", "WakerConfig"]

# A cold start takes seconds, and the platform refuses starts for some seconds after an exit.
TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class WakerConfig:
    """Where wakes go, and how long one may take.

    *drains*: what this process drains itself, if it is a drainer (WORKER_DRAINS: app names and addresses).
    """

    target: Target
    token: str | None = field(default=None, repr=False)
    timeout_s: float = TIMEOUT_S
    drains: tuple[str, ...] = ()

    @classmethod
    def from_environ(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        target: str | None = None,
        token: str | None = None,
        timeout_s: float | None = None,
    ) -> "WakerConfig":
        """Read WAKER_TARGET, WAKER_TOKEN and WAKER_TIMEOUT_S; arguments overrule them one by one.

        *environ* is the process's own unless given. Raises UsageError that names every wrong value, with an example.
        """
        if environ is None:
            environ = os.environ
        errors: list[str] = []
        where: Target | None = None
        text = environ.get("WAKER_TARGET", "") if target is None else target
        if not text.strip():
            errors.append(f"no target: give the worker app's address, or set WAKER_TARGET, like {targets.EXAMPLE}")
        else:
            try:
                where = targets.parse(text, own_address=environ.get("FLY_PRIVATE_IP"))
            except UsageError as error:
                errors.append(f"WAKER_TARGET: {error}" if target is None else str(error))
        name, secret = ("WAKER_TOKEN", environ.get("WAKER_TOKEN", "")) if token is None else ("token", token)
        # It is sent as a header, which a line break would end. The value itself is never shown.
        if any(not "!" <= letter <= "~" for letter in secret):
            errors.append(
                f"{name}: expected printable ASCII without spaces or line breaks, like `openssl rand -hex 16`"
            )
        seconds = _seconds("WAKER_TIMEOUT_S" if timeout_s is None else "timeout_s", timeout_s, environ, errors)
        if errors or where is None:
            raise UsageError("\n".join(errors))
        return cls(where, secret or None, seconds, tuple(environ.get("WORKER_DRAINS", "").split()))


def _seconds(name: str, given: float | None, environ: Mapping[str, str], errors: list[str]) -> float:
    text: object = environ.get(name, TIMEOUT_S) if given is None else given
    try:
        value = float(text)  # type: ignore[arg-type]  # what is not a number is the error reported below
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value <= MAX_TIMEOUT_S:
        errors.append(f"{name}={text!r}: expected seconds above 0 and up to {MAX_TIMEOUT_S:.0f}, like 2.5")
    return value
