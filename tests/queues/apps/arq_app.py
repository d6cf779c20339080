"""arq, with the settings of a worker as `arq` takes them. It is asynchronous, so the app has a loop on a thread."""

import asyncio
import functools
import os
import threading

import jobs
from arq import Retry, create_pool
from arq.connections import RedisSettings
from arq.worker import func

settings = RedisSettings.from_dsn(os.environ["CONTRACT_URL"])


async def run(job, _ctx, *args):
    try:
        await asyncio.to_thread(getattr(jobs, job), *args)
    except RuntimeError as error:
        if job == "flaky":
            raise Retry(defer=jobs.RETRY_S) from error
        raise


def named(job):
    async def one(ctx, *args):
        await run(job, ctx, *args)

    return func(one, name=job)


class WorkerSettings:
    functions = tuple(map(named, jobs.NAMES))
    redis_settings = settings
    max_jobs = int(os.environ.get("CONTRACT_SLOTS", "4"))


target = WorkerSettings


@functools.cache
def loop():
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, daemon=True).start()
    return made


def await_it(work):
    return asyncio.run_coroutine_threadsafe(work, loop()).result(30)


@functools.cache
def pool():
    return await_it(create_pool(settings))


def enqueue(job, *args, delay_s=0):
    await_it(pool().enqueue_job(job, *args, _defer_by=delay_s or None))


def __getattr__(name):
    if name == "hooked":
        return pool()
    raise AttributeError(name)
