"""The README says what the code does: its tables are made from the code, and a test fails when they differ.

`python tests/test_readme.py --write` (make readme) writes them anew; `--demo` runs the demo for its output, too.
"""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable

import pytest
from harness import BIN
from test_arrows import SOURCES

from waker import protocol, rules
from waker.backlog import Backlog
from waker.config import TIMEOUT_S
from waker.demo.run import MachineRow, Plan, Result
from waker.demo.show import Lines
from waker.emulator import FAULTS, Knobs
from waker.emulator.knobs import UNDOCUMENTED, shown
from waker.queues import rows
from worker.config import SETTINGS, from_environ
from worker.door import Door
from worker.doorway import Left, Rung
from worker.drainer import Drainer
from worker.drains import Pulse

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
README = f"{ROOT}/README.md"

WAKER_SETTINGS = {
    "WAKER_TARGET": ("", "the worker app's private address, like `http://[fdaa:0:6ba9:0:1::2]` or `my-worker.flycast`"),
    "WAKER_TOKEN": ("", "sent as `Authorization: Bearer …`; one of the worker's `WORKER_TOKENS`"),
    "WAKER_TIMEOUT_S": (f"{TIMEOUT_S:g}", "for a whole call of `wake()`: starts, rounds and retries"),
}

# What each exit code means; every one of the code's is here.
CODES = {
    0: "the queue was empty and the door closed; or told to stop, and nothing was left or another machine took it",
    1: "`worker check`: at least one error. `waker`: nobody was woken, or a queue's file cannot be used",
    2: "wrong arguments, configuration or target, or a module that cannot be loaded",
    70: "the drain crashed outside of a job, or the listener cannot be kept running",
    71: "no drainer could be started",
    75: "jobs may be left: the broker is down, a drainer hung or got stuck, nobody took over, a job ran too long",
    76: "of the drainer, to `worker up` alone: a job was put back, so pass the baton",
    126: "`-- COMMAND`: it cannot be run",
    127: "`-- COMMAND`: it is not there",
    128: "the drainer or the command was ended by signal n, so 137 is SIGKILL, or out of memory",
}

# Every event that the code logs, in the order in which a person meets them.
EVENTS = {
    "listener.ready": "the listener answers; `door=` is open unless an earlier one of this run had closed it",
    "drainer.attached": "user code is imported: from now on a wake is answered 200",
    "wake.accepted": "a wake was answered 200, after it was held for `held_s`",
    "broker.down": "the queue cannot be reached; it is asked again for `WORKER_BROKER_RETRY_S`",
    "machine.stopping": "a stop signal arrived",
    "drainer.out_of_time": "a job did not stop in time; it was put back into the queue",
    "baton.taken": "told to stop with jobs left, and another machine holds a receipt for them",
    "baton.not_taken": "the same, and nobody took over: the exit code is not 0",
    "door.shut": "no more wakes in this run, for the reason in `why=`",
    "drainer.left": "the drainer's last line: exit code, why, jobs run, how many failed, passes",
    "drainer.detached": "its connection to the listener ended; `left=False` is a drainer that died",
    "machine.left": "the last line of a machine: its exit code, and how long it was up",
    "listener.left": "without a parent: no drainer came",
    "listener.died": "it is started again",
    "drainer.orphaned": "`worker up` is gone, so the drainer ends too: no job runs on beside the next machine",
    "machine.gave_up": "the listener cannot be kept running, so the machine ends with a code that is not 0",
    "drainer.not_started": "the target cannot be loaded",
    "drainer.killed": "it hung, or was still there long after it left",
    "drainer.kill_failed": "and could not be killed",
    "door.not_closed": "the mark of a closed door cannot be written, so the drainer stays",
    "door.mark_failed": "the mark of a shut door cannot be written",
    "doorway.broken": "somebody said something unknown on the doorway",
    "supervisor.warned": "supervisor has something to say",
    "job.failed": "a job raised, timed out or killed its worker; it is retried or dead",
    "job.fenced": "a job ended after its lease had: somebody else runs it",
    "queue.jobs_taken_back": "jobs of dead workers are ready again",
    "queue.lease_not_renewed": "the file could not be written in time for a heartbeat",
    "queue.lease_lost": "and the lease is over: others may run these jobs",
    "queue.not_released": "jobs could not be put back; their leases end by themselves",
    "enqueue.callback_failed": "what was to be called after an enqueue raised; the job is in the queue",
    "nudge.failed": "a wake in the background failed and stays owed",
    "nudge.owed": "the same, once more; `failures=` in a row",
    "nudge.dropped": "closed while a wake was owed",
    "nudge.lost": "the process ended while a wake was owed: the watch is for that",
    "watch.woke": "the watch woke machines",
    "watch.wake_failed": "it could not",
    "watch.wake_changed_nothing": "as many jobs are ready as before: it waits longer",
    "watch.reading_failed": "the backlog cannot be read",
    "waker.file_limit_raised": "a fan-out needs more open files",
    "waker.fan_out_limited": "and there are no more: it sends fewer wakes at once",
    "machines.asked_again": "the Machines API refused for now (412, 409, 429, 5xx); the call asks again",
    "machines.create_lost": "a create was not answered; its machine is looked up by name before it is repeated",
    "run.failed": "a one-off job has not run, or nobody knows whether it has; `error=` says which",
    "run.timed_out": "a one-off job ran past its `timeout_s`: its machine is stopped, and kept",
    "run.machine_left": "a one-off job is over, but its machine could not be deleted; `waker jobs reap` does it",
    "run.abandoned": "whoever waited for a one-off job gave up; its machine goes on, and says whose it is",
}

