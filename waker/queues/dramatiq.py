"""Dramatiq (2.2.1 was read), on Redis: what its keys there tell.

Dramatiq has no public interface for reading a queue. Its keys, as documented in its `dispatch.lua`:

- `<namespace>:<queue>` is a list of message ids, `….msgs` a hash of those and of the ones that workers hold;
- `<namespace>:<queue>.DQ`, and its `.msgs`, the same for delayed messages, retries among them;
- `<namespace>:__acks__.<worker>.<queue>` is a set of the ids that a worker holds, until it says that they are done;
- `<namespace>:__heartbeats__` has when each worker was heard of last.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..backlog import Backlog
from . import Finding, Row
from .hook import Nudges, nudge_with

if TYPE_CHECKING:
    from dramatiq import Broker, Worker

__all__ = ["ROWS", "Keys", "backlog", "broker_of", "due_ids", "findings", "nudge_on_enqueue", "queues_of"]

ROWS = (
    Row(
        "Dramatiq (Redis)",
        "worker up myapp.tasks:broker (or a Worker, for its threads and queues)",
        "nudge_on_enqueue(broker)",
        "everything; at once when the same Machine starts again, elsewhere after heartbeat_timeout (60 s)",
        "ready, running, delayed, retries, abandoned jobs",
        "a broker without Retries",
    ),
)

# When each delayed message is due, in ms: it never changes, and reading one costs a message to decode.
_etas: "WeakKeyDictionary[Broker, dict[bytes, float]]" = WeakKeyDictionary()


def broker_of(target: Any) -> Any:
    """The broker itself, or the Worker's."""
    return target.broker if hasattr(target, "worker_threads") else target


def queues_of(target: Any, names: Sequence[str] = ()) -> list[str]:
    """The queues that are named, or those that the Worker was told, or all that the actors have declared."""
    chosen = names or getattr(target, "consumer_whitelist", None) or ()
    return sorted(chosen or broker_of(target).get_declared_queues())


class Keys:
    """The names of a broker's keys in Redis."""

    def __init__(self, broker: Any) -> None:
        self._space = broker.namespace
        self.heartbeats = f"{self._space}:__heartbeats__"

    def queue(self, name: str) -> str:
        return f"{self._space}:{name}"

    def messages(self, name: str) -> str:
        return f"{self._space}:{name}.msgs"

    def held(self, worker: str, name: str) -> str:
        return f"{self._space}:__acks__.{worker}.{name}"


def backlog(target: "Broker | Worker", names: Sequence[str] = ()) -> Backlog:
    """Read the queues afresh. What a dead worker holds is ready when the heartbeat's time is up."""
    broker = broker_of(target)
    queues = queues_of(target, names)
    keys = Keys(broker)
    with broker.client.pipeline() as ask:
        ask.zrange(keys.heartbeats, 0, -1, withscores=True)
        for name in queues:
            ask.llen(keys.queue(name))
            ask.hlen(keys.messages(name))
            ask.lrange(keys.queue(f"{name}.DQ"), 0, -1)
            ask.hkeys(keys.messages(f"{name}.DQ"))
        heartbeats, *answers = ask.execute()
    now_ms = time.time() * 1000
    ready, due = 0, []
    holding: list[tuple[str, bool]] = []
    etas: dict[bytes, float] = {}
    for number, name in enumerate(queues):
        waiting, all_of_it, delayed, all_delayed = answers[number * 4 : number * 4 + 4]
        ready += waiting
        mine = _when(broker, keys.messages(f"{name}.DQ"), all_delayed)
        etas |= mine
        late = [mine[one] <= now_ms for one in delayed if one in mine]
        ready += sum(late)
        due += [mine[one] for one in delayed if one in mine and mine[one] > now_ms]
        if all_of_it > waiting:
            holding.append((name, False))
        if len(all_delayed) > len(delayed):
            holding.append((f"{name}.DQ", True))
    _etas[broker] = etas
    running = 0
    with broker.client.pipeline(transaction=False) as ask:
        held_by = [(beat + broker.heartbeat_timeout, later) for _, beat in heartbeats for _, later in holding]
        for worker, _ in heartbeats:
            for name, _ in holding:
                ask.smembers(keys.held(worker.decode(), name))
        held = ask.execute() if held_by else []
    for (until_ms, later), ids in zip(held_by, held, strict=True):
        for one in ids:
            # A worker that lives moves its delayed messages itself; a dead one's have to wait for both times.
            at_ms = max(until_ms, etas.get(one, 0)) if later else until_ms
            if at_ms <= now_ms:
                ready += 1
            else:
                running += not later
                due.append(at_ms)
    return Backlog(ready, running, min(due) / 1000 if due else None)


def _when(broker: Any, messages: str, ids: Sequence[bytes]) -> dict[bytes, float]:
    """When each of the delayed messages *ids* is due, in ms."""
    from dramatiq import Message

    known = _etas.get(broker, {})
    unknown = [one for one in ids if one not in known]
    found = {one: known[one] for one in ids if one in known}
    if unknown:
        for one, data in zip(unknown, broker.client.hmget(messages, unknown), strict=True):
            if data is not None:  # it was moved meanwhile
                found[one] = Message.decode(data).options.get("eta") or 0
    return found


def due_ids(broker: Any, name: str) -> list[bytes]:
    """The delayed messages of the queue *name* that nobody holds, and whose time has come; the earliest first."""
    keys = Keys(broker)
    ids = broker.client.lrange(keys.queue(f"{name}.DQ"), 0, -1)
    etas = _when(broker, keys.messages(f"{name}.DQ"), ids) if ids else {}
    now_ms = time.time() * 1000
    return sorted((one for one in ids if etas.get(one, now_ms) <= now_ms), key=lambda one: etas.get(one, 0))


def nudge_on_enqueue(target: "Broker | Worker", waker: Nudges | None = None) -> None:
    """From now on, nudge after each message to this broker. A delayed one nudges nobody: the watch wakes for it."""
    from dramatiq import Middleware

    nudge = nudge_with(waker)

    class Nudge(Middleware):  # type: ignore[misc]  # of a library that is not always there
        def after_enqueue(self, _broker: Any, _message: Any, delay: int | None) -> None:
            if delay is None:
                nudge()

    broker_of(target).add_middleware(Nudge())


def findings(target: "Broker | Worker") -> list[Finding]:
    """Settings that lose jobs."""
    from dramatiq.middleware import Retries

    broker = broker_of(target)
    if any(isinstance(one, Retries) for one in broker.middleware):
        return []
    risk = "a job that fails is acknowledged and gone, and so is every retry"
    return [Finding("middleware", "without Retries", risk, "add dramatiq.middleware.Retries (max_retries=0 for none)")]
