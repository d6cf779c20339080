"""What the jobs of the contract do, whichever library runs them. An app's `enqueue(job, *args, delay_s=0)` is its own.

A job's name is a function here. "flaky" is to be retried RETRY_S seconds after its failure, "fail" not at all.
"""

import importlib
import os
import time

RETRY_S = 2
NAMES = ("record", "fan", "chain", "fail", "flaky", "slow", "hang")


def note(word, name):
    """One line, in one write."""
    file = os.open(os.environ["CONTRACT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, f"{word} {name}\n".encode())
    os.close(file)


def times(word, name):
    with open(os.environ["CONTRACT_LOG"], "a+", encoding="utf-8") as log:
        log.seek(0)
        return log.read().count(f"{word} {name}\n")


def enqueue(job, *args):
    importlib.import_module(os.environ["CONTRACT_APP"]).enqueue(job, *args)


def record(name):
    note("ran", name)


def fan(name, width):
    for number in range(width):
        enqueue("record", f"{name}.{number}")
    note("ran", name)


def chain(name, length):
    note("ran", f"{name}.{length}")
    if length > 1:
        enqueue("chain", name, length - 1)


def fail(name):
    note("tried", name)
    raise RuntimeError("as told")


def flaky(name):
    note("tried", name)
    if times("tried", name) < 2:
        raise RuntimeError("the first time")
    note("ran", name)


def slow(name, seconds):
    note("began", name)
    time.sleep(seconds)
    note("ran", name)


def hang(name):
    """Never ends the first time, and at once after it."""
    note("began", name)
    if times("began", name) < 2:
        time.sleep(600)
    note("ran", name)
