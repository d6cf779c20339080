"""How fast a fan-out is, and how little a nudge costs, each beside what else there is.

`python benchmarks/wake.py [--json] [--rounds N] [--only NAME …]`. The server is a process of its own and answers each
wake after HOLD_S; times are what came on top of that, medians, taken in turns in the same run.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from waker.nudge import Nudger

HOLD_S = 0.3
CURL_AT_ONCE = 300  # curl's own limit for --parallel-max

SERVER = """
import asyncio, itertools, sys
hold_s = float(sys.argv[1])
numbers = itertools.count()
class Worker(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.got = transport, b""
    def data_received(self, data):
        self.got += data
        if self.got.endswith(b"\\r\\n\\r\\n"):
            self.got = b""
            asyncio.get_running_loop().call_later(hold_s, self.answer)
    def answer(self):
        number = next(numbers)
        self.transport.write(
            b"HTTP/1.1 200 OK\\r\\nwake-version: 1\\r\\nwake-machine: m%d\\r\\nwake-boot: b%d\\r\\nwake-ring: 1\\r\\n"
            b"wake-state: working\\r\\nwake-busy: no\\r\\nwake-up: 0.1\\r\\ncontent-length: 3\\r\\n\\r\\nok\\n"
            % (number, number))
async def main():
    server = await asyncio.get_running_loop().create_server(Worker, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@contextlib.contextmanager
def serving(hold_s: float) -> Iterator[str]:
    """A server in a process of its own; its URL."""
    with subprocess.Popen([sys.executable, "-c", SERVER, str(hold_s)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def ours(url: str, count: int) -> int:
    """A wake of *count* machines: the wakes that failed."""
    from waker import Waker

    report = Waker(url, timeout_s=60).wake(machines=count)
    return report.missing + (report.requests - report.seen["200 with a receipt"])


def raw_sockets(url: str, count: int) -> int:
    """The same bytes over asyncio streams, and nothing else."""
    host, port = url.removeprefix("http://").split(":")
    request = f"GET / HTTP/1.1\r\nhost: {host}\r\nwake-hold: 1\r\n\r\n".encode()

    async def one() -> bool:
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            return False
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        return head.startswith(b"HTTP/1.1 200")

    async def main() -> int:
        return count - sum(await asyncio.gather(*(one() for _ in range(count))))

    return asyncio.run(main())


def httpx_as_it_comes(url: str, count: int) -> int:
    """One httpx client with its default limits and time-outs."""
    import httpx

    async def main() -> int:
        async with httpx.AsyncClient() as client:
            answers = await asyncio.gather(*(client.get(url) for _ in range(count)), return_exceptions=True)
        return sum(isinstance(answer, BaseException) for answer in answers)

    return asyncio.run(main())


def curl(url: str, count: int) -> int:
    """`curl --parallel`, as many at once as it can."""
    at_once = str(min(count, CURL_AT_ONCE))
    command = ["curl", "-sS", "--parallel", "--parallel-immediate", "--parallel-max", at_once, "-w", "%{http_code}\\n"]
    for _ in range(count):
        command += ["-o", os.devnull, url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return count - done.stdout.split().count("200")


def fan_out(count: int, rounds: int) -> dict[str, object]:
    """Medians of what came on top of the slowest answer, in ms, and failures in the worst round."""
    ways: dict[str, Callable[[str, int], int]] = {"waker": ours, "raw asyncio sockets": raw_sockets}
    if shutil.which("curl"):
        ways["curl --parallel"] = curl
    ways["httpx, default limits"] = httpx_as_it_comes
    times: dict[str, list[float]] = {name: [] for name in ways}
    failures = dict.fromkeys(ways, 0)
    with serving(HOLD_S) as url:
        for name, way in ways.items():
            if name != "httpx, default limits":
                way(url, min(count, 50))  # imports, first connections
        for turn in range(rounds):
            for name, way in ways.items():
                if name == "httpx, default limits" and count > 100 and turn >= 2:
                    continue  # it fails after 15 seconds, every time: twice will do
                began = time.perf_counter()
                failures[name] = max(failures[name], way(url, count))
                times[name].append((time.perf_counter() - began - HOLD_S) * 1000)
    medians = {name: round(statistics.median(values), 1) for name, values in times.items()}
    limit_ms = 100 if count <= 100 else 600
    return {
        "over_the_slowest_ms": medians,
        "failed": failures,
        "ratio_to_raw": round(medians["waker"] / medians["raw asyncio sockets"], 2),
        "target_ms": limit_ms,
        "reached": medians["waker"] <= limit_ms and failures["waker"] == 0,
    }


def nudge_cost(rounds: int) -> dict[str, object]:
    """What a nudge costs while one is pending, in ns, beside the call of an empty function."""
    from waker import Waker

    def empty() -> None:
        pass

    def per_call_ns(call: Callable[[], None], calls: int = 100_000) -> float:
        began = time.perf_counter_ns()
        for _ in range(calls):
            call()
        return (time.perf_counter_ns() - began) / calls

    with serving(3600) as url:
        waker = Waker(url, flush_at_exit_s=0.0)
        waker.nudge()
        while not waker._nudger._paying:
            time.sleep(0.001)
        waker.nudge()
        nudges, empties = [], []
        for _ in range(rounds):
            nudges.append(per_call_ns(waker.nudge))
            empties.append(per_call_ns(empty))
        waker.close(0.0)
    nudge_ns, empty_ns = statistics.median(nudges), statistics.median(empties)
    return {
        "nudge_ns": round(nudge_ns),
        "empty_call_ns": round(empty_ns),
        "ratio": round(nudge_ns / empty_ns, 1),
        "target_ns": 500,
        "reached": nudge_ns <= 500,
    }


def _burst(nudger_class: type["Nudger"]) -> int:
    begun, go_on, wakes = threading.Event(), threading.Event(), 0

    def wake(machines: int, timeout_s: float) -> None:
        nonlocal wakes
        wakes += 1
        begun.set()
        go_on.wait()

    nudger = nudger_class(wake)
    nudger.nudge()
    begun.wait()
    for _ in range(10_000):
        nudger.nudge()
    go_on.set()
    assert nudger.flush(10)
    return wakes - 1


def nudge_burst(rounds: int) -> dict[str, object]:
    """10,000 nudges while one wake is in flight: how many wakes follow."""
    from waker.nudge import Nudger

    more = []
    for _ in range(rounds):
        more.append(_burst(Nudger))
    return {"wakes_that_follow": max(more), "target": 1, "reached": set(more) == {1}}


ROWS: dict[str, Callable[[int], dict[str, object]]] = {
    "waking 100": lambda rounds: fan_out(100, rounds),
    "waking 1,000": lambda rounds: fan_out(1000, rounds),
    "nudge while pending": nudge_cost,
    "10,000 nudges": nudge_burst,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=10, help="runs per number (default: 10)")
    parser.add_argument("--only", nargs="+", choices=sorted(ROWS), help="these rows alone")
    args = parser.parse_args()
    logging.getLogger("waker").setLevel(logging.CRITICAL)  # what the rows let go of on purpose
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:  # for those beside us: they do not raise it themselves
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard) if hard >= 0 else 4096, hard))
    results = {name: row(args.rounds) for name, row in ROWS.items() if not args.only or name in args.only}
    if args.json:
        print(json.dumps(results))
    else:
        for name, result in results.items():
            print(f"{name}: {'reached' if result['reached'] else 'NOT REACHED'}")
            for key, value in result.items():
                if key != "reached":
                    print(f"    {key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
