"""The demo's app, as a user would write one: a queue, and a task that makes a thumbnail of a picture.

A machine runs it as `worker up waker.demo.tasks:queue`, in the folder with the pictures.
"""

import hashlib
import json
import os
import time

from PIL import Image, ImageFilter

from ..sqlite_queue import SqliteQueue

__all__ = ["queue", "shrink"]

THUMBNAIL_SIZE = (1500, 1000)

queue = SqliteQueue("jobs.db")


@queue.task
def shrink(picture: str) -> None:
    """Take the checksum of *picture* and make its thumbnail; then write down that it was done, by which machine."""
    began_at = time.monotonic()
    with open(f"pictures/{picture}", "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with Image.open(file) as image:
            thumbnail = image.resize(THUMBNAIL_SIZE, Image.Resampling.LANCZOS).filter(ImageFilter.UnsharpMask(2, 60))
    # A job may run again after its machine was killed: what it leaves is either whole or not there.
    unfinished = f"thumbnails/{picture}.{os.getpid()}"
    thumbnail.save(unfinished, "JPEG", quality=85)
    os.replace(unfinished, f"thumbnails/{picture}")
    record = {"picture": picture, "sha256": sha256, "useful_s": round(time.monotonic() - began_at, 6)}
    # One line is one write, at the end of the file, so records of two machines never mix.
    with open(f"ran/{os.environ.get('FLY_MACHINE_ID', 'local')}.jsonl", "a", encoding="ascii") as file:
        file.write(json.dumps(record) + "\n")
