"""PgQueuer. The image: `worker up tasks:main`; the app: `await tasks.order("you")`. The tables: `pgq install`."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import asyncpg
from pgqueuer import AsyncpgDriver, AsyncpgPoolDriver, Job, PgQueuer, Queries

from waker.queues import nudge_on_enqueue


@asynccontextmanager
async def main() -> AsyncGenerator[PgQueuer, None]:
    """The worker, as `pgq run tasks:main` would run it."""
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=2) as pool:
        pgq = PgQueuer(AsyncpgPoolDriver(pool))

        @pgq.entrypoint("greet")
        async def greet(job: Job) -> None:
            print(f"Hello, {(job.payload or b'').decode()}!", flush=True)

        yield pgq


async def order(name: str) -> None:
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    queries = Queries(AsyncpgDriver(connection))
    nudge_on_enqueue(queries)  # the line that wakes the worker after each enqueue
    await queries.enqueue("greet", name.encode())
    await connection.close()
