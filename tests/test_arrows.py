"""The arrows between the rooms go one way: who may import whom, read from the source."""

import ast
import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import waker
import worker

FOLDERS = {name: os.path.dirname(package.__file__) for name, package in (("worker", worker), ("waker", waker))}

# Values in, values out: no clock, no socket, no environment, no chance, no thread, and nothing that has them.
PURE = (
    "worker.door",
    "waker.backlog",
    "waker.emulator.bodies",
    "waker.emulator.knobs",
    "waker.emulator.leases",
    "waker.emulator.message",
    "waker.emulator.operations",
    "waker.emulator.rates",
    "waker.emulator.routing",
    "waker.emulator.shapes",
    "waker.emulator.states",
    "waker.errors",
    "waker.machines.errors",
    "waker.machines.records",
    "waker.machines.requests",
    "waker.policy",
    "waker.protocol",
    "waker.rules",
    "waker.target",
)
IMPURE = [
    "aiohttp",
    "asyncio",
    "datetime",
    "http",
    "httpx",
    "logging",
    "os",
    "random",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "sqlite3",
    "ssl",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
    "urllib.request",
]

# Where the process's environment enters; everybody else is given it. A pytest plugin is an edge as a command line is,
# and the demo's tasks are like a user's code.
READS_ENVIRONMENT = {
    "worker.cli",
    "worker.config",
    "waker.cli",
    "waker.config",
    "waker.machines.config",
    "waker.emulator.fixture",
    "waker.demo.tasks",
}
# Where a person is in front of it: the only ones who bring client and emulator together.
USES_EMULATOR = ("waker.emulator", "waker.verbs", "waker.demo")


class Import(NamedTuple):
    """One import: who, whom, the line, whether at the top of the module, relative, or for a type checker alone."""

    by: str
    what: str
    line: int
    top: bool
    relative: bool
    for_types: bool


def modules() -> Iterator[tuple[str, str]]:
    """The name and the source of every module of both packages."""
    for package, folder in FOLDERS.items():
        for path, _, files in os.walk(folder):
            for file in files:
                if file.endswith(".py"):
                    below = os.path.relpath(os.path.join(path, file), folder).removesuffix(".py").split(os.sep)
                    name = ".".join([package, *below]).removesuffix(".__init__")
                    with open(os.path.join(path, file), encoding="utf-8") as opened:
                        yield name, opened.read()


SOURCES = dict(modules())
PACKAGES = {name.rpartition(".")[0] for name in SOURCES}


def imports(name: str, source: str) -> Iterator[Import]:
    """Every import of a module, wherever in it."""

    def walk(node: ast.AST, top: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(name, alias.name, child.lineno, top, False, for_types)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = name if name in PACKAGES else name.rpartition(".")[0]
                    above = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*above, *([base] if base else [])])
                for alias in child.names:
                    below = f"{base}.{alias.name}"
                    yield Import(
                        name, below if below in SOURCES else base, child.lineno, top, child.level > 0, for_types
                    )
            else:
                types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, top and not inside, for_types or types)

    return walk(ast.parse(source), True, False)


IMPORTS = [each for name, source in SOURCES.items() for each in imports(name, source)]


def within(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def wrong(found: list[Import]) -> list[str]:
    return [f"{each.by}:{each.line} imports {each.what}" for each in found]


def test_waker_never_imports_worker() -> None:
    """An app has no use for what runs in the image; the image may use the app's side."""
    assert wrong([each for each in IMPORTS if within(each.by, "waker") and within(each.what, "worker")]) == []
    assert any(within(each.by, "worker") and within(each.what, "waker") for each in IMPORTS)


def test_the_emulator_imports_nothing_of_the_client() -> None:
    """They must not be wrong together: the emulator knows of our package only itself."""
    outside = [
        each for each in IMPORTS if within(each.by, "waker.emulator") and not within(each.what, "waker.emulator")
    ]
    assert wrong([each for each in outside if within(each.what, "waker", "worker")]) == []


def test_the_client_never_imports_the_emulator() -> None:
    """Commands for people may: the verbs, and the demo."""
    using = [each for each in IMPORTS if within(each.what, "waker.emulator") and not within(each.by, *USES_EMULATOR)]
    assert wrong(using) == []


def test_the_worker_imports_no_command_and_no_emulator() -> None:
    """The image's cold start pays for what it imports."""
    rooms = ("waker.cli", "waker.verbs", "waker.demo", "waker.emulator", "waker.client", "waker.nudge", "waker.watch")
    users = [each for each in IMPORTS if within(each.what, *rooms) and within(each.by, "worker")]
    assert wrong([each for each in users if each.by != "worker.entry"]) == []  # the scripts' way in, for both commands


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_imports_no_clock_socket_or_environment(name: str) -> None:
    """Nor one of ours that is not pure."""
    own = [each for each in IMPORTS if each.by == name and not each.for_types]
    assert wrong([each for each in own if within(each.what, *IMPURE)]) == []
    assert wrong([each for each in own if within(each.what, "worker", "waker") and not within(each.what, *PURE)]) == []


def test_our_own_modules_are_imported_relatively() -> None:
    """The packages are also loaded under a private name, where `import worker` is the user's."""
    named = [each for each in IMPORTS if not each.relative and not each.for_types]
    own = [each for each in named if within(each.what, each.by.partition(".")[0])]
    assert wrong([each for each in own if each.by != "worker.entry"]) == []


def test_a_drain_imports_neither_package_by_name() -> None:
    """It is loaded after the user's code, when both names may be somebody else's."""
    drains = [each for each in IMPORTS if within(each.by, "worker.drains") and not each.relative and not each.for_types]
    assert wrong([each for each in drains if within(each.what, "worker", "waker")]) == []


def environment_uses(source: str) -> list[int]:
    """The lines that reach for the process's environment."""
    words = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in words and getattr(node.value, "id", "") in ("os", "posix"):
            found.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "posix"):
            found += [node.lineno for alias in node.names if alias.name in words]
    return found


def test_nobody_but_the_edges_reads_the_environment() -> None:
    """cli.py hands it to config.py; the rest has never heard of it."""
    uses = [f"{name}:{line}" for name, source in SOURCES.items() if name not in READS_ENVIRONMENT
            for line in environment_uses(source)]  # fmt: skip
    assert uses == []


def test_the_arrows_are_found_where_they_hide() -> None:
    """In functions, behind dots, as names of a package, and under another name."""
    source = """
from ..client import Waker
from .. import policy, __version__
if TYPE_CHECKING:
    from . import states
def late():
    import worker.door as door
    from os import environ as e
    return os.getenv("HOME")
"""
    found = {(each.what, each.top, each.for_types) for each in imports("waker.emulator.proxy", source)}
    assert found == {
        ("waker.client", True, False),
        ("waker.policy", True, False),
        ("waker", True, False),
        ("waker.emulator.states", True, True),
        ("worker.door", False, False),
        ("os", False, False),
    }
    assert environment_uses(source) == [8, 9]
