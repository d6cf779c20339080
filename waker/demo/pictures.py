"""Pictures to make thumbnails of: landscapes as large as a camera's, the same ones for the same seed."""

import hashlib
import os
import random
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed

from PIL import Image, ImageDraw

__all__ = ["SIZE", "make"]

SIZE = (3000, 2000)
# Drawn smaller and enlarged: what a picture is made of costs less than what is done to it.
SKETCH = (1500, 1000)
HILLS = 5
POINTS = 40  # of each ridge
MAX_THREADS = 4


def make(folder: str, count: int, seed: int) -> Generator[tuple[str, str], None, None]:
    """Write *count* pictures into *folder*; yield the name and SHA-256 of each when it is there. May be ended early."""
    threads = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    try:
        for written in as_completed([threads.submit(_write, folder, number, seed) for number in range(1, count + 1)]):
            yield written.result()
    finally:
        threads.shutdown(cancel_futures=True)


def _write(folder: str, number: int, seed: int) -> tuple[str, str]:
    name = f"{number:04}.jpg"
    path = os.path.join(folder, name)
    _draw(random.Random(f"picture:{seed}:{number}")).save(path, "JPEG", quality=88)
    with open(path, "rb") as file:
        return name, hashlib.file_digest(file, "sha256").hexdigest()


def _draw(rng: random.Random) -> Image.Image:
    """A sky, a sun, some hills, and the grain that a camera adds."""
    width, height = SKETCH
    high = [rng.randrange(40, 160) for _ in range(3)]
    low = [rng.randrange(150, 256) for _ in range(3)]
    sky = Image.new("RGB", (1, 2))
    sky.putdata([tuple(high), tuple(low)])
    picture = sky.resize(SKETCH, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    x, y, radius = (
        rng.randrange(width),
        rng.randrange(height // 5, height // 2),
        rng.randrange(height // 16, height // 7),
    )
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 240, 200))
    for hill in range(HILLS):
        level = height * (0.45 + 0.11 * hill)
        ridge = []
        for point in range(POINTS + 1):
            level += rng.uniform(-0.02, 0.02) * height
            ridge.append((width * point / POINTS, level))
        shade = tuple(int(value * (0.75 - 0.13 * hill)) for value in low)
        draw.polygon([*ridge, (width, height), (0, height)], fill=shade)
    size = (width // 4, height // 4)
    grain = Image.frombytes("L", size, rng.randbytes(size[0] * size[1])).resize(SKETCH, Image.Resampling.BILINEAR)
    picture = Image.blend(picture, Image.merge("RGB", (grain, grain, grain)), 0.06)
    return picture.resize(SIZE, Image.Resampling.BILINEAR)
