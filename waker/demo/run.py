"""The demo's course: pictures, jobs, one wake, machines that drain and stop; then all is read back and counted."""

import contextlib
import glob
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..client import Waker, WakeReport
from ..emulator import LocalPlatform, MachineInfo
from ..errors import UsageError, WakeError

__all__ = ["Interrupted", "MachineRow", "Moment", "Plan", "Result", "Show", "run"]

APP = "waker.demo.tasks:queue"
TICK_S = 0.1
# No machine changed its state and no job ended for so long: something hangs, and a demo says so and ends.
STALLED_S = 90.0
LOG_LINES = 5


class Interrupted(WakeError):  # noqa: N818 - what happened, like NotWoken
    """A signal ended the demo; its machines are gone, and so are the files that nobody asked to keep."""

    def __init__(self, number: int, plan: "Plan") -> None:
        files = "the temporary files are gone" if plan.keep is None else "the files are kept"
        super().__init__(f"interrupted; every machine was ended, and {files}")
        self.exit_code = 128 + number


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do. *keep*: None removes the files at the end, "" keeps them; else the folder to keep them in."""

    jobs: int
    machines: int
    seed: int
    keep: str | None


@dataclass(frozen=True, slots=True)
class MachineRow:
    """One machine so far. *started_s*: from the wake to its first start. *codes*: of its runs that have ended."""

    id: str
    state: str
    jobs: int
    started_s: float | None
    billed_s: float
    useful_s: float
    codes: tuple[int | None, ...]

    @property
    def exit_code(self) -> int | None:
        """Of its last run; None if it never ran, or runs."""
        return self.codes[-1] if self.codes and self.state == "stopped" else None


@dataclass(frozen=True, slots=True)
class Moment:
    """All that moves, *at_s* seconds after the wake was sent. *done*: different jobs that have run."""

    at_s: float
    jobs: int
    done: int
    machines: tuple[MachineRow, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What it came to. *wake* is None if nobody answered; *problems* are sentences, and none if all went well.

    *wall_s*: from the wake to the last machine's stop.
    """

    plan: Plan
    done: int
    lost: int
    duplicated: int
    wake: WakeReport | None
    wake_s: float
    machines: tuple[MachineRow, ...]
    wall_s: float
    folder: str | None
    problems: tuple[str, ...]

    @property
    def billed_s(self) -> float:
        """Seconds in the state `started`, of all machines."""
        return sum(machine.billed_s for machine in self.machines)

    @property
    def useful_s(self) -> float:
        """Seconds with a job running, of all machines."""
        return sum(machine.useful_s for machine in self.machines)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        wake = self.wake
        return {
            "jobs": {
                "enqueued": self.plan.jobs,
                "done": self.done,
                "lost": self.lost,
                "duplicated": self.duplicated,
            },
            "wake": {
                "requested": self.plan.machines,
                "distinct": wake.distinct if wake else 0,
                "cold": wake.cold if wake else 0,
                "rounds": wake.rounds if wake else 0,
                "elapsed_s": round(self.wake_s, 3),
            },
            "machines": [
                {
                    "id": machine.id,
                    "exit_code": machine.exit_code,
                    "jobs": machine.jobs,
                    "started_s": None if machine.started_s is None else round(machine.started_s, 3),
                    "billed_s": round(machine.billed_s, 3),
                    "useful_s": round(machine.useful_s, 3),
                }
                for machine in self.machines
            ],
        }


class Show(Protocol):
    """Whoever is told how far things are."""

    def making(self, made: int, count: int) -> None:
        """So many pictures are there."""

    def say(self, text: str) -> None:
        """One more step is done."""

    def moment(self, moment: Moment) -> None:
        """How the machines are now; called several times a second."""

    def end(self, result: Result) -> None:
        """It is over."""


def run(plan: Plan, show: Show, environ: Mapping[str, str], signalled: Callable[[], int]) -> Result:
    """Do it all. *environ* is what the machines inherit, *signalled* the number of a signal that ends the demo, or 0.

    Whatever happens, no machine is left, and no file that nobody asked to keep. Raises Interrupted; UsageError if the
    folder cannot be used, and WakeError if it cannot be written.
    """

    def proceed() -> None:
        if number := signalled():
            raise Interrupted(number, plan)

    with _folder(plan.keep) as folder:
        try:
            checksums = _make_pictures(folder, plan, show, proceed)
            # The app's file has a relative path: the queue is where the app runs, and so it is for the machines.
            with contextlib.chdir(folder):
                from .tasks import queue, shrink
            with queue:
                for picture in checksums:
                    shrink.enqueue(picture)
                    proceed()
                show.say(f"{_count(plan.jobs, 'job')} enqueued: a checksum and a thumbnail of each picture")
                result = _wake_and_wait(plan, folder, checksums, show, environ, proceed)
                stuck = [
                    f"the job for {job.args[0]} is {job.state}: {_last_line(job.error)}" for job in queue.jobs(limit=3)
                ]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise WakeError(f"cannot use {error.filename or folder}: {error.strerror or error}") from error
        if stuck:
            result = replace(result, problems=(*result.problems, *stuck))
        show.end(result)
        return result


