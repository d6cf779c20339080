"""waker run: run a command on a machine of its own and end with its exit code."""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..machines.jobs import JobResult, Progress

HELP = "run a command on a machine of its own and end with its exit code"

# As `timeout` and `docker run` have them: a job's own codes are below.
EXIT_TIMED_OUT = 124
EXIT_NOT_RUN = 125
EXIT_UNKNOWN = 75

EPILOG = f"""
The machine is deleted if the command ends with 0, and kept for a look otherwise.
Ends with the command's exit code.
{EXIT_TIMED_OUT}: its time was over. {EXIT_NOT_RUN}: it has not run. {EXIT_UNKNOWN}: nobody knows if it has.

  waker run --app my-app --region ams --memory 512mb -- python -m report daily
  waker run --image curlimages/curl --timeout 2m -- curl -sSf https://example.com
  waker run --local -- python -m report daily        here, without an account
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `waker run` takes."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--app", help="whose machine it becomes, and whose secrets it sees (default: FLY_APP_NAME)")
    parser.add_argument("--image", help="what it runs in (default: the image that the app runs)")
    parser.add_argument("--region", help="like ams (default: the platform's choice)")
    parser.add_argument("--size", metavar="NAME", help="like shared-cpu-2x or performance-1x")
    parser.add_argument("--cpus", type=int, metavar="N", help="how many CPUs")
    parser.add_argument("--memory", metavar="SIZE", help="like 512mb or 2gb")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable; repeatable")
    parser.add_argument(
        "--file", action="append", default=[], metavar="PATH=FILE", help="a local file, and its place there; repeatable"
    )
    parser.add_argument("--mount", metavar="VOLUME:PATH", help="a volume's id, and its place there")
    parser.add_argument(
        "--timeout", metavar="DURATION", help="for its run, like 90s or 15m; then it is stopped and kept"
    )
    parser.add_argument("--keep", action="store_true", help="do not delete the machine when the command succeeds")
    parser.add_argument("--local", action="store_true", default=None, help="run it here (also with WAKER_LOCAL=1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND…", help="what to run")


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Run it; print where it is, and how it ended."""
    from ..errors import UsageError
    from ..machines import config as settings
    from ..machines import jobs, shapes
    from ..machines.errors import JobUnknown, MachinesError

    size, cpus, memory = args.size, args.cpus, args.memory
    volume, colon, path = (args.mount or "").partition(":")
    if args.mount and not (colon and volume):
        raise UsageError(f"--mount {args.mount!r}: expected VOLUME:PATH, like vol_123456789:/data")
    options: jobs.JobOptions = {
        "app": args.app,
        "image": args.image,
        "region": args.region,
        "guest": shapes.guest(size, cpus=cpus, memory_mb=shapes.size_mb(memory, "--memory") if memory else None),
        "env": pairs("--env", args.env),
        "files": {there: _content(here) for there, here in pairs("--file", args.file).items()},
        "mounts": {path: volume} if args.mount else None,
        "timeout_s": shapes.seconds(args.timeout, "--timeout") if args.timeout else None,
        "keep": args.keep,
        "local": args.local,
    }
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words:
        raise UsageError("no command: write it after --, like: waker run -- curl https://example.com")
    # A stop of ours is a stop of the job's, as Ctrl-C is: its machine is deleted.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    local = settings.runs_locally(args.local, environ)
    options["local"] = local
    show = _Show(quiet=args.json or local)
    try:
        with show:
            options["on_progress"] = show.see
            result = jobs.run(words, **options)
    except JobUnknown as error:
        print(f"waker run: {error}", file=sys.stderr)
        return EXIT_UNKNOWN
    except MachinesError as error:
        print(f"waker run: {error}", file=sys.stderr)
        return EXIT_NOT_RUN
    if args.json:
        print(json.dumps(result.as_dict()))
    elif not result.local:
        _print(result)
    if result.timed_out:
        if not args.json:
            print(f"waker run: stopped after {args.timeout}", file=sys.stderr)
        return EXIT_TIMED_OUT
    return 1 if result.exit_code is None else result.exit_code


def pairs(option: str, texts: list[str]) -> dict[str, str]:
    """NAME=VALUE, as often as it was given."""
    from ..errors import UsageError

    wrong = next((text for text in texts if not text.partition("=")[0] or "=" not in text), None)
    if wrong is not None:
        name = wrong.partition("=")[0]
        raise UsageError(f"{option} {name!r}: expected NAME=VALUE")
    return dict(text.split("=", 1) for text in texts)


def _content(path: str) -> bytes:
    from ..errors import UsageError

    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"--file {path}: {error.strerror}") from error


def _print(result: "JobResult") -> None:
    print(f"{result}, {result.elapsed_s:.1f} s", file=sys.stderr)
    if result.kept:
        print("its machine is kept; look at it, then delete it:", file=sys.stderr)
    else:
        print(f"its output: {result.output}", file=sys.stderr)
    for step in result.next_steps:
        print(f"  {step}", file=sys.stderr)


class _Show:
    """State and seconds on stderr: one line that is written again on a terminal, else a line per change."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._live = not quiet and sys.stderr.isatty()
        self._began = time.monotonic()
        self._text = ""
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "_Show":
        if self._live:
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._live:
            self._ticker.join()
            sys.stderr.write("\r\x1b[K")

    def see(self, progress: "Progress") -> None:
        """Take note of a change."""
        self._text = f"{progress.state:<10} {progress.machine}"
        if not self._quiet and not self._live:
            print(f"{progress.elapsed_s:7.1f} s  {self._text}".rstrip(), file=sys.stderr, flush=True)

    def _tick(self) -> None:
        while not self._over.wait(0.2):
            sys.stderr.write(f"\r\x1b[K{time.monotonic() - self._began:7.1f} s  {self._text}")
            sys.stderr.flush()
