"""Addresses that can wake a machine, and why the others never will.

Only Fly Proxy starts a stopped Machine, so a target must lead through it: the app's private Flycast address or name,
or a public address. Pure: nothing is looked up and nothing is sent.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from .errors import UsageError

__all__ = ["EXAMPLE", "Target", "parse"]

EXAMPLE = "http://[fdaa:0:6ba9:0:1::2]"

_PORTS = {"http": 80, "https": 443}
_FLYCAST = ".flycast"
_INTERNAL = ".internal"

# Every organisation's private network. An address is fdaa, 32 bits of network, 32 of host, 32 of Machine, 16 free
# (fly.io/blog/incoming-6pn-private-networks); a Flycast address belongs to an app, and its Machine bits are 0.
_PRIVATE_NETWORK = IPv6Network("fdaa::/16")
_RESOLVER = IPv6Address("fdaa::3")
_MACHINE_BITS = 0xFFFF_FFFF << 16

_USE_FLYCAST = "use the app's Flycast name, like http://my-worker.flycast, or its address from `fly ips list`"
_NEVER_WAKES = "it leads past the proxy, and only the proxy starts a stopped Machine"


@dataclass(frozen=True, slots=True)
class Target:
    """Where wakes go: *host* without brackets, *path* with its leading slash."""

    scheme: str
    host: str
    port: int
    path: str = "/"

    @property
    def netloc(self) -> str:
        """Host, in brackets if it is an IPv6 address, and the port unless it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The target as one URL."""
        return f"{self.scheme}://{self.netloc}{self.path}"

    @property
    def direct(self) -> bool:
        """Whether wakes go straight to the address: plain http never takes a proxy from the environment."""
        return self.scheme == "http"

    def serves(self, names: Iterable[str]) -> bool:
        """Whether one of *names* (app names or addresses, as in WORKER_DRAINS) is this very target."""
        return any(self._is(name) for name in names)

    def _is(self, name: str) -> bool:
        if "." not in name and ":" not in name and "/" not in name:
            name += _FLYCAST
        try:
            other = parse(name)
        except UsageError:
            return False
        return (self.host, self.port) == (other.host, other.port)

    def __str__(self) -> str:
        return self.url


def parse(text: str, *, own_address: str | None = None) -> Target:
    """Read a target: a URL, a host, `host:port`, or an IPv6 address with or without brackets.

    *own_address* is this Machine's own private address (FLY_PRIVATE_IP), if it is known.
    Raises UsageError for what can never wake anything; the message says why and what to use. It never repeats a
    password, and nothing is looked up: a name that does not exist is found out by the first wake.
    """
    address = text.strip()
    if not address:
        raise UsageError(f"no target: expected the worker app's address, like {EXAMPLE} or http://my-worker.flycast")
    scheme, rest = _split_scheme(address)
    if "@" in rest.partition("/")[0]:
        raise UsageError(f"target {scheme}://…@…: a name or password has no place in it; give the wake token as token=")
    shown = f"target {address!r}"
    try:
        parts = urlsplit(f"{scheme}://{_bracketed(rest)}")
        port = parts.port
    except ValueError:
        raise UsageError(
            f"{shown}: not an address; expected one like {EXAMPLE} or http://my-worker.flycast:8080"
        ) from None
    host = (parts.hostname or "").rstrip(".")
    if parts.query or parts.fragment or address.endswith(("?", "#")):
        raise UsageError(f"{shown}: a wake has no query and no fragment; leave out what follows the path")
    if port == 0:
        raise UsageError(f"{shown}: port 0 cannot be reached; use the service's external port, as a rule 80")
    literal = _literal(host)
    if literal is None:
        _check_name(shown, host)
    else:
        host = str(literal)
        _check_literal(shown, literal, own_address)
    if scheme == "https" and (
        host.endswith(_FLYCAST) or (isinstance(literal, IPv6Address) and literal in _PRIVATE_NETWORK)
    ):
        netloc = Target("http", host, port if port not in (None, 443) else 80).netloc
        raise UsageError(
            f"{shown}: a Flycast address has no certificate, so https never gets through; use http://{netloc}"
        )
    return Target(scheme, host, port or _PORTS[scheme], parts.path or "/")


def _split_scheme(address: str) -> tuple[str, str]:
    scheme, found, rest = address.partition("://")
    if not found:
        return "http", address
    if scheme.lower() not in _PORTS:
        raise UsageError(
            f"target {scheme}://…: a wake is an HTTP request; use http:// (or https:// for a public address)"
        )
    return scheme.lower(), rest


def _bracketed(rest: str) -> str:
    """Put an IPv6 address that stands without brackets into brackets."""
    host, slash, path = rest.partition("/")
    if host.count(":") > 1 and not host.startswith("["):
        return f"[{host}]{slash}{path}"
    return rest


def _literal(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _check_name(shown: str, host: str) -> None:
    if not host or len(host) > 253 or not all(_is_label(label) for label in host.split(".")):
        raise UsageError(f"{shown}: {host!r} is not a host name; expected one like my-worker.flycast")
    if host == "fly-local-6pn":
        raise UsageError(f"{shown}: that is this very Machine; {_NEVER_WAKES}; {_USE_FLYCAST}")
    if host == _INTERNAL[1:] or host.endswith(_INTERNAL):
        app = host.removesuffix(_INTERNAL).rpartition(".")[2]
        remedy = f"use http://{app}{_FLYCAST}" if app and not app.startswith("_") else _USE_FLYCAST
        raise UsageError(f"{shown}: a .internal name resolves to started Machines alone, and {_NEVER_WAKES}; {remedy}")
    if host == _FLYCAST[1:]:
        raise UsageError(f"{shown}: the app's name is missing; expected one like my-worker.flycast")


def _is_label(label: str) -> bool:
    # An underscore is not a host name's, but Docker Compose and some resolvers have them.
    return (
        0 < len(label) <= 63
        and label[0] != "-"
        and label[-1] != "-"
        and label.replace("-", "").replace("_", "").isalnum()
    )


def _check_literal(shown: str, address: IPv4Address | IPv6Address, own_address: str | None) -> None:
    if own_address is not None and address == _literal(own_address):
        raise UsageError(f"{shown}: that is this very Machine (FLY_PRIVATE_IP); {_NEVER_WAKES}; {_USE_FLYCAST}")
    if address.is_unspecified:
        raise UsageError(f"{shown}: that is an address to listen on, not one to send to; {_USE_FLYCAST}")
    if address.is_multicast or address.is_link_local:
        raise UsageError(f"{shown}: no app has such an address; {_USE_FLYCAST}")
    if address == _RESOLVER:
        raise UsageError(f"{shown}: that is the private network's name server; {_USE_FLYCAST}")
    if isinstance(address, IPv6Address) and address in _PRIVATE_NETWORK and int(address) & _MACHINE_BITS:
        raise UsageError(f"{shown}: that is one Machine's own private address; {_NEVER_WAKES}; {_USE_FLYCAST}")
