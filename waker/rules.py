"""What keeps a deployed worker from waking, draining or stopping: one table of rules.

Pure: a Deployment in, findings out. `worker check` makes Deployments from a fly.toml and a Dockerfile before they are
deployed; whoever reads a deployed Machine's configuration makes one from that. A rule's source is the page of Fly's
documentation that it stands on, or what it was observed by.
"""

import itertools
import posixpath
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from . import target as targets
from .errors import UsageError

__all__ = [
    "ADDRESSES",
    "ERROR",
    "RULES",
    "WARNING",
    "WORKER_DEFAULTS",
    "Command",
    "Deployment",
    "Finding",
    "Image",
    "Port",
    "Queue",
    "Rule",
    "Service",
    "Value",
    "findings",
    "worker_verb",
]

Severity = Literal["error", "warning"]
ERROR: Severity = "error"  # a job waits or is lost, a machine never stops, or the deploy fails
WARNING: Severity = "warning"  # it may work; say what you mean

# The settings of the worker that the rules compare with the platform's; a test holds them equal to worker/config.py.
WORKER_DEFAULTS: Mapping[str, float] = {
    "WORKER_PORT": 8080,
    "WORKER_STOP_TIMEOUT_S": 5,
    "WORKER_HOLD_S": 0.5,
    "WORKER_GREET_S": 2,
}
DEFAULT_KILL_TIMEOUT_S = 5.0
MAX_KILL_TIMEOUT_S = 300.0
# A hard limit so little above the soft one makes the proxy route requests again and again.
HARD_LIMIT_ROOM = 10
METRICS_PATH = "/_worker/metrics"
# What rules look at that only a deployed app has.
ADDRESSES = "the app's addresses"

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP")
SHELLS = ("sh", "bash", "dash", "ash", "zsh")


@dataclass(frozen=True, slots=True)
class Value:
    """A variable's value, and where it was set, like `fly.toml:7`."""

    text: str
    at: str


@dataclass(frozen=True, slots=True)
class Port:
    """An external port of a service. *path* is its place in the configuration, like `services[0].ports[1]`."""

    path: str
    handlers: tuple[str, ...] = ("http",)
    force_https: bool = False
    h2_backend: bool = False


@dataclass(frozen=True, slots=True)
class Service:
    """What the proxy knows of a machine. None is what the configuration does not say."""

    path: str
    internal_port: int | None = None
    ports: tuple[Port, ...] = ()
    autostart: bool | None = None
    autostop: str | None = None  # off, stop or suspend
    min_machines_running: int = 0
    limit_type: str | None = None  # requests or connections
    soft_limit: int | None = None
    hard_limit: int | None = None
    checks: tuple[str, ...] = ()  # the path of each


@dataclass(frozen=True, slots=True)
class Command:
    """What a machine runs; *at* is where that is said. *shell_form*: a Dockerfile's line that is not a JSON list."""

    words: tuple[str, ...]
    at: str
    shell_form: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """What a Dockerfile tells of the image. *compiled*: it compiles what it is based on."""

    base: str
    at: str
    workdir: str = "/"
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Queue:
    """An embedded queue: its file, as the machine will see it."""

    file: str
    at: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """One process group of an app, or one Machine, as far as the rules look at it.

    *where* tells the place of a path like `http_service.internal_port`, or of the nearest thing above it that exists.
    *keys* are the configuration's own words where they differ from the Machines API's. *complaints* are what could not
    be read at all: (place, sentence). None is what the configuration does not say.
    """

    where: Callable[[str], str] = lambda path: path
    keys: Mapping[str, str] = field(default_factory=dict)
    services: tuple[Service, ...] = ()
    restart: str | None = None
    restart_path: str = "restart"
    kill_signal: str | None = None
    kill_timeout_s: float | None = None
    checks: tuple[str, ...] = ()  # those of no service: the path of each
    mounts: tuple[str, ...] = ()
    metrics: tuple[tuple[str, str], ...] = ()  # (path in the configuration, URL path that is scraped)
    strategy: str | None = None
    env: Mapping[str, Value] = field(default_factory=dict)
    unknown_settings: Mapping[str, str] = field(default_factory=dict)  # name → what it may have meant, or ""
    misnamed: Mapping[str, str] = field(default_factory=dict)  # path → the word that was meant
    command: Command | None = None
    commands: Mapping[str, Command] = field(default_factory=dict)  # of every process group of the app
    image: Image | None = None
    queue: Queue | None = None
    queue_settings: tuple[tuple[str, Mapping[str, str]], ...] = ()  # (place, setting, value, risk and remedy)
    addresses: tuple[str, ...] | None = None  # of the app, where it is deployed; None: not looked at
    complaints: tuple[tuple[str, str], ...] = ()

    def key(self, name: str) -> str:
        """The configuration's own word for *name*."""
        return self.keys.get(name, name)

    def setting(self, name: str) -> float:
        """A number among the worker's settings; its default where it is not set, or is no number."""
        try:
            return float(self.env[name].text)
        except (KeyError, ValueError):
            return WORKER_DEFAULTS[name]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule found at one place."""

    rule: str
    severity: Severity
    at: str
    says: str

    def __str__(self) -> str:
        return f"{self.at}: {self.severity}: {self.says} [{self.rule}]"


# A finder yields what is wrong, as often as it is: the path or the place of it, and what the sentence is filled with.
Find = Callable[[Deployment], Iterator[tuple[str, Mapping[str, object]]]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that can be wrong. *says* is the sentence, with its remedy; *source* begins with the part of the
    platform's description that it stands on."""

    name: str
    severity: Severity
    looks_at: str
    source: str
    says: str
    find: Find