@contextlib.contextmanager
def _folder(keep: str | None) -> Iterator[str]:
    """The folder for pictures, thumbnails, records, queue and log."""
    try:
        if keep:
            folder = os.path.abspath(keep)
            os.makedirs(folder, exist_ok=True)
            if os.listdir(folder):
                raise UsageError(f"--keep {keep}: there is something in that folder; name a new one, or an empty one")
        else:
            folder = tempfile.mkdtemp(prefix="waker-demo-")
    except OSError as error:
        raise UsageError(f"cannot make a folder at {error.filename}: {error.strerror}") from error
    try:
        yield folder
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _make_pictures(folder: str, plan: Plan, show: Show, proceed: Callable[[], None]) -> dict[str, str]:
    """Make them; return the checksum of each, by name."""
    from .pictures import SIZE, make

    for name in ("pictures", "thumbnails", "ran"):
        os.mkdir(os.path.join(folder, name))
    began = time.monotonic()
    checksums: dict[str, str] = {}
    show.making(0, plan.jobs)
    with contextlib.closing(make(os.path.join(folder, "pictures"), plan.jobs, plan.seed)) as pictures:
        for name, sha256 in pictures:
            checksums[name] = sha256
            show.making(len(checksums), plan.jobs)
            proceed()
    megabytes = sum(os.path.getsize(path) for path in glob.glob(f"{glob.escape(folder)}/pictures/*")) / 1e6
    pixels = f"{SIZE[0]} x {SIZE[1]} pixels"
    took = f"{megabytes:.0f} MB, made in {time.monotonic() - began:.1f} s"
    show.say(f"{_count(plan.jobs, 'picture')} of {pixels}, {took}")
    return dict(sorted(checksums.items()))


class _Wake(threading.Thread):
    """The app's call of the waker, beside the thread that shows what happens."""

    def __init__(self, url: str, machines: int) -> None:
        super().__init__(name="demo-wake", daemon=True)
        self._machines = machines
        self._waker = Waker(url, token="")  # the user's own token is not for the demo
        self.report: WakeReport | None = None
        self.error: Exception | None = None
        self.took_s = 0.0

    def run(self) -> None:
        began = time.monotonic()
        try:
            self.report = self._waker.wake(self._machines)
        except Exception as error:
            self.error = error
        self.took_s = time.monotonic() - began


def _wake_and_wait(
    plan: Plan,
    folder: str,
    checksums: Mapping[str, str],
    show: Show,
    environ: Mapping[str, str],
    proceed: Callable[[], None],
) -> Result:
    with open(os.path.join(folder, "machines.log"), "w", encoding="utf-8") as log:

        def write(machine: str, line: str) -> None:
            print(f"{machine} | {line}", file=log, flush=True)

        platform = LocalPlatform(
            _worker_up(), machines=plan.machines, env=_machine_env(environ), cwd=folder, seed=plan.seed, log=write
        )
        with platform:
            show.say(f"{_count(plan.machines, 'machine')}, stopped; what runs in each: `worker up {APP}`")
            began_at = platform.now
            wake = _Wake(platform.url, plan.machines)
            wake.start()
            moment = _watch(platform, wake, began_at, plan, folder, show, proceed)
            machines = platform.machines
            tails = {machine.id: platform.logs(machine.id)[-LOG_LINES:] for machine in machines}
    if wake.error is not None and not isinstance(wake.error, WakeError):
        raise wake.error
    ran = _records(folder)
    done = _verified(folder, checksums, ran)
    lost = [picture for picture in checksums if picture not in done]
    stopped_at = [run.stopped_at for machine in machines for run in machine.runs if run.stopped_at is not None]
    problems: list[str] = []
    if wake.error is not None:
        problems.append(str(wake.error))
    elif wake.report is not None and not wake.report.ok:
        problems.append(f"{wake.report.distinct} of {_count(plan.machines, 'machine')} were woken")
    if lost:
        problems.append(f"{_count(len(lost), 'job')} left no right result: {', '.join(lost[:5])}")
    for row in moment.machines:
        if row.state != "stopped":
            problems.append(f"machine {row.id} was still {row.state} after {STALLED_S:.0f} s in which nothing happened")
        if any(row.codes):
            said = "".join(f"\n    {line}" for line in tails[row.id])
            problems.append(f"machine {row.id} left with {', '.join(map(str, row.codes))}; its last lines:{said}")
    return Result(
        plan=plan,
        done=len(done),
        lost=len(lost),
        duplicated=len(ran) - len({record["picture"] for record in ran}),
        wake=wake.report,
        wake_s=wake.took_s,
        machines=moment.machines,
        wall_s=max(stopped_at, default=began_at) - began_at,
        folder=None if plan.keep is None else folder,
        problems=tuple(problems),
    )


