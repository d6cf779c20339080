"""Procrastinate, with a heartbeat of a second, so that a dead worker is noticed while the test waits."""

import contextlib
import os

import jobs
from procrastinate import App, PsycopgConnector, RetryStrategy

app = target = App(
    connector=PsycopgConnector(conninfo=os.environ["CONTRACT_URL"], min_size=1),
    worker_defaults={"concurrency": 2, "update_heartbeat_interval": 1, "stalled_worker_timeout": 3},
)


@app.task(queue="work")
def run(job, args):
    getattr(jobs, job)(*args)


@app.task(queue="work", retry=RetryStrategy(max_attempts=2, wait=jobs.RETRY_S))
def again(job, args):
    getattr(jobs, job)(*args)


def prepare():
    with app.open():
        app.schema_manager.apply_schema()


def enqueue(job, *args, delay_s=0):
    task = again if job == "flaky" else run
    later = {"schedule_in": {"seconds": delay_s}} if delay_s else {}
    with contextlib.suppress(NotImplementedError):  # where a worker runs it is open, as its asynchronous half
        app.open()
    task.configure(**later).defer(job=job, args=list(args))
