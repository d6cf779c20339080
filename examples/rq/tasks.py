"""RQ: `queue.enqueue(greet, "you")` in the app, `worker up tasks:queue` in the image.

RQ's worker forks for each job. For its other workers: `worker = SimpleWorker([queue])`, and `worker up tasks:worker`.
"""

import os

from redis import Redis
from rq import Queue

from waker.queues import nudge_on_enqueue

queue = Queue("greetings", connection=Redis.from_url(os.environ["REDIS_URL"]))
nudge_on_enqueue(queue)  # the line that wakes the worker after each job


def greet(name: str) -> None:
    print(f"Hello, {name}!", flush=True)