RULES: list[Rule] = []


def findings(deployment: Deployment, *, about: str | None = None) -> list[Finding]:
    """Hold one deployment against every rule, or those that look at what it is *about*."""
    return [
        Finding(rule.name, rule.severity, at if ":" in at else deployment.where(at), rule.says.format_map(facts))
        for rule in RULES
        if about in (None, rule.looks_at)
        for at, facts in rule.find(deployment)
    ]


def _rule(name: str, severity: Severity, looks_at: str, source: str, says: str) -> Callable[[Find], Find]:
    def add(find: Find) -> Find:
        RULES.append(Rule(name, severity, looks_at, source, says, find))
        return find

    return add


Finds = Iterator[tuple[str, Mapping[str, object]]]

# -- being woken -------------------------------------------------------------------------------------------------------


@_rule("unreadable", ERROR, "every value", "5 reference/configuration", "{says}")
def _unreadable(d: Deployment) -> Finds:
    for at, says in d.complaints:
        yield at, {"says": says}


@_rule(
    "no-service",
    ERROR,
    "services",
    "0.3 launch/autostop-autostart",
    "no service leads to the worker, so no request ever starts a machine: add {service} with internal_port = {port}",
)
def _no_service(d: Deployment) -> Finds:
    if not d.services:
        yield "services", {"service": d.key("[[services]]"), "port": int(d.setting("WORKER_PORT"))}


@_rule(
    "service-without-ports",
    ERROR,
    "services[].ports",
    "0.3 adcontextprotocol/adcp issue 4723",
    "{path} has no port, so the proxy never gets a request for it and starts nothing: add a port, "
    'like port = 80 with handlers = ["http"]',
)
def _no_ports(d: Deployment) -> Finds:
    for service in d.services:
        if not service.ports:
            yield service.path, {"path": service.path}


@_rule(
    "autostart-off",
    ERROR,
    "services[].autostart",
    "1.1 launch/autostop-autostart",
    "{key} = false: no request starts a machine; set it to true",
)
def _autostart_off(d: Deployment) -> Finds:
    key = d.key("autostart")
    for service in d.services:
        if service.autostart is False:
            yield f"{service.path}.{key}", {"key": key}


@_rule(
    "autostart-unset",
    WARNING,
    "services[].autostart",
    "1.1 fly.toml's page says true, the API's says false",
    "{key} is not set, and the platform's pages disagree on the default: set {key} = true",
)
def _autostart_unset(d: Deployment) -> Finds:
    for service in d.services:
        if service.autostart is None:
            yield service.path, {"key": d.key("autostart")}


@_rule(
    "misnamed",
    ERROR,
    "services[]",
    "5.5 the deploy ignores a key that it does not know",
    "{key} is not a key of this file and is ignored; it is called {meant}",
)
def _misnamed(d: Deployment) -> Finds:
    for path, meant in d.misnamed.items():
        yield path, {"key": path.rpartition(".")[2], "meant": meant}


