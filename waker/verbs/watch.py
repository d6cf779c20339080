"""waker watch: wake for a backlog and for due times, as a safety net beside the nudges."""

import argparse
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..watch import Look

HELP = "wake for a backlog and for due times, as a safety net beside the nudges"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `waker watch` takes."""
    parser.add_argument("queue", metavar="MODULE:QUEUE", help="the queue, like myapp.tasks:queue")
    parser.add_argument("--queues", default="", metavar="NAMES", help="only these queues of it, like high,low")
    parser.add_argument("--target", metavar="TARGET", help="the worker app's address (default: WAKER_TARGET)")
    parser.add_argument("--interval", type=float, default=30.0, metavar="SECONDS", help="between looks (default: 30)")
    parser.add_argument(
        "--jobs-per-machine", type=int, default=1, metavar="N", help="jobs that want a machine (default: 1)"
    )
    parser.add_argument("--min-machines", type=int, default=1, metavar="N", help="for any backlog (default: 1)")
    parser.add_argument("--max-machines", type=int, default=1, metavar="N", help="never more than this (default: 1)")
    parser.add_argument("--once", action="store_true", help="look once, wake if needed, and end")
    parser.add_argument("--json", action="store_true", help="print one JSON object per look")


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Watch until SIGTERM or SIGINT; with --once, 0 if nothing was needed or somebody was woken, 1 otherwise."""
    from ..client import Waker
    from ..errors import LoadError
    from ..load import load
    from ..queues import install_hint, probe_for
    from ..watch import Watch

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        queue = load(args.queue)
    except LoadError as error:
        raise LoadError(f"{error}{install_hint(error.__cause__)}") from error
    waker = Waker(args.target)
    watch = Watch(
        probe_for(queue, [name for name in args.queues.split(",") if name]),
        waker,
        interval_s=args.interval,
        jobs_per_machine=args.jobs_per_machine,
        min_machines=args.min_machines,
        max_machines=args.max_machines,
    )

    def show(look: "Look") -> None:
        print(_as_json(look) if args.json else _as_line(look), flush=True)

    if args.once:
        look = watch.once()
        show(look)
        return 0 if look.error is None else 1
    watch.run(_Signalled(signal.SIGTERM, signal.SIGINT), show)
    return 0


class _Signalled:
    """A stop that signals set; a second one ends the wake that is under way. An Event has a lock, and a handler must
    not wait for the code it interrupts."""

    def __init__(self, *numbers: signal.Signals) -> None:
        self._reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._numbers: list[int] = []
        for number in numbers:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        if self._numbers:
            raise KeyboardInterrupt  # asked twice: a wake under way is given up
        self._numbers.append(number)

    def is_set(self) -> bool:
        return bool(self._numbers)

    def wait(self, timeout: float) -> None:
        if not self._numbers:
            select.select([self._reading], [], [], timeout)


def _as_line(look: "Look") -> str:
    if look.backlog is None:
        return f"watch.failed next_s={look.next_s:.1f} error={look.error}"
    ready, running, due_at = look.backlog
    line = f"watch.looked ready={ready} running={running} due_at={due_at or '-'} wanted={look.wanted}"
    if look.report is not None:
        line += f" distinct={look.report.distinct} cold={look.report.cold}"
    return f"{line} next_s={look.next_s:.1f}" + (f" error={look.error}" if look.error else "")


def _as_json(look: "Look") -> str:
    return json.dumps(
        {
            "backlog": look.backlog and look.backlog._asdict(),
            "wanted": look.wanted,
            "wake": look.report and look.report.as_dict(),
            "next_s": round(look.next_s, 3),
            "error": look.error,
        }
    )
