"""Procrastinate behind FastAPI: `uvicorn app:web` takes the orders, `worker up app:jobs` carries them out.

The tables are made by `python -m procrastinate --app=app.jobs schema --apply`.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from procrastinate import App, PsycopgConnector

from waker.queues import nudge_on_enqueue

jobs = App(connector=PsycopgConnector(conninfo=os.environ["DATABASE_URL"]))
nudge_on_enqueue(jobs)  # the line that wakes the worker after each defer


@jobs.task(retry=3)
def greet(name: str) -> None:
    print(f"Hello, {name}!", flush=True)


@asynccontextmanager
async def database(_: FastAPI) -> AsyncIterator[None]:
    async with jobs.open_async():
        yield


web = FastAPI(lifespan=database)


@web.post("/greetings/{name}", status_code=202)
async def order(name: str) -> dict[str, int]:
    return {"job": await greet.defer_async(name=name)}