@_rule(
    "port-mismatch",
    ERROR,
    "services[].internal_port",
    "5.2 reference/configuration",
    "internal_port = {given}, but the worker listens on {port} ({told}): make them the same",
)
def _port_mismatch(d: Deployment) -> Finds:
    port, value = int(d.setting("WORKER_PORT")), d.env.get("WORKER_PORT")
    told = f"WORKER_PORT, {value.at}" if value else "the default of WORKER_PORT"
    for service in d.services:
        if service.internal_port is not None and service.internal_port != port:
            yield f"{service.path}.internal_port", {"given": service.internal_port, "port": port, "told": told}


@_rule(
    "force-https",
    ERROR,
    "services[].ports[].force_https",
    "4 networking/flycast",
    "force_https = true: a private address has no certificate, so every wake is redirected to where nobody answers; "
    "set it to false",
)
def _force_https(d: Deployment) -> Finds:
    for service in d.services:
        for port in service.ports:
            if port.force_https:
                yield f"{port.path}.force_https", {}


@_rule(
    "no-plain-http",
    ERROR,
    "services[].ports[].handlers",
    "4 networking/flycast",
    'every port wants TLS, and a private address has no certificate: add port = 80 with handlers = ["http"]',
)
def _no_plain_http(d: Deployment) -> Finds:
    for service in d.services:
        if service.ports and all("tls" in port.handlers for port in service.ports):
            yield f"{service.path}.ports", {}


@_rule(
    "h2-backend",
    ERROR,
    "services[].ports[].http_options",
    "1.5 networking/services",
    "h2_backend = true: the worker speaks HTTP/1.1, so no wake is understood; set it to false",
)
def _h2_backend(d: Deployment) -> Finds:
    for service in d.services:
        for port in service.ports:
            if port.h2_backend:
                yield f"{port.path}.http_options.h2_backend", {}


@_rule(
    "limit-type",
    WARNING,
    "services[].concurrency.type",
    "1.5, 2 apps/concurrency",
    'concurrency type {said}: a wake is a request, and connections are pooled; set type = "requests"',
)
def _limit_type(d: Deployment) -> Finds:
    for service in d.services:
        if service.limit_type != "requests":
            said = f'= "{service.limit_type}"' if service.limit_type else "is not set (connections)"
            yield f"{service.path}.concurrency.type", {"said": said}


@_rule(
    "soft-limit",
    ERROR,
    "services[].concurrency.soft_limit",
    "1.3, 2 reference/fly-proxy-autostop-autostart",
    "soft_limit {said}: so many wakes go to a machine that is up, busy or not, before another one is started; "
    "set soft_limit = 1",
)
def _soft_limit(d: Deployment) -> Finds:
    for service in d.services:
        if service.soft_limit != 1:
            said = "is not set (20)" if service.soft_limit is None else f"= {service.soft_limit}"
            yield f"{service.path}.concurrency.soft_limit", {"said": said}


@_rule(
    "hard-limit",
    ERROR,
    "services[].concurrency.hard_limit",
    "2 reference/load-balancing",
    "hard_limit = {hard}: one wake that is held makes all others queue in the proxy; leave it out, or set it well "
    "above the soft limit, like 100",
)
def _hard_limit(d: Deployment) -> Finds:
    for service in d.services:
        if service.hard_limit is not None and service.hard_limit <= (service.soft_limit or 1):
            yield f"{service.path}.concurrency.hard_limit", {"hard": service.hard_limit}


@_rule(
    "hard-limit-close",
    WARNING,
    "services[].concurrency.hard_limit",
    "2 apps/concurrency",
    "hard_limit = {hard} is close to the soft limit: a burst of wakes is routed again and again; leave it out, or "
    "set it well above, like 100",
)
def _hard_limit_close(d: Deployment) -> Finds:
    for service in d.services:
        soft = service.soft_limit or 1
        if service.hard_limit is not None and soft < service.hard_limit < soft + HARD_LIMIT_ROOM:
            yield f"{service.path}.concurrency.hard_limit", {"hard": service.hard_limit}


@_rule(
    "no-private-address",
    ERROR,
    ADDRESSES,
    "0.3, 4 networking/flycast",
    "the app has no private address, so no wake gets to the proxy: fly ips allocate-v6 --private",
)
def _no_private_address(d: Deployment) -> Finds:
    if d.addresses is not None and not any(_is_private(address) for address in d.addresses):
        yield ADDRESSES, {}


