"""Fixtures that every test may use."""

import contextlib
import os

import pytest
from harness import Machine, Process


@pytest.fixture(autouse=True)
def _clean_environ(monkeypatch):
    """No test sees the settings of whoever runs it."""
    for name in list(os.environ):
        if name.startswith(("WORKER_", "WAKER_", "FLY_")):
            monkeypatch.delenv(name)


@pytest.fixture
def machines(tmp_path):
    """`machines(*arguments, env=…)` starts `worker up …` in *tmp_path*; all are ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, env=None, cwd=None, **options):
            machine = Machine(
                *arguments, env={"TMPDIR": str(tmp_path), **(env or {})}, cwd=cwd or str(tmp_path), **options
            )
            stack.callback(machine.end)
            return machine

        yield start


@pytest.fixture
def processes(tmp_path):
    """`processes(command, env=…)` starts any command in *tmp_path*; all are ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(command, env=None, cwd=None, **options):
            process = Process(
                command, env={"TMPDIR": str(tmp_path), **(env or {})}, cwd=cwd or str(tmp_path), **options
            )
            stack.callback(process.end)
            return process

        yield start