# What matters to a user of what the sources leave open; the rest is in the table of all knobs.
UNKNOWN_KNOBS = (
    "soft_limit_reading",
    "start_threshold",
    "autostart_reach",
    "gossip_s",
    "exit_settle_s",
    "wake_timeout_s",
    "on_reset",
    "elsewhere_starts",
    "default_kill_signal",
    "after_kill_timeout",
    "process_failure",
    "start_when_started",
    "exit_event_in",
    "exited_at",
    "autostop_in_answers",
)


# What a door says to a drainer that leaves, and to whoever shuts it.
ANSWERS = {True: "go", False: "read again", "": "done"}


# -- what is made from the code ----------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def code(text: object) -> str:
    return f"`{text}`" if str(text) else ""


class Story:
    """The real door and the real drainer's loop; between two of its steps the app enqueues and wakes once more."""

    broker_errors: tuple[type[BaseException], ...] = ()
    depth = 0

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.door = Door("b00t")
        self.pulse = Pulse()
        self.ready = 0
        self.readings = 0

    def tell(self) -> str:
        self.say("APP", "DOOR (the listener's)", "DRAINER (your queue library)")
        self.say()
        self.ready += 1
        self.say("enqueue, commit")
        self.say("wake", "(the proxy starts a machine)")
        self.say("", f"ring: {self.door.ring()} → 200, a receipt")
        config = from_environ({"WORKER_LINGER_S": "0"})
        drainer = Drainer(config, self, self.pulse, self, threading.Event(), pass_baton=lambda *_: "", now=lambda: 0.0)
        outcome = drainer.run()
        self.say("", "", f"exit {outcome.code}: {outcome.why}")
        self.say()
        self.enqueue_and_wake()
        self.say("asks again", "(the machine is started again)")
        return "```text\n" + "\n".join(self.lines) + "\n```"

    def say(self, app: str = "", door: str = "", drainer: str = "") -> None:
        self.lines.append(f"{app:<22}│ {door:<32}│ {drainer}".rstrip())

    def enqueue_and_wake(self) -> None:
        self.ready += 1
        self.say("enqueue, commit")
        ring = self.door.ring()
        self.say("wake", f"ring: {ring} → 200, a receipt" if ring else "ring: closed → 503, no receipt")

    # the drain

    def backlog(self) -> Backlog:
        self.readings += 1
        reading = Backlog(self.ready)
        self.say("", "", f"backlog: {reading.ready} ready")
        if self.readings == 2:
            self.enqueue_and_wake()
        return reading

    def work(self, _stop: threading.Event) -> int:
        self.say("", "", f"work: {self.ready} job run")
        self.pulse.done += self.ready
        self.ready = 0
        return 0

    def release(self) -> None:
        raise AssertionError("nobody stops this story")

    # the line

    def look(self) -> object:
        token = self.door.look()
        self.say("", f"token: {token.rung} rung", "look")
        return token

    def leave(self, token: object) -> Left | Rung:
        left = self.door.leave(token)
        says = "closed" if left else f"{self.door.rung} rung since: stays open"
        self.say("", says, f"leave, with the token of {token.rung}")
        return Left() if left else Rung()

    def wait(self, _seconds: float) -> bool:
        return True

    def report(self) -> None:
        pass


