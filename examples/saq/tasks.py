"""SAQ on Redis: `await order("you")` in the app, `worker up tasks:settings` in the image."""

import os
from typing import Any

from saq import Queue

from waker.queues import nudge_on_enqueue

queue = Queue.from_url(os.environ["REDIS_URL"])
nudge_on_enqueue(queue)  # the line that wakes the worker after each job


async def greet(_: dict[str, Any], *, name: str) -> None:
    print(f"Hello, {name}!", flush=True)


settings = {"queue": queue, "functions": [greet], "concurrency": 4}


async def order(name: str) -> None:
    await queue.enqueue("greet", name=name)
    await queue.disconnect()  # an app that lasts stays connected
