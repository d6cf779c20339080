"""taskiq on a Redis stream. The image: `worker up tasks:broker`; the app: `await tasks.greet.kiq("you")`."""

import os

from taskiq_redis import RedisStreamBroker

from waker.queues import nudge_on_enqueue

# From the first task on, not only from the first worker on.
broker = RedisStreamBroker(os.environ["REDIS_URL"], consumer_id="0")
nudge_on_enqueue(broker)  # the line that wakes the worker after each task


@broker.task
async def greet(name: str) -> None:
    print(f"Hello, {name}!", flush=True)
