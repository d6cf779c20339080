"""A producer that enqueues in bursts, with a nudge behind each: `hand_over.py rq_app a 500 SEED`."""

import importlib
import random
import sys
import time

from waker.queues import nudge_on_enqueue

app = importlib.import_module(sys.argv[1])
chance = random.Random(int(sys.argv[4]))
nudge_on_enqueue(getattr(app, "hooked", app.target))
for number in range(int(sys.argv[3])):
    app.enqueue("record", f"{sys.argv[2]}-{number}")
    if chance.random() < 0.03:
        time.sleep(chance.uniform(0.1, 1.0))  # long enough for a machine to leave
