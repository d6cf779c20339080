"""waker jobs: look at the embedded queue's jobs, retry or purge dead ones; reap what one-off jobs left behind."""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..sqlite_queue import Job, SqliteQueue

HELP = "look at the embedded queue's jobs; retry or purge dead ones"

EPILOG = """
QUEUE is the queue's file, or the queue itself, like myapp.tasks:queue. The file is never made here.

  waker jobs list jobs.db                    how many jobs are in each state, and the oldest of them
  waker jobs list jobs.db --state running
  waker jobs dead jobs.db                    what has failed for good, and why
  waker jobs retry jobs.db 17953 17954       ready again, with all attempts; then: waker wake
  waker jobs retry jobs.db --all
  waker jobs purge jobs.db --all             delete the dead
  waker jobs reap --app my-app               delete the machines of one-off jobs (waker run) whose callers are gone
"""

# What fits beside the other columns; --json prints all.
MAX_TEXT = 60


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `waker jobs` takes."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in {
        "list": "count the jobs, and show the oldest",
        "dead": "show dead jobs and their errors",
        "retry": "make dead jobs ready again",
        "purge": "delete dead jobs",
    }.items():
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.add_argument("queue", metavar="QUEUE", help="the file, or module:queue")
        action.add_argument("--json", action="store_true", help="print one JSON object")
        if name in ("retry", "purge"):
            action.add_argument("ids", nargs="*", type=int, metavar="ID", help="the jobs")
            action.add_argument("--all", action="store_true", help="every dead job")
        else:
            action.add_argument("--limit", type=int, default=20, metavar="N", help="at most so many (default: 20)")
        if name == "list":
            states = ("ready", "delayed", "running", "dead")
            action.add_argument("--state", choices=states, help="only these")
    text = "delete the machines that one-off jobs left behind"
    action = actions.add_parser("reap", help=text, description=text[0].upper() + text[1:] + ".")
    action.add_argument("--app", help="whose machines (default: FLY_APP_NAME)")
    action.add_argument("--grace", default="5m", metavar="DURATION", help="after a success or a deadline (default: 5m)")
    action.add_argument("--keep-failed", default="1d", metavar="DURATION", help="after a failure (default: 1d)")
    action.add_argument("--dry-run", action="store_true", help="only show what would be deleted")
    action.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Do one thing to one queue. For ids that are not dead jobs, 1: nothing was done to those."""
    if args.action == "reap":
        return _reap(args)
    queue = _open(args.queue)
    if args.action in ("list", "dead"):
        jobs = queue.jobs("dead" if args.action == "dead" else args.state, limit=max(0, args.limit))
        counts = queue.counts()
        if args.json:
            print(json.dumps({"counts": counts._asdict(), "jobs": [job._asdict() for job in jobs]}))
        elif args.action == "dead":
            _print_dead(jobs, counts.dead)
        else:
            _print_list(jobs)
            print(", ".join(f"{count} {state}" for state, count in counts._asdict().items()))
        return 0
    if bool(args.ids) == args.all:
        from ..errors import UsageError

        raise UsageError(f"{args.action}: name the jobs by their ids, or say --all")
    change = queue.retry if args.action == "retry" else queue.purge
    changed = change(*args.ids, every=args.all)
    if args.json:
        print(json.dumps({"changed": changed}))
    else:
        print(f"{changed} {'ready again; wake a machine for them' if args.action == 'retry' else 'deleted'}")
    missing = len(set(args.ids)) - changed
    if not args.all and missing:
        print(f"{missing} of the ids are not dead jobs", file=sys.stderr)
        return 1
    return 0


def _reap(args: argparse.Namespace) -> int:
    """Delete what is left of one-off jobs. 1 if something could not be deleted."""
    import dataclasses

    from ..machines import Machines, shapes
    from ..machines.reap import reap

    done = reap(
        Machines(args.app),
        grace_s=shapes.seconds(args.grace, "--grace"),
        keep_failed_s=shapes.seconds(args.keep_failed, "--keep-failed"),
        dry_run=args.dry_run,
    )
    if args.json:
        print(json.dumps({"jobs": [dataclasses.asdict(each) for each in done]}))
    else:
        for each in done:
            what = "kept" if each.action == "leave" else "would be deleted" if args.dry_run else "deleted"
            what = f"not deleted: {each.error}" if each.error else what
            print(f"{each.machine:<16} {each.job:<18} {what}: {each.why} (made by {each.owner or 'nobody known'})")
        deleted = sum(each.action == "delete" and not each.error for each in done)
        print(f"{len(done)} job machines, {deleted} {'to delete' if args.dry_run else 'deleted'}")
    return 1 if any(each.error for each in done) else 0


def _open(name: str) -> "SqliteQueue":
    from ..errors import UsageError
    from ..load import load
    from ..sqlite_queue import SqliteQueue

    module, colon, _ = name.partition(":")
    if not colon or os.sep in name or not module.replace(".", "").isidentifier() or os.path.exists(name):
        return SqliteQueue(name, create=False)
    found = load(name)
    if not isinstance(found, SqliteQueue):
        raise UsageError(f"{name!r} is a {type(found).__qualname__}; expected a SqliteQueue, or the path of its file")
    return SqliteQueue(found.path, durability=found.durability, create=False)


def _print_list(jobs: Sequence["Job"]) -> None:
    if jobs:
        print(f"{'id':<17} {'state':<8} {'since/due':<10} {'attempts':<8} job")
    for job in jobs:
        attempts = f"{job.attempts}/{job.max_attempts}"
        print(f"{job.id:<17} {job.state:<8} {_when(job):<10} {attempts:<8} {job.task}{_call(job)}")


def _print_dead(jobs: Sequence["Job"], total: int) -> None:
    for job in jobs:
        print(f"{job.id} {job.task}{_call(job)}, dead since {_when(job)}, {job.attempts} attempts")
        for line in (job.error or "").splitlines():
            print(f"    {line}")
    print(f"{total} dead" + (f", {len(jobs)} shown" if len(jobs) < total else ""))


def _call(job: "Job") -> str:
    arguments = [json.dumps(value) for value in job.args] + [
        f"{name}={json.dumps(v)}" for name, v in job.kwargs.items()
    ]
    text = ", ".join(arguments)
    return f"({text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + '…'})"


def _when(job: "Job") -> str:
    """How long ago, or how soon: "in 90 s" for a delayed job that is due then."""
    seconds = time.time() - (job.enqueued_at if job.at is None else job.at)
    amount = abs(seconds)
    text = (
        f"{amount:.0f} s" if amount < 120 else f"{amount / 60:.0f} min" if amount < 7200 else f"{amount / 3600:.0f} h"
    )
    return f"in {text}" if seconds < 0 else f"{text} ago"
