"""Environment and arguments → one frozen Config; every error at once.

This is the only file of the package that knows the names of the environment's variables. `SETTINGS` is the table that
the help texts and the README are made from.
"""

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["SETTINGS", "Config", "ConfigError", "Setting", "early_port", "from_environ", "to_environ"]

# The library has to stop this long before the platform kills the machine: what is left is for the baton,
STOP_MARGIN_S = 2.0
# and so long before it, a drainer that is still there is killed.
KILL_MARGIN_S = 0.5
# Set by `worker up` for its two children alone.
UNDER_PARENT = "WORKER_UNDER_PARENT"
# What a machine is called where no platform names it.
LOCAL = "local"
# From `worker up` to its two halves: the words that follow were checked, and each has its place. A parser for a command
# line costs a start more than reading all of the settings.
CHECKED = "--checked"
# A unix socket's path is at most 107 bytes on Linux.
MAX_SOCKET_PATH = 107


class ConfigError(Exception):
    """The configuration cannot be used; `errors` holds one sentence for each thing that is wrong."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


class Config(NamedTuple):
    """Everything `worker` was told, checked."""

    port: int
    linger_s: float
    hold_s: float
    greet_s: float
    boot_s: float
    wedge_s: float
    exit_s: float
    stop_timeout_s: float
    broker_retry_s: float
    tokens: tuple[str, ...]
    baton: str  # a URL, or "" for off
    replay: bool
    socket: str
    machine: str
    app: str
    under_parent: bool  # `worker up` started this process, and looks after what it leaves

    @property
    def drain_stop_s(self) -> float:
        """Seconds that the library has after a stop signal to finish or to put back what it runs."""
        return max(self.stop_timeout_s - STOP_MARGIN_S, self.stop_timeout_s / 2)

    @property
    def kill_s(self) -> float:
        """Seconds between a stop signal and SIGKILL for the drainer."""
        return max(self.stop_timeout_s - KILL_MARGIN_S, self.stop_timeout_s * 3 / 4)

    @property
    def platform_id(self) -> str:
        """The platform's name for this machine; "" elsewhere, where several machines may be called the same."""
        return "" if self.machine == LOCAL else self.machine

    @property
    def mark(self) -> str:
        """The file that keeps a closed door closed for this run of the machine."""
        return self.socket + ".closed"

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in zip(self._fields, self, strict=True) if k != "tokens")
        return f"Config({shown}, tokens={len(self.tokens)} of them)"


class Setting(NamedTuple):
    """One variable: how it is read, what it is without being set, and how it is explained."""

    name: str
    field: str
    default: str
    parse: Callable[[str], object]
    expected: str  # ends the sentence "NAME='value': expected …"
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.field.replace("_", "-")


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65535:
        raise ValueError(text)
    return port


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86_400:  # also refuses nan
        raise ValueError(text)
    return value


def _positive(text: str) -> float:
    value = _seconds(text)
    if value == 0:
        raise ValueError(text)
    return value


def _tokens(text: str) -> tuple[str, ...]:
    tokens = tuple(text.replace(",", " ").split())
    if not tokens or any(not token.isascii() or not token.isprintable() for token in tokens):
        raise ValueError("not printable ASCII")
    return tokens


def _baton(text: str) -> str:
    if text == "off":
        return ""
    if not text.startswith(("http://", "https://")) or len(text.split("://", 1)[1]) == 0:
        raise ValueError(text)
    return text.rstrip("/")


def _replay(text: str) -> bool:
    return {"off": False, "elsewhere": True}[text]


def _socket(text: str) -> str:
    path = os.path.abspath(text)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ValueError(text)
    return path