@_rule(
    "public-address",
    WARNING,
    ADDRESSES,
    "4 networking/flycast, 11.20 manavgup/wikimind issue 831",
    "{address} is public: whoever finds it wakes machines, bots too; release it (fly ips release {address}), or set "
    "WORKER_TOKENS",
)
def _public_address(d: Deployment) -> Finds:
    for address in d.addresses or ():
        if not _is_private(address):
            yield ADDRESSES, {"address": address}


@_rule(
    "split-in-groups",
    ERROR,
    "processes",
    "0.4 launch/processes",
    "the process groups {names} are Machines of their own, where listener and drainer never meet: run `worker up` in "
    "one group",
)
def _split_in_groups(d: Deployment) -> Finds:
    verbs = {name: worker_verb(command) for name, command in d.commands.items()}
    if d.command is not None and {"listen", "drain"} <= set(verbs.values()):
        halves = [name for name, verb in verbs.items() if verb in ("listen", "drain")]
        yield d.command.at, {"names": " and ".join(halves)}


# -- draining, and stopping --------------------------------------------------------------------------------------------


@_rule(
    "autostop",
    ERROR,
    "services[].autostop",
    "0.2, 1.2 blueprints/long-running-tasks",
    '{key} = "{given}": the proxy sees no request while a job runs, and stops the machine under it, again and again; '
    'set {key} = "off", for the machine leaves by itself',
)
def _autostop(d: Deployment) -> Finds:
    key = d.key("autostop")
    for service in d.services:
        if service.autostop not in (None, "off"):
            yield f"{service.path}.{key}", {"key": key, "given": service.autostop}


@_rule(
    "autostop-unset",
    WARNING,
    "services[].autostop",
    "1.1 unset means off, and fly launch writes stop",
    '{key} is not set; say what you rely on: {key} = "off"',
)
def _autostop_unset(d: Deployment) -> Finds:
    for service in d.services:
        if service.autostop is None:
            yield service.path, {"key": d.key("autostop")}


@_rule(
    "min-machines",
    WARNING,
    "services[].min_machines_running",
    "1.1 launch/autostop-autostart",
    "min_machines_running = {given} keeps nothing up here: a worker leaves when its queue is empty; set it to 0",
)
def _min_machines(d: Deployment) -> Finds:
    for service in d.services:
        if service.min_machines_running > 0:
            yield f"{service.path}.min_machines_running", {"given": service.min_machines_running}


@_rule(
    "restart-always",
    ERROR,
    "restart.policy",
    "1.4 machines/guides-examples/machine-restart-policy",
    'restart policy "always": a machine that has drained its queue is started again for ever; '
    'set policy = "on-failure"',
)
def _restart_always(d: Deployment) -> Finds:
    if d.restart == "always":
        yield f"{d.restart_path}.policy", {}


@_rule(
    "restart-no",
    ERROR,
    "restart.policy",
    "1.4 machines/guides-examples/machine-restart-policy",
    'restart policy "{given}": a machine that failed with jobs left stays down; set policy = "on-failure"',
)
def _restart_no(d: Deployment) -> Finds:
    if d.restart in ("no", "never"):
        yield f"{d.restart_path}.policy", {"given": d.restart}


@_rule(
    "restart-unset",
    WARNING,
    "restart.policy",
    "1.4 the default depends on what made the Machine",
    'no restart policy, and its default depends on what made the machine: add {key} with policy = "on-failure"',
)
def _restart_unset(d: Deployment) -> Finds:
    if d.restart is None:
        yield d.restart_path, {"key": d.key("[restart]")}


@_rule(
    "kill-signal",
    ERROR,
    "kill_signal",
    "5.1 reference/configuration",
    '{key} = "{given}" lets no running job finish or go back to the queue; set it to "SIGTERM"',
)
def _kill_signal(d: Deployment) -> Finds:
    key = d.key("kill_signal")
    if d.kill_signal is not None and d.kill_signal not in STOP_SIGNALS:
        yield key, {"key": key, "given": d.kill_signal}


@_rule(
    "kill-signal-unset",
    WARNING,
    "kill_signal",
    "5.1 pages disagree: SIGINT or SIGTERM",
    '{key} is not set, and the platform\'s pages disagree on the default: set {key} = "SIGTERM"',
)
def _kill_signal_unset(d: Deployment) -> Finds:
    key = d.key("kill_signal")
    if d.kill_signal is None:
        yield key, {"key": key}


