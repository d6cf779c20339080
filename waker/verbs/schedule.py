"""waker schedule: scheduled machines whose starts are spread over the interval."""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..machines.schedules import Plan, Scheduled, Step

HELP = "scheduled machines whose starts are spread over the interval"

EPILOG = """
  waker schedule apply --every hourly --machines 4 --stagger 15m -- worker up myapp.tasks:queue
  waker schedule apply --every daily --dry-run -- python -m report
  waker schedule list
  waker schedule remove schedule-hourly

apply creates each machine when its turn is, so it takes up to an interval. Interrupted, it is run again: it looks at
what is there, and creates what is missing in its place.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `waker schedule` takes."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    made = {}
    for name, text in {
        "apply": "create what is missing of a schedule",
        "list": "show the scheduled machines",
        "remove": "delete the machines of a schedule",
    }.items():
        made[name] = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made[name].add_argument("--app", help="whose machines (default: FLY_APP_NAME)")
        made[name].add_argument("--json", action="store_true", help="print one JSON object")
    apply = made["apply"]
    apply.add_argument("--every", required=True, metavar="INTERVAL", help="hourly, daily, weekly or monthly")
    apply.add_argument("--machines", type=int, default=1, metavar="N", help="how many (default: 1)")
    apply.add_argument("--stagger", metavar="DURATION", help="between their starts (default: evenly)")
    apply.add_argument("--name", help="the schedule's name (default: schedule-INTERVAL)")
    apply.add_argument("--image", help="what they run in (default: the image that the app runs)")
    apply.add_argument("--region", help="like ams (default: the platform's choice)")
    apply.add_argument("--size", metavar="NAME", help="like shared-cpu-2x or performance-1x")
    apply.add_argument("--memory", metavar="SIZE", help="like 512mb or 2gb")
    apply.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable; repeatable")
    apply.add_argument("--dry-run", action="store_true", help="only show who would run when; nothing is asked or made")
    apply.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND…", help="what each of them runs")
    made["remove"].add_argument("name", metavar="NAME", help="the schedule's name")
    made["remove"].add_argument("--force", action="store_true", help="also machines that run")


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Do one thing to the schedules of an app."""
    from ..client import _run
    from ..machines import Machines, schedules

    if args.action == "apply":
        return _apply(args)
    machines = Machines(args.app)

    async def do() -> "list[Scheduled]":
        async with machines.asynchronous() as api:
            there = await schedules.look(api, getattr(args, "name", None))
            if args.action == "remove":
                await schedules.remove(api, args.name, force=args.force)
            return there

    there = _run(do)
    if args.json:
        print(json.dumps({"machines": [_as_dict(each) for each in there]}))
        return 0
    if args.action == "remove":
        print(f"schedule {args.name}: {len(there)} machine{'s' * (len(there) != 1)} deleted")
        return 0
    print(
        f"{'schedule':<20} {'slot':>4} {'every':<8} {'machine':<16} {'region':<6} {'state':<9} {'first start':<17} exit"
    )
    for each in there:
        last = each.machine.last_exit
        code = "-" if last is None or last.exit_code is None else last.exit_code
        print(
            f"{each.schedule or '-':<20} {each.slot + 1:>4} {each.every:<8} {each.machine.id:<16} "
            f"{each.machine.region:<6} {each.machine.state:<9} {_clock(each.created_at):<17} {code}"
        )
    return 0


def _apply(args: argparse.Namespace) -> int:
    from ..client import _run
    from ..errors import UsageError
    from ..machines import Machines, schedules, shapes
    from .run import pairs

    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words:
        raise UsageError("no command: write it after --, like: waker schedule apply --every hourly -- worker up app:q")
    stagger_s = shapes.seconds(args.stagger, "--stagger") if args.stagger else None
    plan = schedules.plan(args.name or f"schedule-{args.every}", args.every, args.machines, stagger_s)
    guest = shapes.guest(args.size, memory_mb=shapes.size_mb(args.memory, "--memory") if args.memory else None)
    env = shapes.environment(pairs("--env", args.env))
    shapes.command(words)
    if args.dry_run:
        todo = schedules.steps(plan, [], time.time())
        if args.json:
            print(json.dumps({"schedule": plan.name, "steps": [_step(step) for step in todo]}))
        else:
            _table(plan, todo)
        return 0
    machines = Machines(args.app)

    def told(todo: "Sequence[Step]") -> None:
        if not args.json:
            _table(plan, todo)

    def made(step: "Step") -> None:
        if not args.json and step.machine is not None:
            print(f"{_clock(time.time())} {step.slot.machine_name} is machine {step.machine.id}, {step.machine.region}",
                  flush=True)  # fmt: skip

    async def do() -> "list[Step]":
        async with machines.asynchronous() as api:
            return await schedules.apply(
                api, plan, words, image=args.image, region=args.region, guest=guest, env=env, told=told, made=made
            )

    try:
        done = _run(do)
    except KeyboardInterrupt:
        print("interrupted; run it again: what is there stays, and the rest is created in its place", file=sys.stderr)
        raise
    if args.json:
        print(json.dumps({"schedule": plan.name, "steps": [_step(step) for step in done]}))
    return 0


def _table(plan: "Plan", todo: "Sequence[Step]") -> None:
    from ..machines.schedules import NOT_PROMISED, span

    count = len(plan.slots)
    apart = f", {span(plan.stagger_s)} apart" if count > 1 else ""
    print(f"schedule {plan.name}: {count} {plan.every} machine{'s' * (count != 1)}{apart}")
    print(f"{'machine':<24} {'first start':<17} {'and then':<16} now")
    for step in todo:
        now = f"there: {step.machine.id}" if step.machine else "missing"
        print(f"{step.slot.machine_name:<24} {_clock(step.at):<17} {_then(plan.every, step.at):<16} {now}")
    print("What the platform does not promise:")
    for line in NOT_PROMISED:
        print(f"  - {line}")
    sys.stdout.flush()


def _then(every: str, at: float) -> str:
    form = {"hourly": "each hour at :%M", "daily": "daily at %H:%M", "weekly": "%As at %H:%M", "monthly": "monthly"}
    return time.strftime(form[every], time.localtime(at))


def _clock(at: float | None) -> str:
    return "-" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _step(step: "Step") -> dict[str, object]:
    machine = step.machine.id if step.machine else None
    return {"name": step.slot.machine_name, "offset_s": step.slot.offset_s, "at": step.at, "machine": machine}


def _as_dict(each: "Scheduled") -> dict[str, object]:
    last = each.machine.last_exit
    return {
        "schedule": each.schedule,
        "slot": each.slot,
        "every": each.every,
        "machine": each.machine.id,
        "region": each.machine.region,
        "state": each.machine.state,
        "created_at": each.created_at,
        "last_exit_code": last.exit_code if last else None,
    }
