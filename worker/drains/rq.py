"""RQ (3.0.0 was read): its own worker in burst mode, in this process.

A Queue, or a list of them, is drained by `rq.Worker`, which forks for each job; a Worker object by its own class, with
its own settings. What differs from `rq worker --burst`:

- due jobs are moved to their queue before and during a pass (burst mode does it once, where a scheduler is asked for);
- what a dead worker held is put back, also without `Retry`, at most LOST_MOST times for one job (RQ gives it up);
- a forking worker's heartbeat is shorter, so that this happens after half a minute, and not after one and a half;
- signals are the drainer's: the worker stops between two jobs when it is told to;
- a broker that is down ends the pass, so that the drainer decides how long to try (RQ would try for ever).
"""

import threading
import time
import uuid
from typing import Any

from ..aside import late
from . import Backlog, Options, Pulse

__all__ = ["Drain"]

probe = late("waker.queues.rq")

# A job that was running when its worker died so often may be what kills them.
LOST_MOST = 3
LOST_KEY = "wake_on_request_lost"
# A worker that forks tells Redis so often that it lives, and counts as dead when it has missed so many.
BEAT_S = 10
BEATS_MISSED = 3
PROMOTE_S = 1.0
# Long enough for one job to be put back; the other drainers leave it alone meanwhile.
RECOVER_LOCK_MS = 10_000


