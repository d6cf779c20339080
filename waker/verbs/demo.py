"""waker demo: the whole loop on this machine, on real input, with everything counted."""

import argparse
import json
import signal
import sys
from collections.abc import Mapping

from ..errors import UsageError

HELP = "show the whole loop: wake three machines, drain 60 jobs, stop"

MAX_JOBS = 5_000
MAX_MACHINES = 32

EPILOG = """
It makes pictures, enqueues a job for each (a checksum and a thumbnail), wakes stopped machines of the emulated
platform, waits until they have drained the queue and stopped, and reads every result back. The exit code is 0 if
nothing was lost, as many machines as asked for were woken, and each left with 0.

--json prints {"jobs": {"enqueued", "done", "lost", "duplicated"},
               "wake": {"requested", "distinct", "cold", "rounds", "elapsed_s"},
               "machines": [{"id", "exit_code", "jobs", "started_s", "billed_s", "useful_s"}]}
started_s is counted from the wake; billed_s is from started to stopped; useful_s is with a job running.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `waker demo` takes."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--jobs", type=int, default=60, metavar="N", help="pictures, and jobs (default: 60)")
    parser.add_argument("--machines", type=int, default=3, metavar="N", help="stopped machines to wake (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="repeats pictures and the platform's delays (default: 0)")
    parser.add_argument(
        "--keep",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="keep the files, here or where they are made, and say where",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, at the end")


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Show the demo; return 0 if it went well. A signal ends it, and everything that it started."""
    errors = []
    if not 1 <= args.jobs <= MAX_JOBS:
        errors.append(f"--jobs {args.jobs}: expected a number from 1 to {MAX_JOBS}")
    if not 1 <= args.machines <= MAX_MACHINES:
        errors.append(f"--machines {args.machines}: expected a number from 1 to {MAX_MACHINES}")
    if sys.platform != "linux":
        errors.append("the platform is emulated with Linux's own means (prctl, /proc): run the demo there")
    try:
        import PIL  # noqa: F401 - is it there?
    except ModuleNotFoundError:
        errors.append(
            "the demo makes pictures with Pillow, which is not installed: pip install 'wake-on-request[demo]'"
        )
    if errors:
        raise UsageError("\n".join(errors))
    from ..demo import run as course
    from ..demo import show

    noted = [0]

    def note(number: int, _: object) -> None:
        noted[0] = noted[0] or number

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, note)
    plan = course.Plan(args.jobs, args.machines, args.seed, args.keep)
    with show.Nothing() if args.json else show.for_terminal() as shown:
        result = course.run(plan, shown, environ, lambda: noted[0])
    if args.json:
        print(json.dumps(result.as_dict()))
        for problem in result.problems:
            print(f"waker demo: {problem}", file=sys.stderr)
    return 1 if result.problems else 0