def doors() -> str:
    """What each operation does to a door in each state, by doing it."""

    def after(state: str, do: Callable[[Door], object]) -> str:
        door = Door("boot", state)
        answer = do(door)
        said = "refused" if answer is None else "counted" if type(answer) is int else ANSWERS.get(answer, "a token")
        return f"{said}, and the door is {door.state}" if door.state != state else said

    operations = {
        "`ring`": Door.ring,
        "`look`": Door.look,
        "`leave`, nobody rang since": lambda door: door.leave(("boot", door.rung)),
        "`leave`, somebody did": lambda door: door.leave(("boot", 7)),
        "`shut`": lambda door: door.shut() or "",
    }
    states = ("open", "left", "shut")
    rows = [(name, *(after(state, do) for state in states)) for name, do in operations.items()]
    return table(("", *(f"door {state}" for state in states)), rows)


def settings() -> str:
    rows = [(code(s.name), code(s.flag), code(s.default), s.help) for s in SETTINGS]
    return table(("variable", "argument", "default", "meaning"), rows)


def waker_settings() -> str:
    return table(("variable", "default", "meaning"), [(code(n), code(d), m) for n, (d, m) in WAKER_SETTINGS.items()])


def words() -> str:
    """The headers of the wire, and who sends them."""
    meanings = {
        "VERSION": ("both", f"{protocol.WIRE_VERSION}; what the other side does not know is ignored"),
        "HOLD": ("waker", f"seconds it would like to be held; {protocol.MAX_HOLD_S:g} and `WORKER_HOLD_S` bound it"),
        "EXCEPT": ("waker", "the machine that must not answer: it is passing the baton"),
        "DEPTH": ("waker", f"how often the baton was passed; not more than {protocol.MAX_BATON_DEPTH}"),
        "AUTHORIZATION": ("waker", "`Bearer` and a wake token, where the worker wants one"),
        "MACHINE": ("worker", "its id; with boot and ring it makes a 200 a receipt"),
        "BOOT": ("worker", "this run of the listener"),
        "RING": ("worker", "which wake of this boot it was"),
        "STATE": ("worker", "what the drainer did; of a refusal, why"),
        "BUSY": ("worker", "`yes` if every slot is taken: it does not count towards the machines asked for"),
        "UP": ("worker", "seconds since the port was bound; a machine younger than the call was started by it"),
        "RETRY_AFTER": ("worker", "of a 503"),
    }  # fmt: skip
    return table(("header", "sent by", "meaning"), [(code(getattr(protocol, n)), *m) for n, m in meanings.items()])


def knobs() -> str:
    rows = [
        (code(k.name), code(shown(k.value)), ", ".join(code(c) for c in k.choices), f"{k.doc} ({k.source})")
        for k in Knobs()
    ]
    return table(("knob", "default", "choices", "what it stands for, and its source"), rows)


def unknown() -> str:
    rows = [(k.doc, k.source, code(k.name), code(shown(k.value))) for k in Knobs() if k.name in UNKNOWN_KNOBS]
    return table(("not settled", "because", "knob", "assumed"), rows)


def faults() -> str:
    return table(("fault", "when it strikes"), [(code(name), doc) for name, doc in FAULTS.items()])


def checks() -> str:
    order = sorted(rules.RULES, key=lambda rule: rule.severity)
    return table(("rule", "", "looks at"), [(code(r.name), r.severity, r.looks_at) for r in order])


def libraries() -> str:
    head = (
        "library",
        "in the image",
        "in the app",
        "what survives a kill",
        "what the watch sees",
        "`worker check` warns of",
    )
    return table(head, [tuple(row) for row in rows()])


def exit_codes() -> str:
    return table(("code", "meaning"), [("128+n" if number == 128 else str(number), CODES[number]) for number in CODES])


def events() -> str:
    return table(("event", "what happened"), [(code(name), text) for name, text in EVENTS.items()])


