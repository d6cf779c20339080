"""Dramatiq on RabbitMQ, or on Redis with a heartbeat so short that a dead worker is noticed while the test waits."""

import os

import dramatiq
import jobs

url = os.environ["CONTRACT_URL"]
if url.startswith("amqp"):
    from dramatiq.brokers.rabbitmq import RabbitmqBroker

    broker = hooked = RabbitmqBroker(url=url, confirm_delivery=True)
else:
    from dramatiq.brokers.redis import RedisBroker

    broker = hooked = RedisBroker(url=url, heartbeat_timeout=3000)
dramatiq.set_broker(broker)
target = dramatiq.Worker(broker, worker_threads=int(os.environ.get("CONTRACT_SLOTS", "4")))
wait_ms = jobs.RETRY_S * 1000
actors = {
    name: dramatiq.actor(
        getattr(jobs, name), max_retries=2 if name == "flaky" else 0, min_backoff=wait_ms, max_backoff=wait_ms
    )
    for name in jobs.NAMES
}


def enqueue(job, *args, delay_s=0):
    return actors[job].send_with_options(args=args, delay=int(delay_s * 1000) or None)
