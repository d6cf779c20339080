"""PgQueuer (1.6.0 was read): its own `run`, in this process, of what the factory makes that `pgq run` takes.

Its settings are the defaults of its `run`; a subclass with others is how they are changed. What differs from
`pgq run --mode drain`:

- it stops when nothing is ready and nothing is running: PgQueuer's drain mode waits for what is due tomorrow;
- the worker on a Machine has the Machine's own `queue_manager_id`, so that the next one there knows what it held;
- what was abandoned is put back before the pass, at most LOST_MOST times for one job; then it is held as failed;
- signals are the drainer's: what is running is finished, or put back when the time for that is up.
"""

import asyncio
import contextlib
import sys
import threading
import uuid
from typing import Any

from ..aside import late
from . import Backlog, Options, Pulse, Refused

__all__ = ["Drain"]

probe = late("waker.queues.pgqueuer")

LOST_MOST = 3
LOST_KEY = "wake_on_request_lost"
# What no NOTIFY tells of, like the end of a concurrency limit elsewhere, is looked for so often.
POLL_S = 1.0
# Two looks in a row that find nothing to do end the pass.
IDLE_S = 0.05
RELEASE_S = 1.0
# Without a limit on each entrypoint a worker takes whatever there is.
UNLIMITED = 1_000_000


