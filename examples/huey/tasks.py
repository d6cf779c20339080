"""Huey on Redis: `greet("you")` in the app, `worker up tasks:huey` in the image."""

import os

from huey import RedisHuey

from waker.queues import nudge_on_enqueue

huey = RedisHuey(url=os.environ["REDIS_URL"])
nudge_on_enqueue(huey)  # the line that wakes the worker after each task


@huey.task(retries=3, retry_delay=10)
def greet(name: str) -> None:
    print(f"Hello, {name}!", flush=True)
