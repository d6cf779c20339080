"""What a person sees of the demo: a live table in a terminal that rich can draw in, else plain lines; or nothing."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .run import Moment, Result

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Lines", "Live", "Nothing", "for_terminal", "summary"]

BAR_WIDTH = 40
WORD_WIDTH = 9
MACHINE_BAR_WIDTH = 14
# How many lines of progress a whole run prints where nothing can be drawn over.
PROGRESS_LINES = 6
COLOURS = {"stopped": "dim", "starting": "yellow", "started": "green", "stopping": "yellow", "restarting": "red"}


class Nothing:
    """For programs: they read the result."""

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def making(self, made: int, count: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def moment(self, moment: Moment) -> None:
        pass

    def end(self, result: Result) -> None:
        pass


class Lines(Nothing):
    """One line for each thing that happened, and the table at the end."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._told = 0

    def say(self, text: str) -> None:
        print(text, flush=True)

    def moment(self, moment: Moment) -> None:
        for row in moment.machines:
            before = self._states.setdefault(row.id, "stopped")
            if row.state == before:
                continue
            self._states[row.id] = row.state
            more = f" with {row.exit_code} after {row.jobs} jobs" if row.exit_code is not None else ""
            print(f"{moment.at_s:7.2f} s  {row.id} {row.state}{more}", flush=True)
        step = max(1, moment.jobs // PROGRESS_LINES)
        if moment.done // step > self._told:
            self._told = moment.done // step
            print(f"{moment.at_s:7.2f} s  {moment.done} of {moment.jobs} jobs", flush=True)

    def end(self, result: Result) -> None:
        print(f"\n{'machine':<14}  {'started at':>10}  {'jobs':>5}  {'exit':>4}  {'billed':>8}  {'useful':>8}")
        for row in result.machines:
            started = "never" if row.started_s is None else f"{row.started_s:.2f} s"
            code = "-" if row.exit_code is None else row.exit_code
            print(
                f"{row.id:<14}  {started:>10}  {row.jobs:>5}  {code:>4}  {row.billed_s:>6.2f} s  {row.useful_s:>6.2f} s"
            )
        print()
        for what, text in summary(result):
            print(f"{what:<{WORD_WIDTH}} " + text.replace("\n", f"\n{'':<{WORD_WIDTH}} "))
        sys.stdout.flush()


class Live(Nothing):
    """The same, drawn in place. It draws when it is told something, and has no thread."""

    def __init__(self, console: "Console") -> None:
        from rich.live import Live as Screen

        self._console = console
        self._screen = Screen(console=console, auto_refresh=False)
        self._drawn = False

    def __enter__(self) -> "Live":
        self._screen.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._screen.stop()

    def making(self, made: int, count: int) -> None:
        self._draw(_line_with_bar("making pictures", made, count) if made < count else "")

    def say(self, text: str) -> None:
        self._console.print(f"[green]•[/] {_escaped(text)}")

    def moment(self, moment: Moment) -> None:
        from rich.console import Group

        bar = _line_with_bar("jobs", moment.done, moment.jobs, f"{moment.at_s:.1f} s")
        self._draw(Group(self._table(moment), bar))

    def end(self, result: Result) -> None:
        # All of it, also where the screen is too low to draw in place.
        self._screen.vertical_overflow = "visible"
        self._screen.refresh()
        self._screen.stop()
        self._console.print()
        for what, text in summary(result):
            colour = "bold red" if what == "failed" else "bold green" if what == "jobs" and not result.lost else "bold"
            self._console.print(_two_columns(what, text, colour))

    def _draw(self, what: "RenderableType") -> None:
        self._screen.update(what, refresh=True)

    def _table(self, moment: Moment) -> "RenderableType":
        from rich import box
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        table.add_column("machine", no_wrap=True)
        table.add_column("state", width=10)
        table.add_column("jobs", justify="right", min_width=4)
        table.add_column("", width=MACHINE_BAR_WIDTH)
        for name in ("billed", "useful"):
            table.add_column(name, justify="right", min_width=7)
        table.add_column("exit", justify="right")
        largest = max(1, *(row.jobs for row in moment.machines))
        for row in moment.machines:
            code = "" if row.exit_code is None else f"[{'red' if any(row.codes) else 'green'}]{row.exit_code}"
            table.add_row(
                row.id,
                f"[{COLOURS.get(row.state, 'default')}]{row.state}",
                str(row.jobs),
                ProgressBar(total=max(largest, moment.jobs / len(moment.machines)), completed=row.jobs),
                f"{row.billed_s:.2f} s",
                f"{row.useful_s:.2f} s",
                code,
            )
        return table


def for_terminal() -> Live | Lines:
    """What suits standard output: a live table in a terminal, if rich is installed, else lines."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            return Lines()
        console = Console(highlight=False)
        if console.is_terminal and not console.is_dumb_terminal:
            return Live(console)
    return Lines()


def summary(result: Result) -> list[tuple[str, str]]:
    """What it came to, as pairs of a word and what is to be said under it, made for 80 columns."""
    wake, count, wall_s = result.wake, len(result.machines), result.wall_s
    lines = []
    if wake is not None:
        found = f"{wake.distinct} of {_count(wake.requested, 'machine')}, {wake.cold} cold, in {wake.elapsed_s:.2f} s"
        asked = f"{_count(wake.requests, 'request')} in {_count(wake.rounds, 'round')}"
        lines.append(("woken", f"{found}; {asked}"))
    share = 100 * result.useful_s / result.billed_s if result.billed_s else 0
    fleet = f"{count * wall_s:.2f} s for these {wall_s:.2f} s, and {count} s more in every second from now on"
    lines += [
        ("jobs", f"{result.done} done, {result.lost} lost, {result.duplicated} run twice; every result was read back"),
        ("billed", f"{result.billed_s:.2f} s started, {result.useful_s:.2f} s of it useful: a job ran ({share:.0f} %)"),
        ("always on", fleet),
        ("emulated", "the platform and its delays; jobs, processes and seconds are real"),
    ]
    if result.folder is not None:
        lines.append(("files", result.folder))
    return [*lines, *(("failed", problem) for problem in result.problems)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _line_with_bar(what: str, done: int, count: int, more: str = "") -> "RenderableType":
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    line = Table.grid(padding=(0, 1))
    line.add_row(what, ProgressBar(total=count, completed=done, width=BAR_WIDTH), f"{done}/{count}", f"[dim]{more}")
    return line


def _two_columns(what: str, text: str, colour: str) -> "RenderableType":
    from rich.table import Table

    line = Table.grid(padding=(0, 1))
    line.add_column(width=WORD_WIDTH)
    line.add_row(f"[{colour}]{what}", _escaped(text))
    return line


def _escaped(text: str) -> Any:
    from rich.text import Text

    return Text(text)
