"""arq: `await order("you")` in the app, `worker up tasks:WorkerSettings` in the image."""

import os
from typing import Any

from arq import create_pool
from arq.connections import RedisSettings

from waker.queues import nudge_on_enqueue

redis = RedisSettings.from_dsn(os.environ["REDIS_URL"])


async def greet(_: dict[str, Any], name: str) -> None:
    print(f"Hello, {name}!", flush=True)


class WorkerSettings:
    functions = (greet,)
    redis_settings = redis


async def order(name: str) -> None:
    pool = await create_pool(redis)  # an app that lasts keeps it
    nudge_on_enqueue(pool)  # the line that wakes the worker after each job
    await pool.enqueue_job("greet", name)
    await pool.aclose()
