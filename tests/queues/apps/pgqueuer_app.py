"""PgQueuer, with a heartbeat of a second and a half, so that a dead worker is noticed while the test waits."""

import asyncio
import functools
import json
import os
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg
import jobs
from pgqueuer import AsyncpgDriver, PgQueuer, Queries
from pgqueuer.core.executors import DatabaseRetryEntrypointExecutor

URL = os.environ["CONTRACT_URL"]


class Quick(PgQueuer):
    async def run(self, *args, heartbeat_timeout=timedelta(seconds=3), **kwargs):
        await super().run(*args, heartbeat_timeout=heartbeat_timeout, **kwargs)


class Again(DatabaseRetryEntrypointExecutor):
    def __init__(self, parameters):
        super().__init__(parameters, initial_delay=timedelta(seconds=jobs.RETRY_S))


@asynccontextmanager
async def target() -> AsyncGenerator[PgQueuer, None]:
    connection = await asyncpg.connect(URL)
    pgq = Quick(AsyncpgDriver(connection))

    async def run(job):
        name, args = json.loads(job.payload)
        await asyncio.to_thread(getattr(jobs, name), *args)

    pgq.entrypoint("run", concurrency_limit=1)(run)
    pgq.entrypoint("again", executor_factory=Again)(run)
    try:
        yield pgq
    finally:
        await connection.close()


@functools.cache
def loop():
    """Where the producer's connection lives; jobs that enqueue are in threads of their own."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, daemon=True).start()
    return made


def ask(work):
    return asyncio.run_coroutine_threadsafe(work, loop()).result(30)


@functools.cache
def queries():
    return Queries(AsyncpgDriver(ask(asyncpg.connect(URL))))


def prepare():
    ask(queries().install())


def enqueue(job, *args, delay_s=0):
    payload = json.dumps([job, args]).encode()
    later = timedelta(seconds=delay_s) if delay_s else None
    ask(queries().enqueue("again" if job == "flaky" else "run", payload, execute_after=later))


def __getattr__(name):
    if name == "hooked":
        return queries()
    raise AttributeError(name)
