"""The worker machines that a wake starts: making them, and reading what keeps deployed ones from waking or stopping."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import rules
from ..errors import UsageError
from . import shapes
from .client import AsyncMachines
from .errors import MachinesError
from .jobs import JOB
from .records import GROUP, Address, Machine

__all__ = ["FLEET", "MAX_COUNT", "check", "configuration", "create", "deployment", "findings"]

FLEET = "wake_fleet"
MAX_COUNT = 1000
WORKER_PORT = int(rules.WORKER_DEFAULTS["WORKER_PORT"])
# The Machines API's own words for what the rules speak of.
KEYS = {
    "[[services]]": "services",
    "[restart]": "restart",
    "kill_signal": "stop_config.signal",
    "kill_timeout": "stop_config.timeout",
}


def configuration(
    image: str, *, command: Sequence[str] | None = None, port: int = WORKER_PORT, stop_timeout_s: float = 5.0,
    guest: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A worker machine that a request on its private address wakes, and that leaves by itself. Pure.

    *command* stands for the image's own. `check` finds nothing wrong with it.
    """
    if not 0 < port < 65_536:
        raise UsageError(f"port {port}: expected a number from 1 to 65535")
    if not 0 < stop_timeout_s <= rules.MAX_KILL_TIMEOUT_S:
        raise UsageError(f"stop timeout {stop_timeout_s:g} s: expected up to {rules.MAX_KILL_TIMEOUT_S:.0f} s")
    variables = {"WORKER_PORT": str(port), "WORKER_STOP_TIMEOUT_S": f"{stop_timeout_s:g}", **shapes.environment(env)}
    return {
        "image": image,
        **({"init": {"exec": shapes.command(command)}} if command else {}),
        "env": variables,
        "services": [
            {
                "protocol": "tcp",
                "internal_port": port,
                "ports": [{"port": 80, "handlers": ["http"]}],
                "autostart": True,
                "autostop": "off",
                "min_machines_running": 0,
                "concurrency": {"type": "requests", "soft_limit": 1},
            }
        ],
        "restart": {"policy": "on-failure", "max_retries": 10},
        "stop_config": {"signal": "SIGTERM", "timeout": f"{stop_timeout_s:g}s"},
        **({"guest": dict(guest)} if guest else {}),
    }


async def create(
    api: AsyncMachines,
    count: int,
    config: Mapping[str, Any],
    *,
    name: str = "worker",
    group: str = "app",
    regions: Sequence[str] = (),
    made: Callable[[Machine], None] = lambda machine: None,
) -> list[Machine]:
    """Make machines until the fleet *name* has *count*; they are not started. Returns those that were made.

    If one cannot be made, those that this call made are deleted again.
    """
    shapes.name(name, "fleet")
    if not 1 <= count <= MAX_COUNT:
        raise UsageError(f"count {count}: expected a number from 1 to {MAX_COUNT}")
    there = {
        machine.name
        for machine in await api.list()
        if machine.metadata.get(FLEET) == name and machine.state not in ("destroyed", "destroying")
    }
    metadata = {GROUP: group, FLEET: name}
    new: list[Machine] = []
    try:
        for index in range(count):
            machine_name = f"{name}-{index + 1}"
            if machine_name in there:
                continue
            region = regions[index % len(regions)] if regions else None
            machine = await api.create_once(
                {**config, "metadata": metadata}, name=machine_name, region=region, skip_launch=True
            )
            new.append(machine)
            made(machine)
    except BaseException as error:
        left = await _delete(api, new)
        if left and isinstance(error, MachinesError):
            raise MachinesError(f"{error}; and what was made before could not be deleted: {', '.join(left)}") from error
        raise
    return new


async def _delete(api: AsyncMachines, machines: Sequence[Machine]) -> list[str]:
    left = []
    for machine in machines:
        try:
            await api.delete(machine.id, force=True)
        except MachinesError:
            left.append(machine.id)
    return left


async def check(api: AsyncMachines, *, group: str | None = None) -> tuple[list[rules.Finding], int]:
    """Hold what is deployed against the rules; the findings, the errors first, and how many machines were looked at."""
    addresses = await api.addresses()
    found = [machine for machine in await api.list() if machine.state not in ("destroyed", "destroying")]
    # Jobs and scheduled machines are nobody's to wake.
    workers = [
        machine
        for machine in found
        if JOB not in machine.metadata and not machine.config.get("schedule") and group in (None, machine.group)
    ]
    return findings(api.app, workers, addresses), len(workers)


