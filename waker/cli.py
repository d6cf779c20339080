"""waker: wake machines, watch queues, look at jobs, and run the platform on this machine."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

__all__ = ["main"]

# One module per verb in waker/verbs/, imported only when it is used. The text is what `waker --help` shows.
VERBS = {
    "wake": "wake stopped machines and report which answered",
    "watch": "wake for a backlog and for due times, as a safety net beside the nudges",
    "jobs": "look at the embedded queue's jobs; retry or purge dead ones; reap what one-off jobs left",
    "run": "run a command on a machine of its own and end with its exit code",
    "schedule": "scheduled machines whose starts are spread over the interval",
    "machines": "list an app's machines, and how their last runs ended",
    "fleet": "make the worker machines that a wake starts, and check those that are deployed",
    "emulate": "run the platform on this machine, in the foreground",
    "demo": "show the whole loop: wake three machines, drain 60 jobs, stop",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code. Bad input is a sentence on stderr and 2, Ctrl-C is 130."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="waker", description=__doc__)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if arguments[:1] == [name]:
            _module(name).arguments(verb)
    args = parser.parse_args(arguments)
    if args.version:
        from importlib.metadata import version

        print(version("wake-on-request"))
        return 0
    if args.verb is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        code: int = _module(args.verb).run(args, os.environ)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output left (`waker jobs list | head`): nothing is wrong, and nobody is there to tell.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the interpreter ends
        return 128 + signal.SIGPIPE
    except Exception as error:
        from .errors import WakeError

        if not isinstance(error, WakeError):
            raise
        print(f"waker {args.verb}: {error}", file=sys.stderr)
        return error.exit_code


def _module(verb: str):  # type: ignore[no-untyped-def]  # a module, by the contract in waker/verbs/__init__.py
    return importlib.import_module(f".verbs.{verb}", __package__)
