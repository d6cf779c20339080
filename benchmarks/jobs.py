"""How soon the end of a one-off job is known: ours, beside looking every 5 and every 10 seconds.

`python benchmarks/jobs.py [--json] [--rounds N]`. All three watch the same machines of the local platform, real
processes that take a random time of one to eleven seconds; counted is the time from the exit, as the platform tells it.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import sys
import time

TARGET_MS = 300
EVERY_S = (5, 10)


async def measure(rounds: int) -> dict[str, object]:
    from waker.emulator import Knobs, Platform
    from waker.machines import AsyncMachines, run_async
    from waker.machines.client import Pacer

    late_s: dict[str, list[float]] = {"ours": [], **{f"every {every_s} s": [] for every_s in EVERY_S}}

    async def poll(api: AsyncMachines, machine: str, every_s: int) -> None:
        while True:
            await asyncio.sleep(every_s)
            ended = (await api.get(machine)).exit
            if ended is not None and ended.at is not None:
                late_s[f"every {every_s} s"].append(time.time() - ended.at)
                return

    async def one(api: AsyncMachines, rng: random.Random) -> None:
        seen: dict[str, float] = {}
        pollers: list[asyncio.Task[None]] = []

        def note(progress) -> None:  # type: ignore[no-untyped-def]
            seen[progress.state] = time.time()
            if progress.state == "started":
                pollers.extend(asyncio.create_task(poll(api, progress.machine, every_s)) for every_s in EVERY_S)

        command = ["sleep", f"{rng.uniform(1, 11):.3f}"]
        result = await run_async(command, machines=api, image="bench:1", keep=True, on_progress=note)
        assert result.ended_at is not None
        late_s["ours"].append(seen["stopped"] - result.ended_at)
        await asyncio.gather(*pollers)

    rng = random.Random(1)
    knobs = Knobs(time_scale=0.02)
    async with (
        Platform(
            api=True, machines=0, images={"bench:1": ["true"]}, knobs=knobs, env={"PATH": os.environ["PATH"]}
        ) as platform,
        AsyncMachines("my-worker", token=platform.api_token, base_url=platform.api_url, pacer=Pacer(50)) as api,
    ):
        await asyncio.gather(*(one(api, rng) for _ in range(rounds)))
    median_ms = {name: round(statistics.median(times) * 1000, 1) for name, times in late_s.items()}
    most_ms = {name: round(max(times) * 1000, 1) for name, times in late_s.items()}
    return {
        "late_ms": median_ms,
        "at_most_ms": most_ms,
        "ratio": round(median_ms["every 5 s"] / max(median_ms["ours"], 0.1)),
        "target_ms": TARGET_MS,
        "reached": most_ms["ours"] <= TARGET_MS,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=10, help="jobs (default: 10)")
    args = parser.parse_args()
    logging.disable()
    found = {"the end of a job is known": asyncio.run(measure(args.rounds))}
    print(json.dumps(found, indent=None if args.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
