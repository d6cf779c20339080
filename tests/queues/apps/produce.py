"""The user's app as a process: `produce.py rq_app`. Reads a question a line, and answers it in a line."""

import importlib
import json
import sys
import traceback

from waker.queues import findings, nudge_on_enqueue, probe_for

app = importlib.import_module(sys.argv[1])
probe = probe_for(app.target)


def answer(question):
    if question["do"] == "prepare":
        return getattr(app, "prepare", lambda: None)()  # tables, where the library has some
    if question["do"] == "enqueue":
        for args in question["many"]:
            app.enqueue(question["job"], *args, delay_s=question["delay_s"])
        return len(question["many"])
    if question["do"] == "backlog":
        return tuple(probe())
    if question["do"] == "findings":
        return [tuple(finding) for finding in findings(app.target)]
    if question["do"] == "hook":
        return nudge_on_enqueue(getattr(app, "hooked", app.target))
    raise ValueError(question)


for line in sys.stdin:
    try:
        said = {"answer": answer(json.loads(line))}
    except Exception:
        said = {"error": traceback.format_exc()}
    print(json.dumps(said), flush=True)
