"""Celery; the pool and the broker are the environment's."""

import os

import jobs
from celery import Celery

target = Celery("contract", broker=os.environ["CONTRACT_URL"])
target.conf.update(
    worker_pool=os.environ.get("CONTRACT_POOL", "threads"), worker_concurrency=2, task_ignore_result=True
)
if os.environ.get("CONTRACT_ACKS_LATE") == "0":
    target.conf.task_acks_late = False
if os.environ["CONTRACT_URL"].startswith("amqp"):
    target.conf.broker_transport_options = {"confirm_publish": True}

for name in jobs.NAMES:
    options = {"autoretry_for": (RuntimeError,), "default_retry_delay": jobs.RETRY_S} if name == "flaky" else {}
    target.task(name=name, **options)(getattr(jobs, name))


def enqueue(job, *args, delay_s=0):
    target.tasks[job].apply_async(args, countdown=delay_s or None)
