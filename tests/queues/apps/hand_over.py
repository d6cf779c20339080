"""A producer that enqueues in bursts, with a nudge behind each job: `hand_over.py rq_app a 500 SEED`.

It goes on just when the machines leave: a moment after the last job of its burst has run.
"""

import importlib
import random
import sys
import time

import jobs

from waker.queues import nudge_on_enqueue

PATIENCE_S = 60
app = importlib.import_module(sys.argv[1])
who, many, chance = sys.argv[2], int(sys.argv[3]), random.Random(int(sys.argv[4]))
nudge_on_enqueue(getattr(app, "hooked", app.target))
done = 0
while done < many:
    burst = min(many - done, chance.randint(1, 40))
    for number in range(done, done + burst):
        app.enqueue("record", f"{who}-{number}")
    done += burst
    deadline = time.monotonic() + PATIENCE_S
    while not jobs.times("ran", f"{who}-{done - 1}"):
        if time.monotonic() > deadline:
            sys.exit(f"{who}-{done - 1} did not run within {PATIENCE_S} s")
        time.sleep(0.005)
    time.sleep(chance.choice([0, 0.05, 0.5, 2]) * chance.random())