BLOCKS: dict[str, Callable[[], str]] = {
    "loop": lambda: Story().tell(),
    "door": doors,
    "worker-settings": settings,
    "waker-settings": waker_settings,
    "wire": words,
    "unknown": unknown,
    "knobs": knobs,
    "faults": faults,
    "rules": checks,
    "libraries": libraries,
    "exit-codes": exit_codes,
    "events": events,
}


# -- the README --------------------------------------------------------------------------------------------------------


def read() -> str:
    with open(README, encoding="utf-8") as file:
        return file.read()


def marks(name: str) -> tuple[str, str]:
    return f"<!-- made from the code: {name} -->\n", f"\n<!-- end: {name} -->"


def block(text: str, name: str) -> str:
    begin, end = marks(name)
    assert text.count(begin) == text.count(end) == 1, f"the README has no place for {name}"
    return text.partition(begin)[2].partition(end)[0]


def with_block(text: str, name: str, content: str) -> str:
    begin, end = marks(name)
    return text.replace(begin + block(text, name) + end, begin + content + end)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_readme_says_what_the_code_does(name: str) -> None:
    """`make readme` writes it anew."""
    assert block(read(), name) == BLOCKS[name]()


def test_no_block_of_the_readme_is_made_by_nobody() -> None:
    assert set(re.findall(r"<!-- made from the code: (.*) -->", read())) == {*BLOCKS, "demo"}


def test_the_demos_output_is_what_the_demo_prints() -> None:
    """Its numbers are of a real run. Put into the demo's own words again, they give the same text."""
    text = block(read(), "demo")
    lines = text.splitlines()
    assert lines[:2] == ["```console", "$ make demo"]
    assert lines[-1] == "```"
    seen = re.findall(r"^(\w{14}) +([\d.]+) s +(\d+) +(\d+) +([\d.]+) s +([\d.]+) s$", text, re.MULTILINE)
    rows = tuple(
        MachineRow(machine, "stopped", int(jobs), float(started), float(billed), float(useful), (int(exit_code),))
        for machine, started, jobs, exit_code, billed, useful in seen
    )
    assert len(rows) == 3
    assert sum(row.jobs for row in rows) == 60
    assert {row.exit_code for row in rows} == {0}
    wall_s = float(re.findall(r"for these ([\d.]+) s", text)[0])
    plan = Plan(jobs=60, machines=3, seed=0, keep=None)
    result = Result(plan, 60, 0, 0, None, 0.0, rows, wall_s, None, ())
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        Lines().end(result)
    # The sums of rounded numbers may differ from the rounded sums in the last digit.
    unrounded = re.compile(r"\d+\.\d\d|\d+ %")
    told = [unrounded.sub("N", line) for line in lines]
    for line in printed.getvalue().splitlines():
        assert unrounded.sub("N", line) in told


def test_every_variable_of_the_wakers_configuration_is_in_its_table() -> None:
    """WORKER_DRAINS and FLY_PRIVATE_IP are told by the worker and by the platform."""
    assert set(re.findall(r"\bWAKER_[A-Z_]+\b", SOURCES["waker.config"])) == set(WAKER_SETTINGS)


def test_every_exit_code_of_the_code_is_in_its_table() -> None:
    """Each constant EXIT_… of the worker, and what an error of ours ends a command with."""
    values = {}
    for module, source in SOURCES.items():
        for name in re.findall(r"^(EXIT_\w+) = ", source, re.MULTILINE) if module.startswith("worker.") else ():
            values[f"{module}.{name}"] = getattr(importlib.import_module(module), name)
    errors = importlib.import_module("waker.errors")
    values |= {name: getattr(errors, name).exit_code for name in errors.__all__}
    values["JobOverran"] = importlib.import_module("waker.sqlite_queue").JobOverran.exit_code
    assert {name: value for name, value in values.items() if value not in CODES} == {}


def test_every_event_of_the_code_is_in_its_table() -> None:
    """An event is what is given to log(), or to a logger: a word, a dot, and what happened."""
    logged = set()
    for module, source in SOURCES.items():
        if module.startswith(("waker.emulator", "waker.demo")):
            continue
        for node in ast.walk(ast.parse(source)):
            name = getattr(node, "func", None)
            name = getattr(name, "attr", getattr(name, "id", ""))
            if isinstance(node, ast.Call) and name in ("log", "_log", "info", "warning", "error"):
                texts = [each.value for arg in node.args for each in ast.walk(arg) if isinstance(each, ast.Constant)]
                logged |= {match[0] for text in texts if (match := re.match(r"[a-z]+\.[a-z_]+(?=[ :]|$)", str(text)))}
    assert logged == set(EVENTS)


