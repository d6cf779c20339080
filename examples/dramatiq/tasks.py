"""Dramatiq on Redis. The image: `worker up tasks:broker`; the app: `tasks.resize.send("cat.jpg")`."""

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from waker.queues import nudge_on_enqueue

broker = RedisBroker(url=os.environ["REDIS_URL"])
dramatiq.set_broker(broker)
nudge_on_enqueue(broker)


@dramatiq.actor(max_retries=3)
def resize(name: str) -> None:
    """Say what would be resized."""
    print(f"resized {name}", flush=True)
