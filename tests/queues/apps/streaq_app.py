"""streaq, with a short idle_timeout, so that a dead worker is noticed while the test waits."""

import asyncio
import os
import threading

import jobs
from streaq import StreaqRetry, Worker

worker = target = Worker(os.environ["CONTRACT_URL"], concurrency=1, idle_timeout=5)
place = {}


@worker.task
async def run(job, args):
    place["loop"] = asyncio.get_running_loop()
    try:
        await asyncio.to_thread(getattr(jobs, job), *args)
    except RuntimeError as error:
        if job == "flaky":
            raise StreaqRetry("again", delay=jobs.RETRY_S) from error
        raise


async def connected(ready):
    async with worker:
        ready.set()
        await asyncio.sleep(1e9)


def enqueue(job, *args, delay_s=0):
    if not place:
        place["loop"] = asyncio.new_event_loop()
        threading.Thread(target=place["loop"].run_forever, daemon=True).start()
        ready = threading.Event()
        place["held"] = asyncio.run_coroutine_threadsafe(connected(ready), place["loop"])
        ready.wait(10)

    async def send():
        await run.enqueue(job, list(args)).start(delay=delay_s or None)

    asyncio.run_coroutine_threadsafe(send(), place["loop"]).result(30)
