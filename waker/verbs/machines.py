"""waker machines: list an app's machines, and how their last runs ended."""

import argparse
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..machines import Machine

HELP = "list an app's machines, and how their last runs ended"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `waker machines` takes."""
    parser.add_argument("--app", help="whose machines (default: FLY_APP_NAME)")
    parser.add_argument("--region", help="only there, like ams")
    parser.add_argument("--state", action="append", default=[], help="only these, like stopped; repeatable")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """List them."""
    from ..machines import Machines

    found = Machines(args.app).list(states=args.state, region=args.region)
    found.sort(key=lambda machine: (machine.region, machine.id))
    if args.json:
        print(json.dumps({"machines": [_as_dict(machine) for machine in found]}))
        return 0
    print(f"{'machine':<16} {'name':<20} {'region':<6} {'state':<10} {'last start':<12} {'exit':>4}  reason")
    for machine in found:
        last = machine.last_exit
        code = "-" if last is None or last.exit_code is None else last.exit_code
        print(
            f"{machine.id:<16} {machine.name:<20} {machine.region:<6} {machine.state:<10} "
            f"{_ago(machine.started_at):<12} {code:>4}  {_reason(machine)}".rstrip()
        )
    print(f"{len(found)} machine{'s' * (len(found) != 1)}")
    return 0


def _as_dict(machine: "Machine") -> dict[str, object]:
    last = machine.last_exit
    return {
        "id": machine.id,
        "name": machine.name,
        "region": machine.region,
        "state": machine.state,
        "started_at": machine.started_at,
        "exit_code": last.exit_code if last else None,
        "exited_at": last.at if last else None,
        "reason": _reason(machine),
        "image": machine.image,
        "private_ip": machine.private_ip,
        "metadata": dict(machine.metadata),
    }


def _reason(machine: "Machine") -> str:
    """Why its last run ended, in words; and what else is unusual."""
    words, last = [], machine.last_exit
    if machine.host_status not in ("", "ok"):
        words.append(f"its host is {machine.host_status}")
    if last is not None:
        if last.oom_killed:
            words.append("out of memory")
        elif last.requested_stop:
            words.append("stopped on request")
        elif last.signal:
            words.append(f"signal {last.signal}")
        elif last.exit_code == 0:
            words.append("left by itself")
        elif last.exit_code is not None:
            words.append("failed")
        if last.restarting:
            words.append("restarted")
    return ", ".join(words)


def _ago(at: float | None) -> str:
    if at is None:
        return "-"
    seconds = max(0.0, time.time() - at)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
