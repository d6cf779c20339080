"""waker fleet: make the worker machines that a wake starts, and check those that are deployed."""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..machines import Machine

HELP = "make the worker machines that a wake starts, and check those that are deployed"

EPILOG = """
  waker fleet create --count 5 --image registry.fly.io/my-worker:v1 --region ams
  waker fleet create --count 5 --image my/image -- worker up myapp.tasks:queue
  waker fleet check

create makes what is missing of --count; the machines are stopped until they are woken. check ends with 1 if something
keeps a machine from waking or stopping; its rules are those of `worker check`.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `waker fleet` takes."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    made = {}
    for name, text in {
        "create": "make stopped worker machines",
        "check": "say what keeps deployed machines from waking or stopping",
    }.items():
        made[name] = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made[name].add_argument("--app", help="whose machines (default: FLY_APP_NAME)")
        made[name].add_argument("--json", action="store_true", help="print one JSON object")
    create = made["create"]
    create.add_argument("--count", type=int, required=True, metavar="N", help="how many machines the fleet has")
    create.add_argument("--image", help="what they run (default: the image that the app runs)")
    create.add_argument("--region", default="", help="like ams, or several with commas, in turn")
    create.add_argument("--name", default="worker", help="the fleet's name, which its machines begin with")
    create.add_argument("--group", default="app", help="their process group (default: app)")
    create.add_argument("--port", type=int, default=8080, help="where the worker listens (default: 8080)")
    create.add_argument("--stop-timeout", default="5s", metavar="DURATION", help="for a job, at a stop (default: 5s)")
    create.add_argument("--size", metavar="NAME", help="like shared-cpu-2x or performance-1x")
    create.add_argument("--memory", metavar="SIZE", help="like 512mb or 2gb")
    create.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable; repeatable")
    create.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND…", help="instead of the image's own")
    made["check"].add_argument("--group", help="only this process group")


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Do one thing to the fleet of an app."""
    return _check(args) if args.action == "check" else _create(args)


def _create(args: argparse.Namespace) -> int:
    from ..client import _run
    from ..machines import Machines, fleet, shapes
    from ..machines.jobs import image_of
    from .run import pairs

    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    guest = shapes.guest(args.size, memory_mb=shapes.size_mb(args.memory, "--memory") if args.memory else None)
    config = fleet.configuration(
        args.image or "",
        command=words or None,
        port=args.port,
        stop_timeout_s=shapes.seconds(args.stop_timeout, "--stop-timeout"),
        guest=guest,
        env=pairs("--env", args.env),
    )
    machines = Machines(args.app)

    def made(machine: "Machine") -> None:
        if not args.json:
            print(f"{machine.id:<16} {machine.name:<20} {machine.region}", flush=True)

    async def do() -> "tuple[list[Machine], bool]":
        async with machines.asynchronous() as api:
            config["image"] = config["image"] or await image_of(api)
            new = await fleet.create(
                api,
                args.count,
                config,
                name=args.name,
                group=args.group,
                regions=[region.strip() for region in args.region.split(",") if region.strip()],
                made=made,
            )
            return new, any(address.private for address in await api.addresses())

    new, private = _run(do)
    if args.json:
        print(json.dumps({"made": [machine.id for machine in new], "count": args.count, "private_address": private}))
    else:
        print(f"{len(new)} made, {args.count - len(new)} were there")
        if not private:
            print(f"no request reaches them yet: fly ips allocate-v6 --private --app {machines.app}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from .. import rules
    from ..client import _run
    from ..errors import UsageError
    from ..machines import Machines, fleet

    machines = Machines(args.app)

    async def do() -> "tuple[list[rules.Finding], int]":
        async with machines.asynchronous() as api:
            return await fleet.check(api, group=args.group)

    found, count = _run(do)
    if not count:
        which = f" in group {args.group}" if args.group else ""
        raise UsageError(f"app {machines.app} has no machine{which} to check; make some: waker fleet create --count 3")
    errors = sum(finding.severity == rules.ERROR for finding in found)
    if args.json:
        listed = [dataclasses.asdict(finding) for finding in found]
        print(json.dumps({"machines": count, "errors": errors, "warnings": len(found) - errors, "findings": listed}))
        return 1 if errors else 0
    for finding in found:
        print(finding)
    summary = f"{errors} errors, {len(found) - errors} warnings" if found else "nothing is wrong"
    print(f"{count} machine{'s' * (count != 1)} of app {machines.app}: {summary}")
    return 1 if errors else 0
