"""Everything that the product must reach, measured and printed in one table: `make bench`.

`python benchmarks/run.py [--rounds N] [--only FILE …]`. Runs each benchmark of this folder in a process of its own,
prints what it found, and writes all of it to `results/<date>.json` beside this file. Ends with 1 if one was missed.
"""

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(HERE, "results")
# What the numbers depend on.
PACKAGES = ("wake-on-request", "aiohttp", "supervisor", "httpx", "huey")
HEADINGS = ("what", "ours", "beside it", "ratio", "target", "")
MET = {True: "met", False: "MISSED", None: ""}
# what, ours, ratio, target: text; beside it: texts; met: True, False, or None where nothing is to be reached.
Row = dict[str, Any]


def machine_rows(found: Mapping[str, Any]) -> list[Row]:
    rows = []
    for one in found["rows"]:
        beside = [f"{name} {_number(value)} {one['unit']}".rstrip() for name, value in one["beside"].items()]
        word = "" if one["ratio_is"] == "ours to theirs" else " sooner" if "→" in one["what"] else " less"
        ratio = "" if one["ratio"] is None else f"{_number(one['ratio'])}×{word}"
        rows.append({
            "what": one["what"], "ours": f"{_number(one['ours'])} {one['unit']}", "beside it": beside, "ratio": ratio,
            "target": one["target"], "met": one["met"],
        })  # fmt: skip
    return rows


def wake_rows(found: Mapping[str, Any]) -> list[Row]:
    rows = []
    for what, one in found.items():
        if "over_the_slowest_ms" in one:
            times = dict(one["over_the_slowest_ms"])
            ours = times.pop("waker")
            failed = one["failed"]
            beside = [
                f"{name} {_number(ms)} ms" + (f", {failed[name]} failed" if failed[name] else "")
                for name, ms in times.items()
            ]
            rows.append({
                "what": f"{what}, over the slowest", "ours": f"{_number(ours)} ms, {failed['waker']} failed",
                "beside it": beside, "ratio": f"{_number(one['ratio_to_raw'])}× raw sockets",
                "target": f"≤ {one['target_ms']} ms, none failed", "met": one["reached"],
            })  # fmt: skip
        elif "nudge_ns" in one:
            rows.append({
                "what": what, "ours": f"{one['nudge_ns']} ns", "beside it": [f"empty call {one['empty_call_ns']} ns"],
                "ratio": f"{one['ratio']}×", "target": f"≤ {one['target_ns']} ns", "met": one["reached"],
            })  # fmt: skip
        else:
            more = one["wakes_that_follow"]
            rows.append({
                "what": f"{what} while one wake is in flight", "ours": f"{more} more wake" + ("s" if more != 1 else ""),
                "beside it": [], "ratio": "", "target": f"exactly {one['target']}", "met": one["reached"],
            })  # fmt: skip
    return rows


def queue_rows(found: Mapping[str, Any]) -> list[Row]:
    rows = []
    for what, one in found.items():
        speeds = dict(one["per_s"])
        ours = speeds.pop("ours")
        rows.append({
            "what": what, "ours": f"{ours:,}/s", "beside it": [f"{name} {speed:,}/s" for name, speed in speeds.items()],
            "ratio": f"{one['ratio_to_bare']:.0%} of bare", "target": f"≥ {one['target_ratio']:.0%} of bare",
            "met": one["reached"],
        })  # fmt: skip
    return rows


def job_rows(found: Mapping[str, Any]) -> list[Row]:
    rows = []
    for what, one in found.items():
        late = dict(one["late_ms"])
        ours = late.pop("ours")
        rows.append({
            "what": what, "ours": f"{_number(ours)} ms, {_number(one['at_most_ms']['ours'])} ms at most",
            "beside it": [f"{name} {_number(ms)} ms" for name, ms in late.items()],
            "ratio": f"{one['ratio']}× sooner", "target": f"≤ {one['target_ms']} ms", "met": one["reached"],
        })  # fmt: skip
    return rows


BENCHMARKS: dict[str, Callable[[Mapping[str, Any]], list[Row]]] = {
    "machine": machine_rows,
    "wake": wake_rows,
    "sqlite_queue": queue_rows,
    "jobs": job_rows,
}


def run(name: str, rounds: int | None) -> Mapping[str, Any]:
    """What the benchmark *name* says with --json. Raises CalledProcessError."""
    # -P: a benchmark's neighbours must not stand before the modules that it means.
    command = [sys.executable, "-P", os.path.join(HERE, f"{name}.py"), "--json"]
    if rounds is not None:
        command += ["--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found


def conditions() -> dict[str, object]:
    """Where and when this was measured."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "versions": versions,
    }


def table(rows: list[Row]) -> str:
    """*rows* as text, each column as wide as its widest cell; what is beside ours stands one below the other."""
    lines = [list(HEADINGS)]
    for row in rows:
        first, *others = row["beside it"] or [""]
        lines.append([row["what"], row["ours"], first, row["ratio"], row["target"], MET[row["met"]]])
        lines += [["", "", other, "", "", ""] for other in others]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    lines.insert(1, ["─" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _number(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="runs per number (default: each benchmark's own, 10 or more)")
    parser.add_argument("--only", nargs="+", choices=sorted(BENCHMARKS), help="these files alone")
    args = parser.parse_args()
    before = conditions()
    found: dict[str, Mapping[str, Any]] = {}
    rows: list[Row] = []
    for name, read in BENCHMARKS.items():
        if args.only and name not in args.only:
            continue
        print(f"measuring {name}…", file=sys.stderr, flush=True)
        try:
            found[name] = run(name, args.rounds)
        except subprocess.CalledProcessError as error:
            print(f"benchmarks/{name}.py ended with {error.returncode}", file=sys.stderr)
            return error.returncode
        rows += read(found[name])
    print(table(rows))
    os.makedirs(RESULTS, exist_ok=True)
    path = os.path.join(RESULTS, f"{dt.date.today().isoformat()}.json")  # noqa: DTZ011 - the day it is here
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"before": before, "after": conditions(), "rows": rows, "found": found}, file, indent=1)
        file.write("\n")
    print(f"\nwritten to {os.path.relpath(path)}")
    missed = [row["what"] for row in rows if row["met"] is False]
    if missed:
        print(f"missed: {'; '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
