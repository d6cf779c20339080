"""The apps under examples/, one for each queue library: an order wakes the worker, which carries it out and leaves."""

import os
import subprocess
from typing import NamedTuple

import pytest
from harness import Process, ask, free_port, running, until
from queues.lab import CHECKOUT, Unavailable, for_library

from waker.emulator import Knobs


class Example(NamedTuple):
    """How one is run; {url} is its server's."""

    folder: str
    extra: str
    server: str
    target: str
    env: dict[str, str]
    pins: tuple[str, ...] = ()
    before: tuple[str, ...] = ()  # `python …` that makes its tables
    order: str = ""  # Python that enqueues: greet, and the name "you"
    web: tuple[str, ...] = ()  # or `python …` that serves the web, at {port} ...
    path: str = ""  # ... and where it takes orders


EXAMPLES = (
    Example(
        "saq",
        "saq",
        "redis",
        "tasks:settings",
        {"REDIS_URL": "{url}"},
        order="import asyncio, tasks; asyncio.run(tasks.order('you'))",
    ),
    Example(
        "arq",
        "arq",
        "redis",
        "tasks:WorkerSettings",
        {"REDIS_URL": "{url}"},
        order="import asyncio, tasks; asyncio.run(tasks.order('you'))",
    ),
    Example(
        "streaq",
        "streaq",
        "redis",
        "tasks:worker",
        {"REDIS_URL": "{url}"},
        order="import asyncio, tasks; asyncio.run(tasks.order('you'))",
    ),
    Example(
        "taskiq",
        "taskiq",
        "redis",
        "tasks:broker",
        {"REDIS_URL": "{url}"},
        order="import asyncio, tasks; asyncio.run(tasks.greet.kiq('you'))",
    ),
    Example(
        "rq",
        "rq",
        "redis",
        "tasks:queue",
        {"REDIS_URL": "{url}"},
        order='import tasks; tasks.queue.enqueue(tasks.greet, "you")',
    ),
    Example(
        "celery",
        "celery",
        "redis",
        "tasks:app",
        {"BROKER_URL": "{url}"},
        order='import tasks; tasks.greet.delay("you")',
    ),
    Example(
        "celery",
        "celery",
        "rabbit",
        "tasks:app",
        {"BROKER_URL": "{url}"},
        order='import tasks; tasks.greet.delay("you")',
    ),
    Example("huey", "huey", "redis", "tasks:huey", {"REDIS_URL": "{url}"}, order='import tasks; tasks.greet("you")'),
    Example(
        "django",
        "django_tasks",
        "files",
        "mysite.asgi:application",
        {"DATABASE_FILE": "{folder}/db.sqlite3", "DJANGO_SETTINGS_MODULE": "mysite.settings"},
        before=("-m", "django", "migrate", "--verbosity=0"),
        web=("-m", "django", "runserver", "--noreload", "127.0.0.1:{port}"),
        path="/greetings/you",
    ),
    Example(
        "dramatiq",
        "dramatiq",
        "redis",
        "tasks:broker",
        {"REDIS_URL": "{url}"},
        order='import tasks; tasks.greet.send("you")',
    ),
    Example(
        "pgqueuer",
        "pgqueuer",
        "postgres",
        "tasks:main",
        {"DATABASE_URL": "{url}", "PGDSN": "{url}"},
        before=("-m", "pgqueuer", "install"),
        order="import asyncio, tasks; asyncio.run(tasks.order('you'))",
    ),
    Example(
        "procrastinate",
        "procrastinate",
        "postgres",
        "app:jobs",
        {"DATABASE_URL": "{url}"},
        pins=("fastapi>=0.115", "uvicorn>=0.30"),
        before=("-m", "procrastinate", "--app=app.jobs", "schema", "--apply"),
        web=("-m", "uvicorn", "app:web", "--port", "{port}"),
        path="/greetings/you",
    ),
)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda one: f"{one.folder}-{one.server}")
def test_an_order_wakes_the_worker_of_the_example(example, servers, fly_platform, tmp_path):
    folder = f"{CHECKOUT}/examples/{example.folder}"
    try:
        venv, url = for_library(example.extra, example.pins), servers(example.server).freshen()
    except Unavailable as why:
        pytest.skip(str(why))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WORKER_", "WAKER_", "FLY_"))}
    own = {name: value.format(url=url, folder=tmp_path) for name, value in example.env.items()}
    env = {**inherited, **own, "PATH": f"{venv}/bin:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}
    if example.before:
        subprocess.run([f"{venv}/bin/python", *example.before], cwd=folder, env=env, check=True, timeout=60)
    platform = fly_platform(
        [f"{venv}/bin/worker", "up", example.target],
        machines=1,
        knobs=Knobs(time_scale=0.05),
        cwd=folder,
        env={**env, "WORKER_LINGER_S": "0"},
    )
    env["WAKER_TARGET"] = platform.url
    if example.web:
        port = free_port()
        words = [word.format(port=port) for word in example.web]
        with running(Process([f"{venv}/bin/python", *words], env=env, cwd=folder)) as web:
            until(lambda: _order(port, example.path, web), "the order was taken")
            _carried_out(platform)
    else:
        subprocess.run([f"{venv}/bin/python", "-c", example.order], cwd=folder, env=env, check=True, timeout=60)
        _carried_out(platform)


def _order(port, path, web):
    assert web.popen.poll() is None, web.text()
    try:
        return ask(port, path, method="POST").status in (200, 202)
    except ConnectionRefusedError:
        return False  # it is starting


def _carried_out(platform):
    machine = platform.machines[0].id
    until(lambda: any("Hello, you!" in line for line in platform.logs(machine)), "the worker greeted")
    platform.wait_all_stopped(60)
