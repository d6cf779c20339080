"""RQ, with a heartbeat of a second, so that a dead worker is noticed while the test waits."""

import os
from datetime import timedelta

import jobs
from redis import Redis
from rq import Queue, Retry, Worker

queue = hooked = Queue(connection=Redis.from_url(os.environ["CONTRACT_URL"]))


def enqueue(job, *args, delay_s=0):
    retry = Retry(max=2, interval=jobs.RETRY_S) if job == "flaky" else None
    if delay_s:
        return queue.enqueue_in(timedelta(seconds=delay_s), getattr(jobs, job), *args, retry=retry)
    return queue.enqueue(getattr(jobs, job), *args, retry=retry)


def __getattr__(name):
    if name == "target":
        return Worker([queue], job_monitoring_interval=1)
    raise AttributeError(name)
