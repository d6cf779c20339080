"""The Machines API's side of the environment → one frozen ApiConfig; every error at once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import urlsplit

from ..errors import UsageError

__all__ = ["INTERNAL_URL", "PUBLIC_URL", "ApiConfig", "environment", "own_image", "owner", "runs_locally"]

PUBLIC_URL = "https://api.machines.dev"
INTERNAL_URL = "http://_api.internal:4280"

# The prefixes that a configured token may carry, and those of tokens that are sent as FlyV1 (platform: 6.1).
_SCHEMES = ("bearer ", "flyv1 ")
_MACAROONS = ("fm1r_", "fm1a_", "fm2_")
_MAX_APP = 63


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """Where the Machines API is, whose machines are meant, and the token, which is never shown."""

    app: str
    base_url: str
    authorization: str = field(repr=False)

    @classmethod
    def from_environ(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        app: str | None = None,
        token: str | None = None,
        base_url: str | None = None,
    ) -> "ApiConfig":
        """Read FLY_APP_NAME, FLY_API_TOKEN or FLY_ACCESS_TOKEN, and FLY_FLAPS_BASE_URL; arguments overrule them.

        Without a base address it is the internal one inside a machine (FLY_MACHINE_ID is set), else the public one.
        *environ* is the process's own unless given. Raises UsageError that names every wrong value.
        """
        if environ is None:
            environ = os.environ
        errors: list[str] = []
        name, value = _first(environ, "FLY_APP_NAME") if app is None else ("app", app)
        if not value:
            errors.append("no app: name it (--app, app=), or set FLY_APP_NAME, like my-worker")
        elif len(value) > _MAX_APP or not value.replace("-", "").replace("_", "").isalnum():
            errors.append(f"{name}={value!r}: not an app's name; expected one like my-worker")
        token_name, secret = _first(environ, "FLY_API_TOKEN", "FLY_ACCESS_TOKEN") if token is None else ("token", token)
        secret = _bare(secret)
        if not secret:
            errors.append("no token: set FLY_API_TOKEN to one from `fly tokens create deploy`")
        elif any(not "!" <= letter <= "~" for letter in secret):
            errors.append(f"{token_name}: expected a token without spaces or line breaks inside; it is not shown here")
        default = INTERNAL_URL if environ.get("FLY_MACHINE_ID") else PUBLIC_URL
        if base_url is None:
            url_name, url = "FLY_FLAPS_BASE_URL", environ.get("FLY_FLAPS_BASE_URL", "").strip() or default
        else:
            url_name, url = "base_url", base_url
        url = _checked_url(url_name, url, errors)
        if errors:
            raise UsageError("\n".join(errors))
        macaroon = any(part.startswith(_MACAROONS) for part in secret.split(","))
        return cls(value, url, f"{'FlyV1' if macaroon else 'Bearer'} {secret}")

    @property
    def direct(self) -> bool:
        """Whether requests go straight to the address: plain http never takes a proxy from the environment."""
        return self.base_url.startswith("http://")

    def hide(self, content: bytes) -> bytes:
        """*content* without the token, should the platform ever repeat it."""
        return content.replace(self.authorization.partition(" ")[2].encode(), b"[token]")


def runs_locally(local: bool | None, environ: Mapping[str, str] | None = None) -> bool:
    """Whether jobs run on this machine: what was said, else WAKER_LOCAL. A missing token never does so by itself."""
    if local is not None:
        return local
    text = (os.environ if environ is None else environ).get("WAKER_LOCAL", "").strip().lower()
    if text not in ("", "0", "1", "no", "yes", "false", "true"):
        raise UsageError(f"WAKER_LOCAL={text!r}: expected 1 or 0")
    return text in ("1", "yes", "true")


def environment() -> dict[str, str]:
    """What a command that runs here inherits."""
    return dict(os.environ)


def own_image(app: str, environ: Mapping[str, str] | None = None) -> str | None:
    """The image that this very process runs, if it runs in a machine of *app* (FLY_IMAGE_REF)."""
    environ = os.environ if environ is None else environ
    return environ.get("FLY_IMAGE_REF") or None if environ.get("FLY_APP_NAME") == app else None


def owner(environ: Mapping[str, str] | None = None) -> str:
    """Who this process is, for the mark on what it makes: machine or host, and process id."""
    import socket

    environ = os.environ if environ is None else environ
    return f"{environ.get('FLY_MACHINE_ID') or socket.gethostname()}:{os.getpid()}"


def _first(environ: Mapping[str, str], *names: str) -> tuple[str, str]:
    for name in names:
        if value := environ.get(name, "").strip():
            return name, value
    return names[0], ""


def _bare(token: str) -> str:
    token = token.strip()
    while token.lower().startswith(_SCHEMES):
        token = token.partition(" ")[2].strip()
    return token


def _checked_url(name: str, text: str, errors: list[str]) -> str:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or port == 0 or parts.scheme not in ("http", "https") or "@" in parts.netloc or parts.query:
        shown = text if "@" not in text else "…@…"
        errors.append(f"{name}={shown!r}: expected an address like {PUBLIC_URL} or {INTERNAL_URL}")
    elif parts.scheme == "http" and not _is_private(host):
        errors.append(f"{name}={text!r}: the token would cross the internet in clear text; use https://")
    return text.rstrip("/").removesuffix("/v1")


def _is_private(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return "." not in host or host.endswith((".internal", ".flycast", ".localhost"))
    return address.is_private or address.is_loopback or address.is_link_local