SETTINGS = (
    Setting("WORKER_PORT", "port", "8080", _port, "a port, like 8080",
            "port the listener answers on, IPv4 and IPv6; `internal_port` in fly.toml"),
    Setting("WORKER_LINGER_S", "linger_s", "1", _seconds, "seconds, like 2.5",
            "stay this long after the last job, in case more comes; a restart costs about as much. 0 leaves at once"),
    Setting("WORKER_HOLD_S", "hold_s", "0.5", _seconds, "seconds, like 0.5",
            "hold an answer at most so long, so that the proxy sends the next wake to another machine; 0 never holds"),
    Setting("WORKER_GREET_S", "greet_s", "2", _seconds, "seconds, like 2",
            "wait this long after the start for the request that started the machine; 0 where no request does"),
    Setting("WORKER_STOP_TIMEOUT_S", "stop_timeout_s", "5", _positive, "seconds above 0, like 5",
            "the platform's `kill_timeout`; the drainer gets two seconds less, the rest is for handing over"),
    Setting("WORKER_TOKENS", "tokens", "", _tokens, "tokens of printable ASCII, separated by commas",
            "accept only requests with `Authorization: Bearer` and one of these; several during a rotation"),
    Setting("WORKER_BATON", "baton", "", _baton, "off, or a URL like http://my-worker.flycast",
            "where a machine that is told to stop sends a wake for what it leaves, http://$FLY_APP_NAME.flycast unless "
            "set; `off` when you mean to stop everything"),
    Setting("WORKER_REPLAY", "replay", "off", _replay, "off or elsewhere",
            "answer a closed door with `fly-replay: elsewhere=true`, for apps with several machines"),
    Setting("WORKER_SOCKET", "socket", "", _socket, f"a path of at most {MAX_SOCKET_PATH} bytes",
            "the unix socket between drainer and listener; default: a private place of this machine"),
    Setting("WORKER_BOOT_S", "boot_s", "60", _positive, "seconds above 0, like 60",
            "refuse wakes if no drainer is ready this long after the start"),
    Setting("WORKER_WEDGE_S", "wedge_s", "60", _positive, "seconds above 0, like 60",
            "kill a drainer that was rung, runs no job and shows no sign of life for so long"),
    Setting("WORKER_EXIT_S", "exit_s", "10", _positive, "seconds above 0, like 10",
            "kill a drainer that is still there so long after it left"),
    Setting("WORKER_BROKER_RETRY_S", "broker_retry_s", "30", _seconds, "seconds, like 30",
            "retry a broker that is down for so long before leaving with 75, so that restarts are not used up"),
)  # fmt: skip


def from_environ(environ: Mapping[str, str], overrides: Mapping[str, str] | None = None) -> Config:
    """Read *environ* and *overrides* (field name → text, from the command line).

    Raises ConfigError with one sentence for each value that is wrong.
    """
    errors: list[str] = []
    values: dict[str, object] = {}
    for setting in SETTINGS:
        text = (overrides or {}).get(setting.field)
        shown = setting.flag if text is not None else setting.name
        if text is None:
            text = environ.get(setting.name) or setting.default
        if text == "" and shown == setting.name:
            values[setting.field] = ()
            continue
        try:
            values[setting.field] = setting.parse(text)
        except (ValueError, KeyError):
            value = "(not shown)" if setting.field == "tokens" else repr(text)
            errors.append(f"{shown}={value}: expected {setting.expected}")
    if errors:
        raise ConfigError(errors)
    machine, app = environ.get("FLY_MACHINE_ID", ""), environ.get("FLY_APP_NAME", "")
    if values["baton"] == ():
        values["baton"] = f"http://{app}.flycast" if app else ""
    if values["socket"] == ():
        values["socket"] = _default_socket(environ, machine or f"port-{values['port']}")
    under_parent = environ.get(UNDER_PARENT) == "1"
    return Config(machine=machine or LOCAL, app=app, under_parent=under_parent, **values)  # type: ignore[arg-type]  # each parser gives its field's type


def to_environ(config: Config) -> dict[str, str]:
    """The variables with which `worker up` tells *config* to its two children."""
    texts = {setting.name: str(getattr(config, setting.field)) for setting in SETTINGS}
    texts["WORKER_TOKENS"] = ",".join(config.tokens)
    texts["WORKER_BATON"] = config.baton or "off"
    texts["WORKER_REPLAY"] = "elsewhere" if config.replay else "off"
    texts[UNDER_PARENT] = "1"
    return texts


def early_port(arguments: list[str], environ: Mapping[str, str]) -> int | None:
    """The port, before anything else is read or imported; None if it cannot be told yet or is wrong."""
    before_command = arguments[: arguments.index("--")] if "--" in arguments else arguments
    text = environ.get("WORKER_PORT") or "8080"
    for index, argument in enumerate(before_command):
        if argument == "--port":
            text = before_command[index + 1] if index + 1 < len(before_command) else ""
        elif argument.startswith("--port="):
            text = argument[len("--port=") :]
    try:
        return _port(text)
    except ValueError:
        return None


def _default_socket(environ: Mapping[str, str], machine: str) -> str:
    """A place that two machines on one host never share, nor two boots of one machine."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read(8)
    except OSError:
        boot = "boot"
    name = f"worker-{os.getuid()}-{boot}-{machine}"
    path = os.path.join(environ.get("TMPDIR") or "/tmp", name, "door")  # noqa: S108 - the folder is made 0700 and ours
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH - len(".closed"):
        return path
    import hashlib

    return f"/tmp/worker-{os.getuid()}-{hashlib.sha256(path.encode()).hexdigest()[:16]}/door"  # noqa: S108 - same