def test_the_knobs_of_what_is_unknown_exist_and_no_undocumented_reading_is_missing() -> None:
    """Every choice between readings is said among what is not settled, unless it is a mere detail of the emulator."""
    names = {knob.name for knob in Knobs()}
    assert set(UNKNOWN_KNOBS) <= names
    details = {"balance", "replay_src_separator"}
    choices = {knob.name for knob in Knobs() if knob.choices or (knob.source == UNDOCUMENTED and knob.value is False)}
    assert choices - details - {"force_instance_wakes"} <= set(UNKNOWN_KNOBS)


def commands(text: str) -> list[list[str]]:
    """Every line of a shell block that begins with one of our commands, as words."""
    found = []
    for shell in re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL):
        for line in shell.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and "=" in words[0]:
                words = words[1:]
            if words and words[0] in ("worker", "waker"):
                found.append(words)
    return found


def test_every_command_of_the_readme_is_understood() -> None:
    """Its verb and its options, as `--help` lists them."""
    helps: dict[tuple[str, ...], str] = {}
    shown_commands = commands(read())
    verbs = {" ".join(words[:2]) for words in shown_commands}
    assert verbs >= {"worker up", "worker check", "waker wake", "waker watch", "waker jobs", "waker emulate"}
    for words in shown_commands:
        own = words[: words.index("--")] if "--" in words else words
        depth = 3 if own[:2] in (["waker", "jobs"], ["waker", "fleet"], ["waker", "schedule"]) else 2
        verb = tuple(own[:depth])
        if verb not in helps:
            done = subprocess.run(
                [f"{BIN}/{verb[0]}", *verb[1:], "--help"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, words
            helps[verb] = done.stdout
        for option in own[depth:]:
            if option.startswith("--"):
                assert option.partition("=")[0] in helps[verb], words


def test_every_python_block_of_the_readme_is_python() -> None:
    """And imports only public names."""
    public = set(importlib.import_module("waker").__all__)
    for text in re.findall(r"```python\n(.*?)```", read(), re.DOTALL):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "waker":
                assert {alias.name for alias in node.names} <= public


def test_the_machine_config_of_the_readme_says_what_fly_toml_says() -> None:
    """In the words of the Machines API."""
    (text,) = re.findall(r"```json\n(.*?)```", read(), re.DOTALL)
    config = json.loads(text)["config"]
    with open(f"{ROOT}/fly.toml", "rb") as file:
        fly = tomllib.load(file)
    (service,), ours = config["services"], fly["http_service"]
    assert service["internal_port"] == ours["internal_port"]
    assert (service["autostart"], service["autostop"]) == (ours["auto_start_machines"], ours["auto_stop_machines"])
    assert service["concurrency"] == ours["concurrency"]
    assert config["restart"] == {"policy": fly["restart"][0]["policy"], "max_retries": fly["restart"][0]["retries"]}
    assert config["stop_config"] == {"signal": fly["kill_signal"], "timeout": f"{fly['kill_timeout']}s"}
    assert config["env"]["WORKER_STOP_TIMEOUT_S"] == fly["env"]["WORKER_STOP_TIMEOUT_S"]


def test_every_link_inside_the_repository_leads_somewhere() -> None:
    """To a file that is there, or to a heading of the README."""
    text = read()
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif "://" not in link:
            assert os.path.exists(f"{ROOT}/{link}"), link


def demo() -> str:
    """Run it, and return what it printed."""
    done = subprocess.run([f"{BIN}/waker", "demo"], capture_output=True, text=True, check=True)
    return f"```console\n$ make demo\n{done.stdout.rstrip()}\n```"


def write(*, with_demo: bool) -> None:
    text = read()
    for name, make in BLOCKS.items():
        text = with_block(text, name, make())
    if with_demo:
        text = with_block(text, "demo", demo())
    with open(README, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    if "--write" not in sys.argv:
        sys.exit("say --write, and --demo to run the demo for its output")
    write(with_demo="--demo" in sys.argv)
