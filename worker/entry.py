"""The console scripts' way in, installed as `_wake_on_request`, a name that nobody else has.

Users have a `worker.py` or a `waker.py` of their own, in the working directory or on PYTHONPATH. Python would find
theirs first, so our folder goes to the front of the path for as long as our own code is being imported.
"""

import os
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))


def worker() -> None:
    """Run `worker …`."""
    sys.path.insert(0, ROOT)
    from worker.cli import main

    sys.exit(main())


def waker() -> None:
    """Run `waker …`."""
    sys.path.insert(0, ROOT)
    from waker.cli import main

    sys.path.remove(ROOT)
    sys.exit(main())


if __name__ == "__main__":
    # The way in for the two halves that `worker up` starts: python …/_wake_on_request.py listen | drain …
    worker()
