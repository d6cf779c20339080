"""taskiq, with its scheduler for delays, and a receiver that runs one task at a time."""

import asyncio
import os
import threading
from datetime import UTC, datetime, timedelta

import jobs
from taskiq import SmartRetryMiddleware, TaskiqScheduler
from taskiq.receiver import Receiver
from taskiq_redis import ListRedisScheduleSource, RedisStreamBroker

URL = os.environ["CONTRACT_URL"]
source = ListRedisScheduleSource(URL)
broker = hooked = RedisStreamBroker(URL, consumer_id="0").with_middlewares(
    SmartRetryMiddleware(default_delay=jobs.RETRY_S, use_jitter=False, schedule_source=source)
)
target = [TaskiqScheduler(broker, [source]), Receiver(broker, max_async_tasks=1)]
place = {}


@broker.task(task_name="run")
async def run(job, args):
    place["loop"] = asyncio.get_running_loop()
    await asyncio.to_thread(getattr(jobs, job), *args)


def enqueue(job, *args, delay_s=0):
    if not place:
        place["loop"] = asyncio.new_event_loop()
        threading.Thread(target=place["loop"].run_forever, daemon=True).start()
    kicker = run.kicker().with_labels(retry_on_error=job == "flaky")
    if delay_s:
        work = kicker.schedule_by_time(source, datetime.now(UTC) + timedelta(seconds=delay_s), job, list(args))
    else:
        work = kicker.kiq(job, list(args))
    asyncio.run_coroutine_threadsafe(work, place["loop"]).result(30)
