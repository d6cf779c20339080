"""worker: what runs in the image of a queue worker that sleeps while there is no work."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from .config import CHECKED, SETTINGS, Config, ConfigError, early_port, from_environ
from .sockets import Signals, bind, bind_doorway

if TYPE_CHECKING:
    import argparse
    import socket

__all__ = ["main"]

EXIT_USAGE = 2
USAGE = "worker up module:object  |  worker up -- COMMAND…"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code, or does not return."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:2] in (["drain", CHECKED], ["listen", CHECKED]):
        return _half(from_environ(os.environ), arguments[0], arguments[2:])
    public: socket.socket | None = None
    bound_at = 0.0
    signals = Signals()
    in_use = ""
    if arguments[:1] == ["up"] and "--help" not in arguments and "-h" not in arguments:
        # Before anything else is imported: the proxy tries to connect while we are still reading our arguments.
        signals.catch()
        port = early_port(arguments, os.environ)
        if port is not None:
            try:
                public, bound_at = bind(port), time.monotonic()
            except OSError as error:
                in_use = f"cannot listen on port {port}: {error.strerror}. Another one: --port or WORKER_PORT"
    args, target = _parse(arguments)
    if args.verb == "check":
        from .check import check

        try:
            code = check(args, os.environ)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader of our output left (`worker check --json | head`): nothing is wrong with what was checked.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the interpreter ends
            return 128 + signal.SIGPIPE
        return code
    try:
        config = from_environ(os.environ, {s.field: v for s in SETTINGS if (v := getattr(args, s.field)) is not None})
    except ConfigError as error:
        errors = [*error.errors, *([in_use] if in_use else [])]
        print("\n".join(f"worker {args.verb}: {one}" for one in errors), file=sys.stderr)
        return EXIT_USAGE
    if args.verb == "listen":
        return _listen(config)
    if args.verb == "drain":
        _drain(config, target, args.drain, args.queues)
    if public is None:
        print(f"worker up: {in_use}", file=sys.stderr)
        return EXIT_USAGE
    from .lean import import_supervisor

    import_supervisor()
    from .machine import up

    words = ["--", *target] if not isinstance(target, str) else [target]
    try:
        up(config, [args.drain or "", ",".join(args.queues), *words], public, bound_at, signals)
    except OSError as error:
        print(
            f"worker up: cannot make {config.socket}: {error.strerror}. Another place: WORKER_SOCKET", file=sys.stderr
        )
        return EXIT_USAGE


def _drain(config: Config, target: "str | list[str]", drain_name: str | None, queues: tuple[str, ...]) -> NoReturn:
    from .drainer import drain

    drain(config, target, drain_name, os.environ, queues=queues)


def _half(config: Config, verb: str, words: list[str]) -> int:
    """One of the two programs of `worker up`."""
    if verb == "drain":
        drain_name, queues, *target = words
        _drain(config, target[1:] if target[0] == "--" else target[0], drain_name or None, _names(queues))
    import gc
    import socket

    # Nothing of what is imported here is ever garbage, and looking for it costs a tenth of the import.
    gc.disable()
    from .listener import listen

    gc.freeze()
    gc.enable()
    public, doorway = (socket.socket(fileno=int(fd)) for fd in words[:2])
    return listen(config, public, doorway, bound_at=float(words[2]), under_parent=True)


def _listen(config: Config) -> int:
    bound_at = time.monotonic()
    try:
        public = bind(config.port)
        doorway = bind_doorway(config.socket)
    except OSError as error:
        where = error.filename or f"port {config.port} or {config.socket}"
        print(f"worker listen: cannot listen on {where}: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE
    from .listener import listen

    return listen(config, public, doorway, bound_at=bound_at, under_parent=False)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _parse(arguments: list[str]) -> "tuple[argparse.Namespace, str | list[str]]":
    import argparse

    parser = argparse.ArgumentParser(prog="worker", description=__doc__)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    up = verbs.add_parser("up", help="be the machine: listener and drainer, until the queue is empty", usage=USAGE)
    drain = verbs.add_parser("drain", help="the drainer alone, for a Machine with two processes")
    listen = verbs.add_parser("listen", help="the listener alone, for a Machine with two processes")
    check = verbs.add_parser("check", help="say what is wrong with the configuration before it is deployed")
    for verb in (up, drain, listen):
        options = verb.add_argument_group("settings", "each overrules the environment's variable in brackets")
        for setting in SETTINGS:
            options.add_argument(setting.flag, dest=setting.field, metavar="VALUE",
                                 help=f"{setting.help} [{setting.name}]".replace("%", "%%"))  # fmt: skip
    for verb in (up, drain):
        verb.add_argument("--drain", metavar="NAME", help="use this drain, whatever the type of the object")
        verb.add_argument(
            "--queues", metavar="NAMES", type=_names, default=(), help="only these queues of it, like high,low"
        )
        verb.add_argument(
            "target", nargs="?", metavar="module:object", help="your queue, like myapp.tasks:queue; or -- COMMAND…"
        )
    check.add_argument("target", nargs="?", metavar="module:object", help="your queue, like myapp.tasks:queue")
    check.add_argument("--file", default="fly.toml", help="the fly.toml to read (default: %(default)s)")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    command: list[str] = []
    if arguments[:1] in (["up"], ["drain"]) and "--" in arguments:
        split = arguments.index("--")
        arguments, command = arguments[:split], arguments[split + 1 :]
        if not command:
            parser.error(f"nothing after --. Usage: {USAGE}")
    args = parser.parse_args(arguments)
    if args.version:
        from importlib.metadata import version

        print(version("wake-on-request"))
        raise SystemExit(0)
    if args.verb is None:
        parser.print_help(sys.stderr)
        raise SystemExit(EXIT_USAGE)
    if args.verb in ("up", "drain"):
        if args.target is None and not command:
            parser.error(f"what to drain? Usage: {USAGE}")
        if args.target is not None and command:
            parser.error(f"either a queue or a command, not {args.target!r} and a command. Usage: {USAGE}")
    return args, command or getattr(args, "target", None) or ""
