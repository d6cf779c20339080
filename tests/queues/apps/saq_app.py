"""SAQ, with settings as `saq` takes them. Its API is asynchronous, so the app has a loop on a thread."""

import asyncio
import functools
import os
import threading
import time

import jobs
from saq import Queue

settings_queue = Queue.from_url(os.environ["CONTRACT_URL"])


def named(job):
    async def one(_, args):
        await asyncio.to_thread(getattr(jobs, job), *args)

    return job, one


target = {
    "queue": settings_queue,
    "functions": [named(name) for name in jobs.NAMES],
    "concurrency": int(os.environ.get("CONTRACT_SLOTS", "4")),
}


@functools.cache
def loop():
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, daemon=True).start()
    return made


def await_it(work):
    return asyncio.run_coroutine_threadsafe(work, loop()).result(30)


@functools.cache
def queue():
    """Beside the worker's, which belongs to the worker's loop."""
    made = Queue.from_url(os.environ["CONTRACT_URL"])
    await_it(made.connect())
    return made


def enqueue(job, *args, delay_s=0):
    settings = {"retries": 2, "retry_delay": jobs.RETRY_S} if job == "flaky" else {}
    await_it(queue().enqueue(job, args=list(args), scheduled=int(time.time() + delay_s) if delay_s else 0, **settings))


def __getattr__(name):
    if name == "hooked":
        return queue()
    raise AttributeError(name)