@_rule(
    "kill-timeout-unset",
    WARNING,
    "kill_timeout",
    "5.1 reference/configuration",
    "{key} is not set (5 s), and of that a running job has three seconds to finish: say how long yours take, here and "
    "in WORKER_STOP_TIMEOUT_S",
)
def _kill_timeout_unset(d: Deployment) -> Finds:
    key = d.key("kill_timeout")
    if d.kill_timeout_s is None:
        yield key, {"key": key}


@_rule(
    "kill-timeout-long",
    WARNING,
    "kill_timeout",
    "5.1 reference/configuration",
    "{key} = {given:g} s is more than the platform gives, {most:g} s at most",
)
def _kill_timeout_long(d: Deployment) -> Finds:
    key = d.key("kill_timeout")
    if d.kill_timeout_s is not None and d.kill_timeout_s > MAX_KILL_TIMEOUT_S:
        yield key, {"key": key, "given": d.kill_timeout_s, "most": MAX_KILL_TIMEOUT_S}


@_rule(
    "stop-timeout-long",
    ERROR,
    "kill_timeout, WORKER_STOP_TIMEOUT_S",
    "5.1 reference/configuration",
    "WORKER_STOP_TIMEOUT_S is {ours:g}, but the platform kills after {theirs:g} s ({key}), in the middle of the "
    "hand-over: make them the same",
)
def _stop_timeout_long(d: Deployment) -> Finds:
    at, facts = _timeouts(d)
    if facts["ours"] > facts["theirs"]:
        yield at, {**facts, "key": d.key("kill_timeout")}


@_rule(
    "stop-timeout-short",
    WARNING,
    "kill_timeout, WORKER_STOP_TIMEOUT_S",
    "5.1 reference/configuration",
    "the platform waits {theirs:g} s ({key}), but WORKER_STOP_TIMEOUT_S is {ours:g} and ends the drainer sooner: make "
    "them the same",
)
def _stop_timeout_short(d: Deployment) -> Finds:
    at, facts = _timeouts(d)
    if facts["ours"] < facts["theirs"]:
        yield at, {**facts, "key": d.key("kill_timeout")}


@_rule(
    "checks",
    ERROR,
    "services[].checks, checks",
    "5.6 superfly/flyctl issue 2653",
    "a deploy waits for this check of a machine that has already left, and fails after five minutes: delete it",
)
def _checks(d: Deployment) -> Finds:
    for path in (*(check for service in d.services for check in service.checks), *d.checks):
        yield path, {}


@_rule(
    "strategy",
    ERROR,
    "deploy.strategy",
    "5.5 reference/configuration",
    'strategy = "bluegreen" needs a check, and a machine that has left passes none: set it to "rolling"',
)
def _strategy(d: Deployment) -> Finds:
    if d.strategy == "bluegreen":
        yield "deploy.strategy", {}


@_rule(
    "metrics-ring",
    WARNING,
    "metrics.path",
    "5.3, 5.4 a scrape is a request like any other",
    'path = "{given}": each scrape rings as a wake does; set path = "{path}"',
)
def _metrics_ring(d: Deployment) -> Finds:
    for path, scraped in d.metrics:
        if scraped != METRICS_PATH:
            yield f"{path}.path", {"given": scraped, "path": METRICS_PATH}


# -- what the machine runs ---------------------------------------------------------------------------------------------


@_rule(
    "shell-form",
    ERROR,
    "Dockerfile: ENTRYPOINT, CMD; processes",
    "7 app-guides/multiple-processes",
    "{how} a shell, which takes the stop signal and does not pass it on, so that jobs are cut off; use the exec form, "
    "like {instead}",
)
def _shell_form(d: Deployment) -> Finds:
    if d.command is None:
        return
    # A CMD in shell form comes as a shell's words after those of the ENTRYPOINT.
    words = d.command.words[-3:] if d.command.shell_form else d.command.words
    if _behind_a_shell(words):
        how = "the shell form runs" if d.command.shell_form else "this runs"
        yield d.command.at, {"how": how, "instead": _exec_form(_script(words))}


@_rule(
    "no-worker",
    WARNING,
    "Dockerfile: ENTRYPOINT, CMD; processes",
    "0.4 app-guides/multiple-processes",
    "nothing here starts the worker (it runs `{words}`): use `worker up module:object`",
)
def _no_worker(d: Deployment) -> Finds:
    if d.command is not None and worker_verb(d.command) is None:
        yield d.command.at, {"words": shlex.join(d.command.words)}


