"""Huey on Redis, or on a file."""

import os

import jobs
from huey import RedisHuey, SqliteHuey

place = os.environ["CONTRACT_URL"]
huey = hooked = RedisHuey(url=place) if place.startswith("redis") else SqliteHuey(filename=f"{place}/huey.db")
tasks = {
    name: huey.task(name=name, retries=1 if name == "flaky" else 0, retry_delay=jobs.RETRY_S if name == "flaky" else 0)(
        getattr(jobs, name)
    )
    for name in jobs.NAMES
}


def enqueue(job, *args, delay_s=0):
    if delay_s:
        return tasks[job].schedule(args=args, delay=delay_s)
    return tasks[job](*args)


def __getattr__(name):
    if name == "target":
        return huey.create_consumer(workers=int(os.environ.get("CONTRACT_SLOTS", "4")))
    raise AttributeError(name)
