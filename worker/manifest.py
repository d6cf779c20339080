"""fly.toml and the Dockerfile beside it → the Deployments that waker/rules.py looks at, with a line for each value.

Nothing is run and nothing is sent. What a file says in a way that cannot be meant is a complaint, not an exception.
"""

import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from waker import rules
from waker.rules import Command, Deployment, Image, Port, Service, Value

from .config import SETTINGS

__all__ = ["ManifestError", "read"]

# Fly's own words for what the Machines API calls otherwise.
KEYS = {
    "autostart": "auto_start_machines",
    "autostop": "auto_stop_machines",
    "[[services]]": "[http_service]",
    "[restart]": "[[restart]]",
}
SWITCHES = {True: "stop", False: "off"}
# Read by somebody of ours, though no setting of a worker.
OTHER_NAMES = ("WAKER_TARGET", "WAKER_TOKEN", "WAKER_TIMEOUT_S", "WORKER_DRAINS", "WORKER_UNDER_PARENT")


class ManifestError(Exception):
    """A file is not there or cannot be read at all; the message names it."""


class Manifest(NamedTuple):
    """What was read: a deployment for each process group that runs the worker, [env], and the names of the files."""

    deployments: tuple[Deployment, ...]
    env: dict[str, str]
    files: tuple[str, ...]


def read(file: str, environ: Mapping[str, str]) -> Manifest:
    """Read *file* and what it names. *environ* counts on a Machine alone: elsewhere it is not what will be deployed.

    Raises ManifestError.
    """
    try:
        with open(file, encoding="utf-8") as opened:
            text = opened.read()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ManifestError(f"cannot read {file}: {why}. Another one: --file") from error
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(f"{file} is not TOML: {error}") from error
    fly = _Fly(file, text, content)
    docker, name = _docker(fly, os.path.dirname(file))
    env = {name: str(value) for name, value in fly.table("env").items()}
    return Manifest(tuple(_deployments(fly, docker, environ)), env, (file, name) if docker else (file,))


def _deployments(fly: "_Fly", docker: "_Docker | None", environ: Mapping[str, str]) -> Iterator[Deployment]:
    groups = fly.table("processes") or {"app": None}
    commands = {group: _command(fly, docker, group, words) for group, words in groups.items()}
    known = {group: command for group, command in commands.items() if command is not None}
    workers = [group for group, command in known.items() if rules.worker_verb(command)]
    for group in workers or groups:
        yield _deployment(fly, docker, environ, group, known)


def _deployment(
    fly: "_Fly", docker: "_Docker | None", environ: Mapping[str, str], group: str, commands: Mapping[str, Command]
) -> Deployment:
    command = commands.get(group)
    env = _env(fly, docker, environ, command)
    restarts = [path for path in fly.tables("restart") if fly.applies(path, group)]
    restart = restarts[-1] if restarts else "restart"  # the last block that names the group wins
    services = tuple(_services(fly, group))
    misnamed = {
        f"{service.path}.{api}": toml
        for service in services
        for api, toml in KEYS.items()
        if fly.get(f"{service.path}.{api}") is not None
    }
    known = [setting.name for setting in SETTINGS]
    unknown = {
        name: "".join(get_close_matches(name, [*known, *OTHER_NAMES], n=1))
        for name in env
        if name.startswith(("WORKER_", "WAKER_")) and name not in known and name not in OTHER_NAMES
    }
    return Deployment(
        where=fly.where,
        keys=KEYS,
        services=services,
        restart=fly.text(f"{restart}.policy"),
        restart_path=restart,
        kill_signal=fly.text("kill_signal"),
        kill_timeout_s=fly.seconds("kill_timeout"),
        checks=tuple(f"checks.{name}" for name in fly.table("checks")),
        mounts=tuple(
            mount
            for path in fly.tables("mounts")
            if fly.applies(path, group) and (mount := fly.text(f"{path}.destination"))
        ),
        metrics=tuple(
            (path, fly.text(f"{path}.path") or "/metrics")
            for path in fly.tables("metrics")
            if fly.applies(path, group) and fly.number(f"{path}.port") in [s.internal_port for s in services]
        ),
        strategy=fly.text("deploy.strategy"),
        env=env,
        unknown_settings=unknown,
        misnamed=misnamed,
        command=command,
        commands=commands,
        image=docker.image if docker else None,
        complaints=(*fly.complaints, *_wrong_settings(env)),
    )