def findings(app: str, machines: Sequence[Machine], addresses: Sequence[Address]) -> list[rules.Finding]:
    """What the rules find: of the app, and of its machines, those with the same trouble together. Pure."""
    known = rules.Deployment(addresses=tuple(address.ip for address in addresses), where=lambda _: f"app {app}")
    about_app = rules.findings(known, about=rules.ADDRESSES)
    same: dict[tuple[str, rules.Severity, str, str], list[str]] = {}
    for machine in machines:
        for finding in rules.findings(deployment(machine)):
            key = (finding.rule, finding.severity, finding.at, finding.says)
            same.setdefault(key, []).append(machine.id)
    found = [
        rules.Finding(rule, severity, f"{_some(ids, len(machines))}: {at}", says)
        for (rule, severity, at, says), ids in same.items()
    ]
    return sorted([*about_app, *found], key=lambda finding: finding.severity != rules.ERROR)


def _some(ids: Sequence[str], all_of_them: int) -> str:
    if len(ids) == all_of_them > 1:
        return f"all {all_of_them} machines"
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


def deployment(machine: Machine) -> rules.Deployment:
    """A deployed machine as the rules look at it. Pure."""
    config = machine.config
    restart, stop = _part(config, "restart"), _part(config, "stop_config")
    init, metrics = _part(config, "init"), _part(config, "metrics")
    words, at = init.get("exec"), "init.exec"
    if not words and init.get("cmd"):
        words, at = [*(init.get("entrypoint") or ()), *init["cmd"]], "init.cmd"
    mounts = config.get("mounts")
    return rules.Deployment(
        keys=KEYS,
        services=tuple(_service(index, service) for index, service in enumerate(machine.services)),
        restart=_text(restart.get("policy")),
        kill_signal=_text(stop.get("signal")),
        kill_timeout_s=_seconds(stop.get("timeout")),
        checks=tuple(f"checks.{name}" for name in _part(config, "checks")),
        mounts=tuple(str(mount.get("path")) for mount in mounts or () if isinstance(mount, Mapping)),
        metrics=(("metrics", str(metrics.get("path"))),) if metrics.get("path") else (),
        env={name: rules.Value(value, f"env.{name}") for name, value in machine.env.items()},
        command=rules.Command(tuple(str(word) for word in words), at) if words else None,
    )


def _service(index: int, said: Mapping[str, Any]) -> rules.Service:
    path = f"services[{index}]"
    concurrency = _part(said, "concurrency")
    autostop = said.get("autostop")
    if isinstance(autostop, bool):
        # Answers write off and stop as false and true.
        autostop = "stop" if autostop else "off"
    ports = said.get("ports")
    checks = said.get("checks")
    return rules.Service(
        path,
        internal_port=_number(said.get("internal_port")),
        ports=tuple(
            rules.Port(
                f"{path}.ports[{number}]",
                tuple(str(handler) for handler in port.get("handlers") or ()),
                port.get("force_https") is True,
                _part(port, "http_options").get("h2_backend") is True,
            )
            for number, port in enumerate(ports if isinstance(ports, list) else ())
            if isinstance(port, Mapping)
        ),
        autostart=said["autostart"] if isinstance(said.get("autostart"), bool) else None,
        autostop=_text(autostop),
        min_machines_running=_number(said.get("min_machines_running")) or 0,
        limit_type=_text(concurrency.get("type")),
        soft_limit=_number(concurrency.get("soft_limit")),
        hard_limit=_number(concurrency.get("hard_limit")) or None,
        checks=tuple(f"{path}.checks[{number}]" for number, _ in enumerate(checks if isinstance(checks, list) else ())),
    )


def _part(said: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = said.get(key)
    return part if isinstance(part, Mapping) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _seconds(value: object) -> float | None:
    """A duration: a word like 5s, or nanoseconds (the platform's documents have both)."""
    if isinstance(value, str) and value:
        try:
            return shapes.seconds(value)
        except UsageError:
            return None
    number = _number(value)
    return None if number is None else number / 1e9
