"""What a machine's config comes to here: which words are run, what is around them, and what the proxy may know.

The config is one that bodies.py has cleaned. What has no meaning on one host and harms nobody by being left out
(guest sizes, dns, metrics, checks, …) is kept and shown, and noted as ignored; what would change the outcome and cannot
be done raises NotEmulatedError.
"""

import base64
import binascii
import posixpath
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .guest import GuestFile
from .knobs import Knobs
from .machine import Exposed, StopConfig
from .routing import Limits
from .shapes import WrongError, go_duration
from .states import MAX_RESTARTS
from .virtual import Program

__all__ = ["INTERVALS_S", "Image", "NotEmulatedError", "Recipe", "recipe"]

PROXY_PORT = 80
MAX_FILE = 1 << 20
MAX_KILL_TIMEOUT_S = 300.0
MEMORY_MB = 256
INTERVALS_S = {"hourly": 3600.0, "daily": 86_400.0, "weekly": 604_800.0, "monthly": 2_592_000.0}
IGNORED = ("checks", "metrics", "dns", "standbys", "cache_drive", "size", "disable_machine_autostart")


class NotEmulatedError(Exception):
    """The emulator cannot do this; its answer is 501, and the name."""


@dataclass(frozen=True, slots=True)
class Image:
    """What an image would run: its entrypoint and command, or a callable that stands for both."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    program: Program | None = None

    @classmethod
    def of(cls, what: "Sequence[str] | Program | Image") -> "Image":
        """From what `Platform(images=…)` takes: a command, a callable, or an Image."""
        if isinstance(what, Image):
            return what
        if callable(what):
            return cls(program=what)
        if isinstance(what, str):
            raise ValueError(f"images: a command is a list of words, not {what!r}")  # noqa: TRY004 - as elsewhere
        return cls(cmd=tuple(what))


@dataclass(frozen=True, slots=True)
class Recipe:
    """A config, understood."""

    commands: tuple[tuple[str, ...], ...]
    config: StopConfig
    exposed: Exposed | None
    internal_port: int | None
    env: Mapping[str, str]
    files: tuple[GuestFile, ...]
    volumes: tuple[tuple[str, str], ...]  # a path in the machine, and the volume's id or name
    interval_s: float | None
    auto_destroy: bool
    memory_mb: int
    ignored: tuple[str, ...]


def recipe(config: Mapping[str, Any], image: Image, knobs: Knobs) -> Recipe:
    """Understand *config*; raise WrongError or NotEmulatedError."""
    _refuse(config)
    exposed, port = _service(config.get("services", ()), knobs)
    stop, restart = config.get("stop_config", {}), config.get("restart", {})
    timeout = stop.get("timeout")
    return Recipe(
        commands=_commands(config, image),
        config=StopConfig(
            signal.Signals[stop.get("signal", knobs.default_kill_signal)],
            5.0 if timeout is None else min(max(0.0, go_duration(timeout)), MAX_KILL_TIMEOUT_S),
            restart.get("policy", "on-failure"),  # the default, also for scheduled machines
            restart.get("max_retries", MAX_RESTARTS),
        ),
        exposed=exposed,
        internal_port=port,
        env=_env(config.get("env", {}), "config.env", image.env),
        files=tuple(_file(file, f"config.files[{index}]") for index, file in enumerate(config.get("files", ()))),
        volumes=_volumes(config.get("mounts", ())),
        interval_s=INTERVALS_S.get(config.get("schedule", "")),
        auto_destroy=config.get("auto_destroy", False),
        memory_mb=max(1, config.get("guest", {}).get("memory_mb", MEMORY_MB)),
        ignored=tuple(
            [f"config.{name}" for name in IGNORED if config.get(name)]
            + [
                f"config.services[{index}].autostop"
                for index, service in enumerate(config.get("services", ()))
                if service.get("autostop", "off") != "off"
            ]
        ),
    )


def _refuse(config: Mapping[str, Any]) -> None:
    """What would turn out otherwise on the platform."""
    guest = config.get("guest", {})
    cannot = {
        "config.containers": config.get("containers"),
        "config.statics": config.get("statics"),
        "config.guest.gpu_kind": guest.get("gpu_kind") or guest.get("gpus"),
        "config.guest.persist_rootfs": guest.get("persist_rootfs", "never") != "never",
        "config.rootfs.persist": config.get("rootfs", {}).get("persist", "never") != "never",
        "config.restart.policy spot-price": config.get("restart", {}).get("policy") == "spot-price",
        "config.files[].secret_name": any("secret_name" in file for file in config.get("files", ())),
        "config.files[].image_config": any("image_config" in file for file in config.get("files", ())),
        "config.processes[].secrets": any(process.get("secrets") for process in config.get("processes", ())),
        "config.processes[].env_from": any(process.get("env_from") for process in config.get("processes", ())),
    }
    for name, there in cannot.items():
        if there:
            raise NotEmulatedError(name)


def _commands(config: Mapping[str, Any], image: Image) -> tuple[tuple[str, ...], ...]:
    """One for the machine, or one for each of its `processes`."""
    processes = config.get("processes", ())
    if not processes:
        return (_words(config.get("init", {}), image, "config.init"),)
    commands = []
    for index, process in enumerate(processes):
        where = f"config.processes[{index}]"
        words = _words(process, image, where)
        env = _env(process.get("env", {}), f"{where}.env", {})
        commands.append(("env", *(f"{name}={value}" for name, value in env.items()), *words) if env else words)
    return tuple(commands)


def _words(init: Mapping[str, Any], image: Image, where: str) -> tuple[str, ...]:
    """`exec` stands for all; else the entrypoint and the command, each the config's or the image's."""
    if init.get("exec"):
        return tuple(init["exec"])
    words = (*(init.get("entrypoint") or image.entrypoint), *(init.get("cmd") or image.cmd))
    if not words and image.program is None:
        raise WrongError(f"{where}: the image has no command; give exec or cmd")
    return words


def _env(env: Mapping[str, str], where: str, below: Mapping[str, str]) -> Mapping[str, str]:
    for name in env:
        if not name or "=" in name:
            raise WrongError(f"{where}: a variable's name is not empty and has no '='")
    return {**below, **env}


def _file(file: Mapping[str, Any], where: str) -> GuestFile:
    path = file.get("guest_path", "")
    if not path.startswith("/") or posixpath.normpath(path) in ("/", "//"):
        raise WrongError(f"{where}.guest_path: expected an absolute path of a file")
    if "raw_value" not in file:
        raise WrongError(f"{where}: one of raw_value and secret_name must be set")
    try:
        content = base64.b64decode(file["raw_value"], validate=True)
    except (binascii.Error, ValueError):
        raise WrongError(f"{where}.raw_value: expected base64") from None
    if len(content) > MAX_FILE:
        raise WrongError(f"{where}.raw_value: more than {MAX_FILE} bytes")
    # normpath: nothing leaves the machine's folder.
    return GuestFile(posixpath.normpath(path), content, file.get("mode", 0o644) & 0o777)


def _volumes(mounts: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    if len(mounts) > 1:
        raise WrongError("config.mounts: a machine can mount one volume at most")
    found = []
    for index, mount in enumerate(mounts):
        path, volume = mount.get("path", ""), mount.get("volume") or mount.get("name")
        if not volume or not path.startswith("/") or posixpath.normpath(path) in ("/", "//"):
            raise WrongError(f"config.mounts[{index}]: expected a volume and an absolute path")
        found.append((posixpath.normpath(path), volume))
    return tuple(found)


def _service(services: Sequence[Mapping[str, Any]], knobs: Knobs) -> tuple[Exposed | None, int | None]:
    """What the proxy makes of the first service with a port that a Flycast request has; a service without is inert."""
    for index, service in enumerate(services):
        for port in service.get("ports", ()):
            first = port.get("port", port.get("start_port"))
            last = port.get("port", port.get("end_port", first))
            if first is None or not first <= PROXY_PORT <= last:
                continue
            internal = service.get("internal_port")
            if internal is None or not 0 < internal < 65_536:
                raise WrongError(f"config.services[{index}].internal_port: expected a port")
            concurrency = service.get("concurrency", {})
            soft, hard = concurrency.get("soft_limit", 20), concurrency.get("hard_limit")
            return Exposed(Limits(soft, hard), service.get("autostart", knobs.autostart_default)), internal
    return None, None
