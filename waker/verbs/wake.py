"""waker wake: wake stopped machines and report which answered."""

import argparse
import json
from collections.abc import Mapping

HELP = "wake stopped machines and report which answered"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `waker wake` takes."""
    parser.add_argument("target", nargs="?", metavar="TARGET", help="the worker app's address (default: WAKER_TARGET)")
    parser.add_argument("--machines", type=int, default=1, metavar="N", help="how many distinct machines (default: 1)")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="for the whole call (default: WAKER_TIMEOUT_S)"
    )
    parser.add_argument("--hold", type=float, metavar="SECONDS", help="how long to ask the answers to be held")
    parser.add_argument(
        "--token-env",
        default="WAKER_TOKEN",
        metavar="NAME",
        help="the variable with the wake token (default: WAKER_TOKEN)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Wake; print the report. A call in which nobody answered is an error, fewer machines than asked for is not."""
    from ..client import HOLD_S, Waker
    from ..errors import UsageError

    token = environ.get(args.token_env)
    if token is None and args.token_env != "WAKER_TOKEN":  # noqa: S105 - a name
        raise UsageError(f"--token-env {args.token_env}: that variable is not set")
    waker = Waker(args.target, token=token, timeout_s=args.timeout, hold_s=HOLD_S if args.hold is None else args.hold)
    report = waker.wake(args.machines)
    if args.json:
        print(json.dumps(report.as_dict()))
        return 0
    print(f"{'machine':<16} {'found':<6} {'busy':<5} seconds")
    for machine in report.machines:
        found, busy = "cold" if machine.cold else "up", "yes" if machine.busy else "no"
        print(f"{machine.id:<16} {found:<6} {busy:<5} {machine.elapsed_s:.3f}")
    missing = f", {report.missing} missing" if report.missing else ""
    if report.missing and any(machine.busy for machine in report.machines):
        missing += "; a busy one does not count, but it does read its queue after this wake"
    rounds = f"{report.rounds} round{'s' * (report.rounds != 1)}"
    print(f"{report.distinct} of {report.requested} machines in {report.elapsed_s:.3f} s, {rounds}{missing}")
    return 0