def _services(fly: "_Fly", group: str) -> Iterator[Service]:
    for path in ("http_service", *fly.tables("services")):
        if not fly.table(path) or not fly.applies(path, group):
            continue
        if path == "http_service":
            force, h2 = fly.flag(f"{path}.force_https"), fly.flag(f"{path}.http_options.h2_backend")
            # The proxy's own two doors: 80 for http, 443 for TLS.
            ports: tuple[Port, ...] = (Port(path, ("http",), bool(force), bool(h2)), Port(path, ("tls", "http")))
        else:
            ports = tuple(
                Port(port, tuple(fly.texts(f"{port}.handlers")), bool(fly.flag(f"{port}.force_https")),
                     bool(fly.flag(f"{port}.http_options.h2_backend")))
                for port in fly.tables(f"{path}.ports")
            )  # fmt: skip
        autostop = fly.get(f"{path}.auto_stop_machines")
        yield Service(
            path=path,
            internal_port=fly.number(f"{path}.internal_port"),
            ports=ports,
            autostart=fly.flag(f"{path}.auto_start_machines"),
            autostop=SWITCHES.get(autostop, None if autostop is None else str(autostop)),
            min_machines_running=fly.number(f"{path}.min_machines_running") or 0,
            limit_type=fly.text(f"{path}.concurrency.type"),
            soft_limit=fly.number(f"{path}.concurrency.soft_limit"),
            hard_limit=fly.number(f"{path}.concurrency.hard_limit"),
            checks=tuple(c for kind in ("checks", "http_checks", "tcp_checks") for c in fly.tables(f"{path}.{kind}")),
        )


def _command(fly: "_Fly", docker: "_Docker | None", group: str, process: object) -> Command | None:
    """What a machine of *group* runs, as the platform puts it together."""
    for key in ("exec", "cmd"):
        words = fly.words(f"experimental.{key}")
        if words and (key == "exec" or process is None):
            first = () if key == "exec" else _entrypoint(fly, docker)
            return Command((*first, *words), fly.where(f"experimental.{key}"))
    if isinstance(process, str) and process.strip():
        try:
            words = shlex.split(process)
        except ValueError:
            words = process.split()
        return Command((*_entrypoint(fly, docker), *words), fly.where(f"processes.{group}"))
    if docker is None or not (docker.entrypoint or docker.cmd):
        return None
    entrypoint, cmd = docker.entrypoint, docker.cmd
    if entrypoint is not None and entrypoint.shell_form:
        return entrypoint  # CMD is ignored then
    words = [*(entrypoint.words if entrypoint else ()), *(cmd.words if cmd else ())]
    last = cmd or entrypoint
    assert last is not None  # noqa: S101 - one of them is there
    return Command(tuple(words), last.at, last.shell_form)


def _entrypoint(fly: "_Fly", docker: "_Docker | None") -> tuple[str, ...]:
    own = fly.words("experimental.entrypoint")
    return tuple(own) if own else docker.entrypoint.words if docker and docker.entrypoint else ()


def _env(
    fly: "_Fly", docker: "_Docker | None", environ: Mapping[str, str], command: Command | None
) -> dict[str, Value]:
    """The variables of a machine, as far as they are ours, from what is weakest to what is strongest."""
    env = dict(docker.env) if docker else {}
    for name, value in fly.table("env").items():
        env[name] = Value(str(value), fly.where(f"env.{name}"))
    if environ.get("FLY_MACHINE_ID"):
        env.update({name: Value(value, f"environment:{name}") for name, value in environ.items()})
    if command is not None:
        env.update(_options(command))
    return {name: value for name, value in env.items() if name.startswith(("WORKER_", "WAKER_"))}


def _options(command: Command) -> Iterator[tuple[str, Value]]:
    """The settings among the arguments, which overrule the environment."""
    words = command.words[: command.words.index("--")] if "--" in command.words else command.words
    for setting in SETTINGS:
        for index, word in enumerate(words):
            flag, found, text = word.partition("=")
            if flag == setting.flag and (found or index + 1 < len(words)):
                yield setting.name, Value(text if found else words[index + 1], command.at)


def _wrong_settings(env: Mapping[str, Value]) -> Iterator[tuple[str, str]]:
    for setting in SETTINGS:
        value = env.get(setting.name)
        if value is not None and value.text:
            try:
                setting.parse(value.text)
            except (ValueError, KeyError):
                shown = "(not shown)" if setting.field == "tokens" else repr(value.text)
                yield value.at, f"{setting.name}={shown}: expected {setting.expected}"


