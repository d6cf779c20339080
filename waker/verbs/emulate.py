"""`waker emulate`: the platform on this machine, in the foreground."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from ..emulator import Event, Platform

__all__ = ["HELP", "arguments", "run"]

HELP = "run the platform on this machine, in the foreground"

EPILOG = """
Everything after the options is the command that each machine runs; write -- before it if it has options of its own.
The machines are stopped at the beginning; a request to the printed address starts them as the platform's proxy does.
They inherit this environment (without FLY_*); a machine of its own gets PORT, WORKER_PORT, TMPDIR and the FLY_* names.

The Machines API listens too; the printed environment points any client at it. What an image would run is said by
--image; registry.fly.io/APP:emulated is the app's own. Whoever has the token runs commands on this machine.

  waker emulate --machines 3 -- worker up myapp.tasks:queue
  waker emulate --machines 0 --image 'alpine=sh' --region ams,fra
  waker emulate --process 'worker listen' --process 'worker drain myapp.tasks:queue'
  waker emulate --knob soft_limit_reading=at-or-above --fault drop_connect=0.2 --seed 7 -- worker up myapp.tasks:queue
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--machines", type=int, default=3, metavar="N", help="how many machines exist (default 3)")
    parser.add_argument("--app", default="my-worker", help="the app's name (default my-worker)")
    parser.add_argument("--region", default="ams", help="region, or several with commas; the first is the proxy's own")
    parser.add_argument("--api-port", type=_port, default=0, help="the Machines API's port (default: a free one)")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="what an image runs that a client asks the API for; NAME may be *; repeatable",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=0, help="the proxy's port (default: a free one)")
    parser.add_argument(
        "--soft-limit", type=int, default=1, metavar="N", help="requests in flight per machine (default 1)"
    )
    parser.add_argument("--hard-limit", type=int, metavar="N", help="and at most (default: no limit)")
    parser.add_argument("--restart", default="on-failure", help="on-failure (default), always or no")
    parser.add_argument("--kill-signal", metavar="NAME", help="stop signal, like SIGTERM (default: a knob)")
    parser.add_argument(
        "--kill-timeout", type=float, default=5.0, metavar="S", help="seconds until the end (default 5)"
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the machines; repeatable")
    parser.add_argument(
        "--process", action="append", metavar="COMMAND", help="several commands in each machine; repeatable"
    )
    parser.add_argument(
        "--knob", action="append", default=[], metavar="NAME=VALUE", help="choose a reading; repeatable"
    )
    parser.add_argument(
        "--fault", action="append", default=[], metavar="NAME=P", help="probability, or 1x2; repeatable"
    )
    parser.add_argument("--seed", type=int, default=0, help="repeats delays, choices and faults (default 0)")
    parser.add_argument("--json", action="store_true", help="print events as JSON, one object a line")
    parser.add_argument("--verbose", action="store_true", help="print the events of single requests too")
    parser.add_argument("--list-knobs", action="store_true", help="print every knob and exit")
    parser.add_argument("--list-faults", action="store_true", help="print every fault and exit")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND…", help="what each machine runs")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a port up to 65535, or 0 for a free one")
    return int(text)


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Run the platform until Ctrl-C or SIGTERM; then stop the machines as the platform does."""
    import asyncio

    from ..emulator import FAULTS, Knobs
    from ..emulator.knobs import shown

    if args.list_knobs:
        for knob in Knobs():
            choices = f" ({' | '.join(knob.choices)})" if knob.choices else ""
            print(f"{knob.name}={shown(knob.value)}{choices}\n    {knob.doc} [{knob.source}]")
        return 0
    if args.list_faults:
        for name, doc in FAULTS.items():
            print(f"{name}\n    {doc}")
        return 0
    return asyncio.run(_serve(_platform(args, environ), json_lines=args.json, verbose=args.verbose))


def _platform(args: argparse.Namespace, environ: Mapping[str, str]) -> "Platform":
    from ..emulator import Faults, Knobs, Platform

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    try:
        return Platform(
            command or None,
            processes=[shlex.split(process) for process in args.process] if args.process else None,
            machines=args.machines,
            app=args.app,
            region=[region.strip() for region in args.region.split(",")],
            soft_limit=args.soft_limit,
            hard_limit=args.hard_limit,
            restart=args.restart,
            kill_signal=args.kill_signal,
            kill_timeout_s=args.kill_timeout,
            env={**environ, **_pairs("--env", args.env)},
            host=args.host,
            port=args.port,
            api=True,
            api_port=args.api_port,
            images={name: shlex.split(words) for name, words in _pairs("--image", args.image).items()},
            knobs=Knobs().changed(_pairs("--knob", args.knob)),
            faults=Faults(**_pairs("--fault", args.fault)),
            seed=args.seed,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    wrong = [text for text in texts if not text.partition("=")[0] or "=" not in text]
    if wrong:
        raise UsageError(f"{option} {wrong[0]!r}: expected NAME=VALUE")
    return dict(text.split("=", 1) for text in texts)


async def _serve(platform: "Platform", *, json_lines: bool, verbose: bool) -> int:
    import asyncio
    import signal

    stop = asyncio.Event()

    def show(event: "Event") -> None:
        if verbose or json_lines or not event.type.startswith(("request.", "api.answered")):
            try:
                print(json.dumps(event.as_dict()) if json_lines else event, flush=True)
            except BrokenPipeError:
                # The reader left (`waker emulate … | head`): so do we, in order.
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the interpreter ends
                stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    platform.on_event(show)
    try:
        await platform.__aenter__()
    except OSError as error:
        raise UsageError(f"cannot listen: {error.strerror or error}; choose another --host or --port") from error
    try:
        if json_lines:
            print(json.dumps({"type": "environment", **platform.environment}), flush=True)
        else:
            _explain(platform)
        await stop.wait()
        stop.clear()
        stopping = asyncio.ensure_future(platform.stop_all())
        again = asyncio.ensure_future(stop.wait())
        # A second signal kills what still runs: closing the platform does.
        await asyncio.wait({stopping, again}, return_when=asyncio.FIRST_COMPLETED)
        for task in (stopping, again):
            task.cancel()
        await asyncio.gather(stopping, again, return_exceptions=True)
        if not json_lines:
            _bill(platform)
    finally:
        await platform.close()
    return 0


def _explain(platform: "Platform") -> None:
    count = len(platform.machines)
    lines: list[Any] = [
        f"This is an emulator. {count} machines are stopped; a request starts them:",
        f"    curl {platform.url}/",
        f"    waker wake {platform.url} --machines {max(1, count)}",
        "Its Machines API and its proxy, for any client (the token is good here alone):",
        *(f"    export {name}={value}" for name, value in platform.environment.items()),
        "Ctrl-C stops the machines as the platform does; a second one kills them.",
    ]
    print(*lines, sep="\n", flush=True)


def _bill(platform: "Platform") -> None:
    for machine in platform.machines:
        codes = " ".join(str(run.exit_code) for run in machine.runs) or "none"
        ran = f"{len(machine.runs)} runs, {machine.billed_s:.1f} s billed, exit codes: {codes}"
        print(f"{machine.id} {machine.state}: {ran}")
    sys.stdout.flush()