class Drain:
    """Runs the jobs of one PgQueuer. One event loop lasts for all passes, and so does what the factory made, until its
    connection breaks."""

    def __init__(self, target: Any, pulse: Pulse, options: Options) -> None:
        import pgqueuer  # noqa: F401 - a library that is missing is told of now

        if hasattr(target, "queries") or hasattr(target, "driver"):
            raise Refused("it has a connection of one event loop; give the factory that makes it, as for `pgq run`")
        self._factory = target
        self._pulse = pulse
        self._machine = options.machine
        self._runner = asyncio.Runner()
        self._stack: contextlib.AsyncExitStack | None = None
        self._manager: Any = None
        self.broker_errors: tuple[type[BaseException], ...] = _broker_errors()

    def backlog(self) -> Backlog:
        reading: Backlog = self._runner.run(self._guard(self._read()))
        return reading

    def work(self, stop: threading.Event) -> int:
        try:
            self._runner.run(self._guard(self._work(stop)))
        finally:
            self._pulse.running = 0
        return 0

    def release(self) -> None:
        if self._manager is None:
            return
        put_back = asyncio.run_coroutine_threadsafe(self._put_back(), self._runner.get_loop())
        try:
            put_back.result(RELEASE_S)
        except Exception:
            put_back.cancel()  # a job that holds the loop; it comes back as after a kill

    async def _guard(self, work: Any) -> Any:
        """With what the factory makes; another one the next time if the connection of this one broke."""
        try:
            if self._manager is None:
                self._stack = contextlib.AsyncExitStack()
                self._manager = await self._stack.enter_async_context(self._factory())
                self._prepare()
            return await work
        except BaseException:
            work.close()
            stack, self._stack, self._manager = self._stack, None, None
            if stack is not None:
                with contextlib.suppress(Exception):
                    await stack.aclose()
            raise

    def _prepare(self) -> None:
        """Give the worker its name, and have it tell what it ends."""
        manager, pulse = self._manager, self._pulse
        qm, queries = getattr(manager, "qm", manager), manager.queries
        if self._machine:
            qm.queue_manager_id = uuid.uuid5(uuid.NAMESPACE_URL, f"wake-on-request:{self._machine}")
        limits = [one.parameters.concurrency_limit for one in qm.entrypoint_registry.values()]
        pulse.slots = sum(limits) if limits and all(limits) else UNLIMITED
        log_jobs, retry_job, set_schedule_queued = queries.log_jobs, queries.retry_job, queries.set_schedule_queued

        async def logged(jobs: Any) -> None:
            await log_jobs(jobs)
            pulse.done += len(jobs)
            pulse.failed += sum(status not in ("successful", "canceled") for _, status, _ in jobs)

        async def retried(*args: Any, **kwargs: Any) -> None:
            await retry_job(*args, **kwargs)
            pulse.done += 1
            pulse.failed += 1

        async def scheduled(ids: Any) -> None:
            await set_schedule_queued(ids)
            pulse.done += len(ids)

        queries.log_jobs, queries.retry_job, queries.set_schedule_queued = logged, retried, scheduled

    async def _read(self) -> Backlog:
        reading = probe.read(self._manager, getattr(self._manager, "qm", self._manager).queue_manager_id)
        rows = await self._manager.queries.driver.fetch(reading.query, *reading.arguments)
        backlog: Backlog = reading.backlog_of(rows)
        return backlog

    async def _work(self, stop: threading.Event) -> None:
        from datetime import timedelta

        manager = self._manager
        await self._recover()
        manager.shutdown.clear()
        driver, listeners = manager.queries.driver, []
        add_listener = driver.add_listener

        async def listened(channel: Any, callback: Any) -> None:
            await add_listener(channel, callback)
            listeners.append((channel, callback))

        driver.add_listener = listened
        watching = asyncio.ensure_future(self._stop_when_idle(stop))
        try:
            await manager.run(dequeue_timeout=timedelta(seconds=POLL_S))
        finally:
            watching.cancel()
            driver.add_listener = add_listener
            for channel, callback in listeners:
                # A worker leaves its listener behind; the next pass has its own.
                if hasattr(driver, "remove_listener"):
                    await driver.remove_listener(channel, callback)
        if watching.done() and not watching.cancelled() and (error := watching.exception()) is not None:
            raise error

    async def _stop_when_idle(self, stop: threading.Event) -> None:
        manager = self._manager
        qm = getattr(manager, "qm", manager)
        schedules = getattr(getattr(manager, "sm", None), "active_heartbeat_ids", ())
        looks = 0
        try:
            while not stop.is_set() and looks < 2:
                await asyncio.sleep(IDLE_S)
                self._pulse.running = len(qm.job_context) + len(schedules)
                busy = self._pulse.running or (await self._read()).ready
                looks = 0 if busy else looks + 1
        finally:
            manager.shutdown.set()

    async def _recover(self) -> None:
        """Put back what nobody holds any more: no heartbeat for too long, or held by this machine before this pass."""
        from datetime import timedelta

        queries, qm = self._manager.queries, getattr(self._manager, "qm", self._manager)
        await queries.driver.execute(
            f"""
            UPDATE {queries.qbq.settings.qualified.queue_table}
               SET status = (CASE WHEN coalesce((headers ->> '{LOST_KEY}')::int, 0) < {LOST_MOST}
                             THEN 'queued' ELSE 'failed' END)::{queries.qbq.settings.qualified.queue_status_type},
                   headers = CASE jsonb_typeof(headers) WHEN 'object' THEN headers ELSE '{{}}' END
                     || jsonb_build_object('{LOST_KEY}', coalesce((headers ->> '{LOST_KEY}')::int, 0) + 1),
                   queue_manager_id = NULL, updated = now()
             WHERE status = 'picked' AND (queue_manager_id = $1 OR heartbeat < now() - $2::interval)
            """,  # noqa: S608 - the names are checked by PgQueuer's settings
            qm.queue_manager_id,
            timedelta(seconds=probe.heartbeat_s(self._manager)),
        )

    async def _put_back(self) -> None:
        queries, qm = self._manager.queries, getattr(self._manager, "qm", self._manager)
        await queries.driver.execute(
            f"UPDATE {queries.qbq.settings.qualified.queue_table} SET status = 'queued', queue_manager_id = NULL, "  # noqa: S608
            "updated = now() WHERE status = 'picked' AND queue_manager_id = $1",
            qm.queue_manager_id,
        )


def _broker_errors() -> tuple[type[BaseException], ...]:
    """What the drivers raise that the user's code has imported."""
    errors: list[type[BaseException]] = [OSError]
    if (asyncpg := sys.modules.get("asyncpg")) is not None:
        errors += [
            asyncpg.PostgresConnectionError,
            asyncpg.InterfaceError,
            asyncpg.exceptions.OperatorInterventionError,
        ]
    if (psycopg := sys.modules.get("psycopg")) is not None:
        errors.append(psycopg.OperationalError)
    return tuple(errors)