class Drain:
    """Runs the jobs of some RQ queues, one at a time, as one RQ worker does."""

    def __init__(self, target: Any, pulse: Pulse, options: Options) -> None:
        import redis
        import rq

        queues = probe.queues_of(target, options.queues)
        self.broker_errors: tuple[type[BaseException], ...] = (redis.ConnectionError, redis.TimeoutError)
        self._queues = queues
        self._connection = queues[0].connection
        self._pulse = pulse
        # Workers of this run have names that begin so; those of this machine's earlier runs begin with its own name.
        self._ours = options.machine or f"wake-{uuid.uuid4().hex}"
        self._run = uuid.uuid4().hex[:12]
        self._passes = 0
        self._promoted_at = 0.0
        self._recovered = False
        self._stop = threading.Event()
        # A worker talks to Redis when it is made; that takes time, and may have to be tried again.
        self._given = target if isinstance(target, rq.worker.BaseWorker) else None
        self._worker: Any = None

    def backlog(self) -> Backlog:
        if not self._recovered:
            # What this machine held in an earlier boot is ready, and no reading but ours can know.
            self._recover()
        reading: Backlog = probe.backlog(self._queues)
        return reading

    def work(self, stop: threading.Event) -> int:
        self._stop = stop
        worker = self._made()
        # A new name for each pass: RQ refuses the name of a worker whose death it was not told of.
        self._passes += 1
        worker.name = f"{self._ours}-{self._run}-{self._passes}"
        self._recover()
        self._promote()
        try:
            worker.work(burst=True)
        finally:
            self._pulse.running = 0
        self._pulse.failed += int(self._connection.hget(worker.key, "failed_job_count") or 0)
        return 0

    def release(self) -> None:
        worker = self._worker
        if worker is None:
            return
        worker.releasing = True
        if worker.horse_pid:
            worker.kill_horse()  # `handle_job_failure`, on the main thread, puts its job back
            return
        for execution in list(worker.executions.values()):
            self._put_back(execution.job, execution)

    def _made(self) -> Any:
        if self._worker is None:
            self._worker = self._make()
        return self._worker

    def _make(self) -> Any:
        """The user's worker, or RQ's default one, as a drainer needs it."""
        import rq

        drain, pulse, broker_errors = self, self._pulse, self.broker_errors
        first = self._queues[0]
        worker: Any = self._given or rq.Worker(self._queues, connection=first.connection, job_class=first.job_class,
                                               queue_class=type(first), serializer=first.serializer)  # fmt: skip
        base: Any = type(worker)
        beats = issubclass(base, rq.Worker)

        class Drained(base):  # type: ignore[misc]  # whichever class the user's worker has
            releasing = False
            max_connection_wait_time = 1.0

            def _install_signal_handlers(self) -> None:
                pass

            def dequeue_job_and_maintain_ttl(self, *args: Any, **kwargs: Any) -> Any:
                if drain._stop.is_set():
                    return None
                if time.monotonic() - drain._promoted_at > PROMOTE_S:
                    drain._promote()
                return super().dequeue_job_and_maintain_ttl(*args, **kwargs)

            def execute_job(self, *args: Any, **kwargs: Any) -> Any:
                pulse.running = 1
                try:
                    return super().execute_job(*args, **kwargs)
                finally:
                    pulse.running = 0
                    pulse.done += 1

            def get_heartbeat_ttl(self, job: Any, *args: Any, **kwargs: Any) -> int:
                theirs: int = super().get_heartbeat_ttl(job, *args, **kwargs)
                return min(theirs, BEATS_MISSED * self.job_monitoring_interval) if beats else theirs

            def heartbeat(self, *args: Any, **kwargs: Any) -> None:
                try:
                    super().heartbeat(*args, **kwargs)
                except broker_errors as error:
                    # RQ sleeps and tries again, for ever, when it sees the error itself.
                    raise BrokerLost(str(error)) from error

            def handle_job_failure(self, job: Any, queue: Any, *args: Any, **kwargs: Any) -> None:
                if self.releasing:
                    pulse.done -= 1
                    drain._put_back(job, kwargs.get("execution"))
                else:
                    super().handle_job_failure(job, queue, *args, **kwargs)

        Drained.__name__ = base.__name__
        worker.__class__ = Drained
        worker.job_monitoring_interval = min(worker.job_monitoring_interval, BEAT_S)
        worker.queues = worker._ordered_queues = list(self._queues)
        return worker

    def _promote(self) -> None:
        """Move due jobs to their queues, as RQ's scheduler does, under its lock."""
        from rq.scheduler import RQScheduler

        self._promoted_at = time.monotonic()
        with self._connection.pipeline(transaction=False) as ask:
            for queue in self._queues:
                ask.zcount(queue.scheduled_job_registry.key, "-inf", time.time())
            if not any(ask.execute()):
                return
        scheduler = RQScheduler(self._queues, connection=self._connection, serializer=self._queues[0].serializer)
        if scheduler.acquire_locks():
            try:
                scheduler.enqueue_scheduled_jobs()
            finally:
                scheduler.release_locks()

    def _recover(self) -> None:
        """Put back what nobody holds any more: RQ's time for it is up, or this machine held it before this pass."""
        from rq.executions import Execution

        now = int(time.time())
        for queue in self._queues:
            registry = queue.started_job_registry
            for member, score in self._connection.zrange(registry.key, 0, -1, withscores=True):
                execution = Execution.from_composite_key(member.decode(), self._connection)
                if (score < now or self._was_ours(execution)) and self._claim(member):
                    self._revive(queue, queue.fetch_job(execution.job_id), execution)
            popped = queue.intermediate_queue
            for job_id in popped.get_job_ids():
                if popped.should_be_cleaned_up(job_id) and job_id not in registry and self._claim(job_id.encode()):
                    self._revive(queue, queue.fetch_job(job_id), None)
        self._recovered = True

    def _was_ours(self, execution: Any) -> bool:
        try:
            execution.refresh()
        except ValueError:
            return False  # it has ended meanwhile
        name: str = execution.worker_name
        return name.startswith(f"{self._ours}-")

    def _claim(self, member: bytes) -> bool:
        """One drainer at a time puts this one back; the others leave it alone for RECOVER_LOCK_MS."""
        key = b"wake-on-request:recovers:" + member
        return bool(self._connection.set(key, 1, nx=True, px=RECOVER_LOCK_MS))

    def _revive(self, queue: Any, job: Any, execution: Any) -> None:
        """A worker died with this job: again, as `Retry` says; without it at once, but not for ever."""
        from rq.job import JobStatus

        if job is None or job.get_status() not in (JobStatus.STARTED, JobStatus.QUEUED):
            with self._connection.pipeline() as pipeline:
                if execution is not None:
                    pipeline.zrem(queue.started_job_registry.key, execution.composite_key)
                    pipeline.lrem(queue.intermediate_queue_key, 1, execution.job_id)
                pipeline.execute()
            return
        lost = job.meta.get(LOST_KEY, 0)
        if job.should_retry or lost >= LOST_MOST:
            self._made().handle_job_failure(job, queue, exc_string="its worker died", execution=execution)
            self._connection.lrem(queue.intermediate_queue_key, 1, job.id)
        else:
            job.meta[LOST_KEY] = lost + 1
            self._put_back(job, execution)

    def _put_back(self, job: Any, execution: Any) -> None:
        """To the front of its queue, in one step with the end of its execution."""
        queue = next(queue for queue in self._queues if queue.name == job.origin)
        with self._connection.pipeline() as pipeline:
            if execution is not None:
                execution.delete(job=job, pipeline=pipeline)
            pipeline.lrem(queue.intermediate_queue_key, 1, job.id)
            queue._enqueue_job(job, pipeline=pipeline, at_front=True)  # as Job.retry does
            pipeline.execute()


class BrokerLost(Exception):  # noqa: N818 - what happened
    """Redis went away during a pass. RQ ends the pass on it; the next reading finds out how Redis is."""
