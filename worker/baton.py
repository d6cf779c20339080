"""The baton: a machine that was told to stop wakes another one for what it leaves in the queue.

Only after the library has put back what it held. A receipt with our own machine id is no receipt. Used by the
drainer, and by the parent where the drainer could not say how it left things.
"""

import time
from typing import TYPE_CHECKING

from waker import protocol

from .config import Config

if TYPE_CHECKING:
    import queue

__all__ = ["EXIT_JOBS_LEFT", "EXIT_PASS_IT_ON", "pass_on"]

# Jobs may be left, and somebody should try again: sysexits.h calls it EX_TEMPFAIL.
EXIT_JOBS_LEFT = 75
# A drainer whose library did not stop in time: everything is put back, only its own end ends the job that still runs,
# so its parent passes the baton. The machine then ends with 0 if it was taken, and with 75 if not.
EXIT_PASS_IT_ON = 76

# The proxy may send the first two to the machine that is stopping, which holds them: the third goes elsewhere.
AT_ONCE = 3
PAUSE_S = 0.25
MOST_S = 5.0


def pass_on(config: Config, depth: int, within_s: float) -> str:
    """Ask for another machine; return its id, or "" if none gave a receipt within *within_s* seconds (5 at most).

    *depth*: how often the baton was passed before it reached this machine; at `MAX_BATON_DEPTH` it is not passed again.
    """
    if not config.baton or depth >= protocol.MAX_BATON_DEPTH or within_s <= 0:
        return ""
    import queue  # here, because only a machine that is stopped with work left needs it
    import threading

    deadline = time.monotonic() + min(within_s, MOST_S)
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    for _ in range(AT_ONCE):
        threading.Thread(target=_ask_until, args=(config, depth + 1, deadline, answers), daemon=True).start()
    for _ in range(AT_ONCE):
        try:
            taken_by = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return ""
        if taken_by:
            return taken_by
    return ""


def _ask_until(config: Config, depth: int, deadline: float, answers: "queue.SimpleQueue[str]") -> None:
    import http.client  # here, because it costs 40 ms

    while (left := deadline - time.monotonic()) > 0:
        try:
            machine = _ask(config, depth, left)
        except (OSError, http.client.HTTPException, ValueError):
            machine = ""
        if machine:
            answers.put(machine)
            return
        time.sleep(min(PAUSE_S, max(0.0, deadline - time.monotonic())))
    answers.put("")


def _ask(config: Config, depth: int, timeout_s: float) -> str:
    import http.client
    import urllib.parse

    url = urllib.parse.urlsplit(config.baton)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=timeout_s)
    headers = {
        protocol.VERSION: protocol.WIRE_VERSION,
        protocol.EXCEPT: config.machine,
        protocol.DEPTH: str(depth),
        protocol.HOLD: f"{config.hold_s:g}",
    }
    if config.tokens:
        headers[protocol.AUTHORIZATION] = f"Bearer {config.tokens[0]}"
    try:
        connection.request("POST", url.path or "/", headers=headers)
        answer = connection.getresponse()
        receipt = protocol.receipt_from(answer.headers) if answer.status == 200 else None  # type: ignore[arg-type]
    finally:
        connection.close()
    return receipt.machine if receipt is not None and receipt.machine != config.machine else ""
