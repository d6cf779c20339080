"""streaq on Redis. The image: `worker up tasks:worker`; the app: `await tasks.order("you")`."""

import os

from streaq import Worker

from waker.queues import nudge_on_enqueue

worker = Worker(os.environ["REDIS_URL"])
nudge_on_enqueue(worker)  # the line that wakes the worker after each task


@worker.task
async def greet(name: str) -> None:
    print(f"Hello, {name}!", flush=True)


async def order(name: str) -> None:
    async with worker:
        await greet.enqueue(name)
