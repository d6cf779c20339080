"""Dramatiq on Redis: `greet.send("you")` in the app, `worker up tasks:broker` in the image."""

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from waker.queues import nudge_on_enqueue

broker = RedisBroker(url=os.environ["REDIS_URL"])
dramatiq.set_broker(broker)
nudge_on_enqueue(broker)  # the line that wakes the worker after each message


@dramatiq.actor(max_retries=3)
def greet(name: str) -> None:
    print(f"Hello, {name}!", flush=True)