class _Fly:
    """A fly.toml, asked by paths like `services[0].ports[1].handlers`."""

    def __init__(self, file: str, text: str, content: dict[str, Any]) -> None:
        self._file = file
        self._content = content
        self._lines = _toml_lines(text)
        self._complaints: dict[tuple[str, str], None] = {}

    @property
    def complaints(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._complaints)

    def where(self, path: str) -> str:
        """The line of *path*, or of the nearest thing above it that has one."""
        while path:
            # A table where several may stand is the first of one, and has no number in the file.
            for name in (path, path.replace("[0]", "")):
                if name in self._lines:
                    return f"{self._file}:{self._lines[name]}"
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return f"{self._file}:1"

    def get(self, path: str) -> Any:
        found: Any = self._content
        for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
            if name and isinstance(found, list) and len(found) == 1:
                found = found[0]
            if name:
                found = found.get(name) if isinstance(found, dict) else None
            elif not isinstance(found, list):
                pass  # a table where several may stand is the first of one
            else:
                found = found[int(index)] if int(index) < len(found) else None
        return found

    def table(self, path: str) -> dict[str, Any]:
        found = self.get(path)
        if isinstance(found, list) and len(found) == 1:
            found = found[0]
        return self._expect(path, found, dict, "a table") or {}

    def tables(self, path: str) -> list[str]:
        """The path of each table of an array of tables; a single table is an array of one."""
        found = self.get(path)
        several = found if isinstance(found, list) else [] if found is None else [found]
        for index, each in enumerate(several):
            self._expect(f"{path}[{index}]", each, dict, "a table")
        return [f"{path}[{index}]" for index, each in enumerate(several) if isinstance(each, dict)]

    def text(self, path: str) -> str | None:
        found: str | None = self._expect(path, self.get(path), str, "text in quotes")
        return found

    def flag(self, path: str) -> bool | None:
        found: bool | None = self._expect(path, self.get(path), bool, "true or false")
        return found

    def number(self, path: str) -> int | None:
        found = self.get(path)
        expected = "a number without quotes"
        if isinstance(found, bool):
            self._complain(path, found, expected)
            return None
        number: int | None = self._expect(path, found, int, expected)
        return number

    def texts(self, path: str) -> list[str]:
        found = self._expect(path, self.get(path), list, 'a list, like ["http"]') or []
        return [str(each) for each in found]

    def words(self, path: str) -> list[str]:
        found = self.get(path)
        return shlex.split(found) if isinstance(found, str) else self.texts(path)

    def seconds(self, path: str) -> float | None:
        """A number of seconds, or a duration as Go writes it."""
        found = self.get(path)
        if found is None or (isinstance(found, int | float) and not isinstance(found, bool)):
            return found
        units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
        parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", str(found))
        if not parts or "".join(number + unit for number, unit in parts) != str(found):
            self._complain(path, found, 'seconds, like 30 or "30s"')
            return None
        return float(sum(float(number) * units[unit] for number, unit in parts))

    def applies(self, path: str, group: str) -> bool:
        """Whether the table at *path* is for this process group: it names it, or names none."""
        named = self.get(f"{path}.processes")
        return not isinstance(named, list) or not named or group in named

    def _expect(self, path: str, found: Any, kind: type, expected: str) -> Any:
        if found is None or isinstance(found, kind):
            return found
        self._complain(path, found, expected)
        return None

    def _complain(self, path: str, found: object, expected: str) -> None:
        name = re.sub(r"\[\d+\]$", "", path).rpartition(".")[2]
        self._complaints[self.where(path), f"{name} = {json.dumps(found, default=str)}: expected {expected}"] = None


def _toml_lines(text: str) -> dict[str, int]:
    """Path → line. A key inside an inline table has the line of the table; text in triple quotes has no keys."""
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    table, quoted = "", ""
    for number, line in enumerate(text.splitlines(), 1):
        marks = re.findall(r'"""|\'\'\'', line)
        if quoted:
            if marks.count(quoted) % 2:
                quoted = ""
            continue
        if header := re.match(r"\s*(\[\[?)\s*([^\]#]+?)\s*\]", line):
            table = _indexed(_dotted(header[2]), counts)
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = f"{table}[{counts[table]}]"
            lines.setdefault(table, number)
            lines.setdefault(re.sub(r"\[\d+\]$", "", table), number)
        elif key := re.match(
            r"""\s*((?:[A-Za-z0-9_\-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_\-]+|"[^"]*"))*)\s*=""", line
        ):
            path = f"{table}.{_dotted(key[1])}" if table else _dotted(key[1])
            lines.setdefault(path, number)
        for mark in marks:
            quoted = "" if quoted == mark else quoted or mark
    return lines


