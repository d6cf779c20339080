"""How much of SQLite's own speed the embedded queue keeps: enqueueing, and claiming, running and acknowledging.

`python benchmarks/sqlite_queue.py [--json] [--rounds N]`. Beside it: bare sqlite3 loops with the same pragmas and one
transaction for each step, and huey's SqliteHuey where it is installed (it acknowledges by deleting before the job
runs). "bare" has the one index that any queue needs whose next job is not simply its lowest row; "bare, no index" has
not even that. All take turns in the same run, on one CPU, each time on a new file; numbers are medians of jobs per
second.
"""

import argparse
import json
import os
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

from waker import SqliteQueue

# The least share of the bare loop's speed.
TARGETS = {"enqueue": 0.6, "claim and acknowledge": 0.5}
# The disk is waited for in one and not in the other.
JOBS = {"full": 500, "process": 3000}
PRAGMA = {"full": "full", "process": "normal"}
PICTURE = "/var/lib/pictures/00017.png"

# A way to do it yields after each of its parts: opened, enqueued, drained.
Way = Callable[[str, str, int], Iterator[None]]


def ours(path: str, durability: str, jobs: int) -> Iterator[None]:
    queue = SqliteQueue(path, durability="full" if durability == "full" else "process")
    thumbnail = queue.task(name="thumbnail")(lambda picture, width: None)
    queue.counts()
    yield
    for _ in range(jobs):
        thumbnail.enqueue(PICTURE, width=200)
    yield
    assert queue.work(threading.Event(), lambda running, done: None) == jobs
    yield
    assert queue.counts() == (0, 0, 0, 0)
    queue.close()


def bare(path: str, durability: str, jobs: int, *, index: bool = True) -> Iterator[None]:
    payload = json.dumps(["thumbnail", [PICTURE], {"width": 200}])
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("pragma journal_mode = wal")
    db.execute(f"pragma synchronous = {PRAGMA[durability]}")
    db.execute("create table jobs (id integer primary key, payload text not null, taken integer not null default 0)")
    if index:
        db.execute("create index waiting on jobs (id) where taken = 0")
    yield
    for _ in range(jobs):
        db.execute("insert into jobs (payload) values (?)", (payload,))
    yield
    first = "select id from jobs where taken = 0 order by id limit 1"
    claim = f"update jobs set taken = 1 where id = ({first}) returning id, payload"  # noqa: S608
    for _ in range(jobs):
        ((job, _),) = db.execute(claim).fetchall()
        db.execute("delete from jobs where id = ?", (job,))
    yield
    db.close()


def bare_without_index(path: str, durability: str, jobs: int) -> Iterator[None]:
    return bare(path, durability, jobs, index=False)


def huey(path: str, durability: str, jobs: int) -> Iterator[None]:
    from huey import SqliteHuey

    app = SqliteHuey(filename=path, results=False, fsync=durability == "full", journal_mode="wal")
    thumbnail = app.task(name="thumbnail")(lambda picture, width: None)
    yield
    for _ in range(jobs):
        thumbnail(PICTURE, width=200)
    yield
    for _ in range(jobs):
        app.execute(app.dequeue())
    yield
    app.storage.close()


def measure(rounds: int) -> dict[str, dict[str, object]]:
    """Every row of the table."""
    ways: dict[str, Way] = {"ours": ours, "bare": bare, "bare, no index": bare_without_index}
    if find_spec("huey") is not None:
        ways["huey"] = huey
    rows: dict[str, dict[str, object]] = {}
    for durability, jobs in JOBS.items():
        speeds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in TARGETS} for name in ways}
        for turn in range(rounds + 1):
            for name, way in ways.items():
                with tempfile.TemporaryDirectory() as folder:
                    steps = way(os.path.join(folder, "jobs.db"), durability, jobs)
                    next(steps)
                    for part in TARGETS:
                        began = time.perf_counter()
                        next(steps)
                        if turn:  # the first one warms up
                            speeds[name][part].append(jobs / (time.perf_counter() - began))
                    next(steps, None)
        for part, target in TARGETS.items():
            medians = {name: statistics.median(parts[part]) for name, parts in speeds.items()}
            ratio = medians["ours"] / medians["bare"]
            rows[f"{part}, durability {durability}"] = {
                "per_s": {name: round(median) for name, median in medians.items()},
                "ratio_to_bare": round(ratio, 2),
                "ratios": {
                    name: round(medians["ours"] / median, 2) for name, median in medians.items() if name != "ours"
                },
                "target_ratio": target,
                "reached": ratio >= target,
            }
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=10, help="runs per number (default: 10)")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = measure(max(1, args.rounds))
    if args.json:
        print(json.dumps(rows))
        return 0
    for name, row in rows.items():
        print(f"{name}: {'reached' if row['reached'] else 'NOT REACHED'}")
        for key, value in row.items():
            if key != "reached":
                print(f"    {key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