def _watch(
    platform: LocalPlatform,
    wake: _Wake,
    began_at: float,
    plan: Plan,
    folder: str,
    show: Show,
    proceed: Callable[[], None],
) -> Moment:
    """Show how things are until the wake is answered and every machine has stopped, or nothing happens any more."""
    before: object = None
    changed_at = platform.now
    while True:
        # In this order: what ended between the two readings is seen in the next turn.
        over = not wake.is_alive()
        machines = platform.machines
        moment = _moment(platform.now - began_at, plan, machines, began_at, _records(folder))
        show.moment(moment)
        proceed()
        if over and all(machine.state == "stopped" for machine in machines):
            return moment
        now = (over, moment.done, [machine.state for machine in machines], [len(machine.runs) for machine in machines])
        if now != before:
            before, changed_at = now, platform.now
        elif platform.now - changed_at > STALLED_S:
            return moment
        time.sleep(TICK_S)


def _moment(
    at_s: float, plan: Plan, machines: Sequence[MachineInfo], began_at: float, ran: Sequence[Mapping[str, Any]]
) -> Moment:
    jobs: Counter[str] = Counter()
    useful_s: Counter[str] = Counter()
    for record in ran:
        jobs[record["machine"]] += 1
        useful_s[record["machine"]] += record["useful_s"]
    rows = []
    for machine in machines:
        starts = [run.started_at - began_at for run in machine.runs if run.started_at is not None]
        rows.append(
            MachineRow(
                id=machine.id,
                state=machine.state,
                jobs=jobs[machine.id],
                started_s=min(starts, default=None),
                billed_s=machine.billed_s,
                useful_s=useful_s[machine.id],
                codes=tuple(run.exit_code for run in machine.runs if run.stopped_at is not None),
            )
        )
    return Moment(at_s, plan.jobs, len({record["picture"] for record in ran}), tuple(rows))


def _records(folder: str) -> list[dict[str, Any]]:
    """What the jobs wrote down, each with its machine; a line that is not finished is not there yet."""
    records = []
    for path in sorted(glob.glob(f"{glob.escape(folder)}/ran/*.jsonl")):
        machine = os.path.basename(path).removesuffix(".jsonl")
        with open(path, encoding="ascii") as file:
            records += [{**json.loads(line), "machine": machine} for line in file if line.endswith("\n")]
    return records


def _verified(folder: str, checksums: Mapping[str, str], ran: Sequence[Mapping[str, Any]]) -> set[str]:
    """The pictures whose recorded checksum is right, and whose thumbnail can be read to its end and has its size."""
    from PIL import Image

    from .tasks import THUMBNAIL_SIZE

    found = set()
    for record in ran:
        picture = record["picture"]
        if picture in found or record["sha256"] != checksums.get(picture):
            continue
        with contextlib.suppress(OSError), Image.open(os.path.join(folder, "thumbnails", picture)) as thumbnail:
            thumbnail.load()
            if thumbnail.size == THUMBNAIL_SIZE:
                found.add(picture)
    return found


def _worker_up() -> list[str]:
    """`worker up` of this very installation, wherever its console script is."""
    entry = importlib.util.find_spec("_wake_on_request")
    if entry is None or entry.origin is None:
        raise UsageError("wake-on-request is not installed in this Python: pip install 'wake-on-request[demo]'")
    return [sys.executable, entry.origin, "up", APP]


def _machine_env(environ: Mapping[str, str]) -> dict[str, str]:
    """A machine's environment: this one without the user's settings of ours, and without modules of theirs."""
    return {name: value for name, value in environ.items() if not name.startswith(("WORKER_", "WAKER_", "PYTHONPATH"))}


def _last_line(text: str | None) -> str:
    return (text or "it never ran").strip().rpartition("\n")[2]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