@_rule(
    "half-a-worker",
    ERROR,
    "Dockerfile: ENTRYPOINT, CMD; processes",
    "6.3 machines/api/machines-resource",
    "`worker {verb}` is one half of a worker, and fly.toml runs one process in a machine: use `worker up`",
)
def _half_a_worker(d: Deployment) -> Finds:
    verbs = {worker_verb(command) for command in d.commands.values()}
    if d.command is not None and len({"listen", "drain"} & verbs) == 1:
        verb = worker_verb(d.command)
        if verb in ("listen", "drain"):
            yield d.command.at, {"verb": verb}


@_rule(
    "nothing-to-drain",
    ERROR,
    "Dockerfile: ENTRYPOINT, CMD; processes",
    "1.4 it would use up its restarts",
    "the worker is not told what to drain: `worker up module:object`, or `worker up -- COMMAND`",
)
def _nothing_to_drain(d: Deployment) -> Finds:
    if d.command is not None and worker_verb(d.command) == "up":
        words = _plain(d.command.words)
        if not any(word == "--" or ":" in word for word in words[words.index("up") + 1 :]):
            yield d.command.at, {}


@_rule(
    "not-compiled",
    WARNING,
    "Dockerfile: RUN",
    "9 measured: the official images ship no .pyc of the library",
    "{base} has no compiled standard library, and every cold start compiles it again, which takes two to four times "
    "as long: RUN python -m compileall over it",
)
def _not_compiled(d: Deployment) -> Finds:
    if d.image is not None and not d.image.compiled and _is_official_python(d.image.base):
        yield d.image.at, {"base": d.image.base}


# -- the worker's own settings -----------------------------------------------------------------------------------------


@_rule("unknown-setting", WARNING, "env", "5.4 a variable that nobody reads", "nobody reads {name}{meant}")
def _unknown_setting(d: Deployment) -> Finds:
    for name, meant in d.unknown_settings.items():
        yield d.env[name].at, {"name": name, "meant": f"; did you mean {meant}?" if meant else ""}


@_rule(
    "token-in-file",
    ERROR,
    "env",
    "5.4 secrets win over [env]",
    "{name} is a secret and stands in a file: delete it here, and set it with `fly secrets set`",
)
def _token_in_file(d: Deployment) -> Finds:
    for name in ("WORKER_TOKENS", "WAKER_TOKEN"):
        if name in d.env and d.env[name].text and not d.env[name].at.startswith("environment"):
            yield d.env[name].at, {"name": name}


@_rule("waker-target", ERROR, "env: WAKER_TARGET", "0.3, 4 networking/private-networking", "WAKER_TARGET: {error}")
def _waker_target(d: Deployment) -> Finds:
    value = d.env.get("WAKER_TARGET")
    if value is not None:
        try:
            targets.parse(value.text)
        except UsageError as error:
            yield value.at, {"error": error}


@_rule("worker-baton", ERROR, "env: WORKER_BATON", "0.3, 4 networking/private-networking", "WORKER_BATON: {error}")
def _worker_baton(d: Deployment) -> Finds:
    value = d.env.get("WORKER_BATON")
    if value is not None and value.text != "off":
        try:
            targets.parse(value.text)
        except UsageError as error:
            yield value.at, {"error": error}


@_rule(
    "baton-off",
    WARNING,
    "env: WORKER_BATON",
    "5.6 a deploy stops machines",
    "WORKER_BATON=off: a machine that is told to stop wakes no other one for what it leaves; that is for stopping a "
    "whole fleet on purpose",
)
def _baton_off(d: Deployment) -> Finds:
    value = d.env.get("WORKER_BATON")
    if value is not None and value.text == "off":
        yield value.at, {}


@_rule(
    "hold-zero",
    WARNING,
    "env: WORKER_HOLD_S",
    "2 the proxy spreads by requests in flight",
    "WORKER_HOLD_S=0: a wake is answered at once, so that one machine may take the wakes meant for many; try 0.5",
)
def _hold_zero(d: Deployment) -> Finds:
    if "WORKER_HOLD_S" in d.env and d.setting("WORKER_HOLD_S") == 0:
        yield d.env["WORKER_HOLD_S"].at, {}


