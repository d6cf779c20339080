"""The smallest worker: one task on the embedded queue, run by `worker up tasks:queue`."""

import hashlib
import os

from waker import SqliteQueue

# One file, for one machine and for development. On Fly it has to be on a volume; see fly.toml.
queue = SqliteQueue(os.environ.get("JOBS_FILE", "jobs.db"))


@queue.task(retries=2)
def checksum(path: str) -> str:
    """Read a file and print its SHA-256."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"{digest}  {path}", flush=True)
    return digest