def _dotted(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


def _indexed(path: str, counts: Mapping[str, int]) -> str:
    """A header below an array of tables belongs to the array's last table."""
    done = ""
    for part in path.split(".")[:-1]:
        done = f"{done}.{part}" if done else part
        if done in counts:
            done = f"{done}[{counts[done]}]"
    last = path.rpartition(".")[2]
    return f"{done}.{last}" if done else last


class _Docker:
    """The stage of a Dockerfile that is deployed."""

    def __init__(self) -> None:
        self.entrypoint: Command | None = None
        self.cmd: Command | None = None
        self.env: dict[str, Value] = {}
        self.image = Image("", "")

    def copy(self) -> "_Docker":
        made = _Docker()
        made.entrypoint, made.cmd, made.env, made.image = self.entrypoint, self.cmd, dict(self.env), self.image
        return made


def _docker(fly: _Fly, folder: str) -> tuple[_Docker | None, str]:
    """Read the Dockerfile that *fly* names, or the one beside it; None if the image comes from elsewhere."""
    named = fly.text("build.dockerfile")
    if fly.text("build.image") or fly.text("build.builder"):
        return None, ""
    name = os.path.join(folder, named or "Dockerfile")
    try:
        with open(name, encoding="utf-8") as opened:
            text = opened.read()
    except FileNotFoundError:
        if named:
            raise ManifestError(f"{fly.where('build.dockerfile')}: there is no {name}") from None
        return None, ""
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error
    return _dockerfile(name, text, fly.text("build.build-target")), name


def _dockerfile(file: str, text: str, target: str | None) -> _Docker | None:
    stages: dict[str, _Docker] = {}
    arguments: dict[str, str] = {}
    stage: _Docker | None = None
    for number, verb, rest in _instructions(text):
        at = f"{file}:{number}"
        if verb == "ARG" and stage is None:
            name, _, default = rest.partition("=")
            arguments[name.strip()] = default.strip().strip("\"'")
        elif verb == "FROM":
            if stage is not None and target is not None and target in stages:
                break
            words = [word for word in rest.split() if not word.startswith("--")]
            base = re.sub(r"\$\{?(\w+)(?::-[^}]*)?\}?", lambda m: arguments.get(m[1], m[0]), words[0] if words else "")
            stage = stages[base].copy() if base in stages else _Docker()
            if base not in stages:
                stage.image = Image(base, at)
            stages[words[2] if len(words) > 2 else str(len(stages))] = stage
        elif stage is None:
            continue
        elif verb == "ENTRYPOINT":
            stage.entrypoint, stage.cmd = _run(rest, at), None
        elif verb == "CMD":
            stage.cmd = _run(rest, at)
        elif verb == "ENV":
            stage.env.update(_env_words(rest, at))
        elif verb == "WORKDIR":
            workdir = os.path.join(stage.image.workdir, rest.strip().strip("\"'"))
            stage.image = Image(stage.image.base, stage.image.at, workdir, stage.image.compiled)
        elif verb == "RUN" and "compileall" in rest:
            stage.image = Image(stage.image.base, stage.image.at, stage.image.workdir, True)
    return stages.get(target, stage) if target is not None else stage


def _instructions(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, VERB, the rest in one line) of each instruction; comments and here-documents left out."""
    begun, parts, ends = 0, [], []  # type: int, list[str], list[str]
    for number, line in enumerate(text.splitlines(), 1):
        if ends:
            if line.strip() == ends[0]:
                ends.pop(0)
            continue
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        begun = begun or number
        more = line.rstrip().endswith("\\")
        parts.append(line.rstrip().removesuffix("\\").strip())
        if not more:
            verb, _, rest = " ".join(parts).partition(" ")
            if verb.upper() in ("RUN", "COPY", "ADD"):
                ends = re.findall(r"<<-?[\"']?(\w+)", rest)
            yield begun, verb.upper(), rest.strip()
            begun, parts = 0, []


def _run(rest: str, at: str) -> Command:
    """The exec form, which is a JSON list of texts; anything else is for the shell."""
    try:
        words = json.loads(rest)
    except ValueError:
        words = None
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        return Command(tuple(words), at)
    return Command(("/bin/sh", "-c", rest), at, shell_form=True)


def _env_words(rest: str, at: str) -> dict[str, Value]:
    try:
        words = shlex.split(rest)
    except ValueError:
        words = rest.split()
    if words and "=" not in words[0]:
        return {words[0]: Value(" ".join(words[1:]), at)}
    return {name: Value(value, at) for name, _, value in (word.partition("=") for word in words)}