@_rule(
    "greet-zero",
    WARNING,
    "env: WORKER_GREET_S",
    "1.5 the proxy connects about every 0.55 s",
    "WORKER_GREET_S=0: a machine with little to do leaves before the request that started it gets through, and is "
    "started again for it; 0 is for schedules and for starts through the API",
)
def _greet_zero(d: Deployment) -> Finds:
    if "WORKER_GREET_S" in d.env and d.setting("WORKER_GREET_S") == 0 and d.services:
        yield d.env["WORKER_GREET_S"].at, {}


# -- the queue ---------------------------------------------------------------------------------------------------------


@_rule(
    "queue-off-mount",
    ERROR,
    "the queue's file; mounts",
    "7 machines/runtime-environment",
    "the queue's file {file} is not on a volume ({have}): a Machine's root file system is wiped at each stop, and "
    "every job with it; put it into a mount, or use a queue that is a server",
)
def _queue_off_mount(d: Deployment) -> Finds:
    if d.queue is not None and not any(_inside(d.queue.file, mount) for mount in d.mounts):
        have = f"mounted: {', '.join(d.mounts)}" if d.mounts else "nothing is mounted"
        yield d.queue.at, {"file": d.queue.file, "have": have}


@_rule(
    "queue-one-machine",
    WARNING,
    "the queue's file; mounts",
    "5.4 one volume per Machine",
    "the queue's file {file} is on a volume, which belongs to one Machine: no other one sees its jobs; for several, "
    "use a queue that is a server",
)
def _queue_one_machine(d: Deployment) -> Finds:
    if d.queue is not None and any(_inside(d.queue.file, mount) for mount in d.mounts):
        yield d.queue.at, {"file": d.queue.file}


@_rule(
    "queue-setting",
    WARNING,
    "the queue's settings",
    "the queue library's own documentation",
    "{setting}={value}: {risk}; {remedy}",
)
def _queue_setting(d: Deployment) -> Finds:
    yield from d.queue_settings


# -- what several rules need -------------------------------------------------------------------------------------------


def _timeouts(d: Deployment) -> tuple[str, dict[str, float]]:
    """Where the drainer's time is set, what it is, and what the platform gives, in seconds."""
    value = d.env.get("WORKER_STOP_TIMEOUT_S")
    given_s = DEFAULT_KILL_TIMEOUT_S if d.kill_timeout_s is None else min(d.kill_timeout_s, MAX_KILL_TIMEOUT_S)
    at = value.at if value else d.key("kill_timeout")
    return at, {"ours": d.setting("WORKER_STOP_TIMEOUT_S"), "theirs": given_s}


def worker_verb(command: Command | None) -> str | None:
    """The verb that *command* gives to `worker`, also behind a shell or a wrapper; None if it never starts it."""
    words = [] if command is None else _plain(command.words)
    for word, verb in itertools.pairwise(words):
        if posixpath.basename(word) == "worker" and verb in ("up", "listen", "drain"):
            return verb
    return None


def _plain(words: tuple[str, ...]) -> list[str]:
    script = _script(words)
    if script is None:
        return list(words)
    try:
        return shlex.split(script)
    except ValueError:
        return script.split()


def _script(words: tuple[str, ...]) -> str | None:
    """What a shell is told to run by `-c`, if these are the words of a shell."""
    if words and posixpath.basename(words[0]) in SHELLS:
        for option, script in itertools.pairwise(words[1:]):
            if re.fullmatch(r"-[a-z]*c", option):
                return script
    return None


def _behind_a_shell(words: tuple[str, ...]) -> bool:
    script = _script(words)
    return script is not None and re.search(r"(?:^|[;&|\n])\s*exec\s+\S", script) is None


def _exec_form(script: str | None) -> str:
    words = _plain(("sh", "-c", script or ""))
    simple = words and not re.search(r"[;&|<>`\n$]", script or "")
    shown = ", ".join(f'"{word}"' for word in words) if simple else '"worker", "up", "myapp.tasks:queue"'
    return f"[{shown}]"


def _is_official_python(base: str) -> bool:
    return re.fullmatch(r"(?:docker\.io/)?(?:library/)?python(?::[^/]*)?(?:@.*)?", base) is not None


def _is_private(address: str) -> bool:
    return address.lower().startswith("fdaa:")


def _inside(path: str, folder: str) -> bool:
    return posixpath.normpath(path).startswith(posixpath.normpath(folder).rstrip("/") + "/")
