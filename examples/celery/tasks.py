"""Celery, on Redis or RabbitMQ: `greet.delay("you")` in the app, `worker up tasks:app` in the image."""

import os

from celery import Celery

from waker.queues import nudge_on_enqueue

app = Celery("greetings", broker=os.environ["BROKER_URL"])
app.conf.update(worker_concurrency=2, task_ignore_result=True)
if app.conf.broker_url.startswith("amqp"):
    app.conf.broker_transport_options = {"confirm_publish": True}  # delay() returns when RabbitMQ has the task
nudge_on_enqueue(app)  # the line that wakes the worker after each task


@app.task(autoretry_for=(ConnectionError,), retry_backoff=True)
def greet(name: str) -> None:
    print(f"Hello, {name}!", flush=True)
