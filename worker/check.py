"""`worker check`: says what is wrong with the configuration before it is deployed.

It reads fly.toml, the Dockerfile beside it and, on a Machine, the environment; with `module:object` it imports the
queue. What is looked at stands in one table, waker/rules.py. The exit code: 0 if nothing is worse than a warning, 1 if
something is an error, 2 if there is nothing that can be checked.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import MutableMapping

from waker import rules
from waker.errors import LoadError
from waker.load import load
from waker.rules import Deployment, Finding, Queue

from . import aside
from .drains import UnknownQueue, drain_for, install_hint
from .manifest import ManifestError, read

__all__ = ["check"]

EXIT_ERRORS = 1
EXIT_USAGE = 2


def check(args: argparse.Namespace, environ: MutableMapping[str, str]) -> int:
    """Print what is wrong, the errors first; return the exit code."""
    try:
        manifest = read(args.file, environ)
    except ManifestError as error:
        print(f"worker check: {error}", file=sys.stderr)
        return EXIT_USAGE
    deployments = list(manifest.deployments)
    about_target: list[Finding] = []
    if args.target:
        environ.update(manifest.env)  # the module is imported as it will be
        try:
            deployments = _with_queue(args.target, deployments)
        except LoadError as error:
            about_target.append(Finding("target", rules.ERROR, args.target, str(error)))
    found = dict.fromkeys([*about_target, *(finding for each in deployments for finding in rules.findings(each))])
    ordered = sorted(found, key=lambda finding: finding.severity != rules.ERROR)
    errors = sum(finding.severity == rules.ERROR for finding in ordered)
    code = EXIT_ERRORS if errors else 0
    files = " and ".join(manifest.files)
    if args.json:
        as_json = [dataclasses.asdict(finding) for finding in ordered]
        report = {"files": manifest.files, "errors": errors, "warnings": len(ordered) - errors, "findings": as_json}
        print(json.dumps(report))
        return code
    for finding in ordered:
        print(finding)
    counts = f"{_count(errors, 'error')}, {_count(len(ordered) - errors, 'warning')}"
    print(f"{files}: {counts if ordered else 'nothing is wrong'}")
    return code


def _with_queue(target: str, deployments: list[Deployment]) -> list[Deployment]:
    """Import *target*, and add what the rules look at. Raises LoadError, also if no drain is known for it."""
    here = os.getcwd()
    aside.step_aside(here)
    try:
        loaded = load(target)
    except LoadError as error:
        raise LoadError(f"{error}{install_hint(error.__cause__)}") from error
    name = drain_for(loaded)
    if isinstance(name, UnknownQueue):
        raise LoadError(f"{target!r}: {name.why}; a command is run with: worker up -- COMMAND")
    settings = tuple((target, found._asdict()) for found in aside.late("waker.queues").findings(loaded))
    queue = None
    if name == "sqlite":
        # A relative path was made absolute here; in the image it will be so below the working directory there.
        path: str = loaded.path  # type: ignore[attr-defined]  # a SqliteQueue, by the user's name for it
        image = next((each.image for each in deployments if each.image is not None), None)
        if image is not None and path.startswith(here.rstrip("/") + "/"):
            path = os.path.join(image.workdir, os.path.relpath(path, here))
        queue = Queue(path, target)
    return [dataclasses.replace(each, queue=queue, queue_settings=settings) for each in deployments]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
