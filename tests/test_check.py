"""`worker check`: each rule with a file that makes it fire and one that leaves it silent; what cannot be checked."""

import json
import os
import subprocess

import pytest
from harness import BIN

from waker import rules
from worker.config import SETTINGS
from worker.manifest import ManifestError, read

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

FLY = """\
app = "my-worker"
kill_signal = "SIGTERM"
kill_timeout = 30

[env]
WORKER_STOP_TIMEOUT_S = "30"
JOBS_FILE = "/data/jobs.db"

[mounts]
source = "jobs"
destination = "/data"

[http_service]
internal_port = 8080
force_https = false
auto_start_machines = true
auto_stop_machines = "off"
min_machines_running = 0

[http_service.concurrency]
type = "requests"
soft_limit = 1
hard_limit = 100

[[restart]]
policy = "on-failure"
"""
DOCKER = """\
FROM python:3.11-slim
RUN python -m compileall -q /usr/local/lib/python3.11
WORKDIR /app
COPY . .
ENTRYPOINT ["worker"]
CMD ["up", "tasks:queue"]
"""
SERVICES = """\
app = "my-worker"
kill_signal = "SIGTERM"
kill_timeout = 5

[[services]]
internal_port = 8080
auto_start_machines = true
auto_stop_machines = false
concurrency = { type = "requests", soft_limit = 1 }

[[services.ports]]
port = 80
handlers = ["http"]

[[restart]]
policy = "on-failure"
"""


def fly(old, new="", text=FLY):
    """A fly.toml with one thing changed."""
    assert old in text
    return {"fly.toml": text.replace(old, new)}


def docker(old, new=""):
    """A Dockerfile with one thing changed."""
    assert old in DOCKER
    return {"Dockerfile": DOCKER.replace(old, new)}


# rule → the files that make it fire, each with text of the line that it must name.
FIRES = {
    "unreadable": [
        (fly("internal_port = 8080", 'internal_port = "8080"'), 'internal_port = "8080"'),
        (fly("internal_port = 8080", "internal_port = true"), "internal_port = true"),
        (fly("kill_timeout = 30", 'kill_timeout = "soon"'), 'kill_timeout = "soon"'),
        (fly('WORKER_STOP_TIMEOUT_S = "30"', 'WORKER_STOP_TIMEOUT_S = "30"\nWORKER_LINGER_S = "soon"'), "LINGER"),
        (docker("WORKDIR", "ENV WORKER_LINGER_S=soon\nWORKDIR"), "ENV WORKER_LINGER_S"),
        (docker('"tasks:queue"', '"tasks:queue", "--linger-s", "soon"'), "CMD"),
        (fly("app =", "mounts = 3\napp =", SERVICES), "mounts = 3"),
    ],
    "no-service": [(fly("[http_service", "[elsewhere"), 'app = "my-worker"')],
    "service-without-ports": [
        (fly('[[services.ports]]\nport = 80\nhandlers = ["http"]\n', "", SERVICES), "[[services]]")
    ],
    "autostart-off": [(fly("auto_start_machines = true", "auto_start_machines = false"), "auto_start_machines")],
    "autostart-unset": [(fly("auto_start_machines = true\n"), "[http_service]")],
    "misnamed": [(fly('auto_stop_machines = "off"', 'autostop = "off"'), "autostop")],
    "port-mismatch": [
        (fly("internal_port = 8080", "internal_port = 3000"), "internal_port"),
        (fly("[env]", '[env]\nWORKER_PORT = "9000"'), "internal_port"),
        (docker("WORKDIR", "ENV A=1 \\\n    WORKER_PORT=9000\nWORKDIR"), "internal_port"),
        (docker('"tasks:queue"', '"--port=9000", "tasks:queue"'), "internal_port"),
    ],
    "force-https": [
        (fly("force_https = false", "force_https = true"), "force_https"),
        (fly("port = 80\n", "port = 80\nforce_https = true\n", SERVICES), "force_https"),
    ],
    "no-plain-http": [(fly('["http"]', '["tls", "http"]', SERVICES), "[[services.ports]]")],
    "h2-backend": [(fly("[[restart]]", "[http_service.http_options]\nh2_backend = true\n[[restart]]"), "h2_backend")],
    "limit-type": [
        (fly('type = "requests"', 'type = "connections"'), "type"),
        (fly('type = "requests"\n'), "[http_service.concurrency]"),
    ],
    "soft-limit": [
        (fly("soft_limit = 1", "soft_limit = 20"), "soft_limit"),
        (fly("soft_limit = 1\n"), "[http_service.concurrency]"),
    ],
    "hard-limit": [(fly("hard_limit = 100", "hard_limit = 1"), "hard_limit")],
    "hard-limit-close": [(fly("hard_limit = 100", "hard_limit = 3"), "hard_limit")],
    "split-in-groups": [
        (fly("[env]", '[processes]\nears = "listen"\nhands = "drain tasks:queue"\n[env]'), "ears"),
    ],
    "half-a-worker": [(fly("[env]", '[processes]\nhands = "drain tasks:queue"\n[env]'), "hands")],
    "autostop": [
        (fly('auto_stop_machines = "off"', 'auto_stop_machines = "stop"'), "auto_stop_machines"),
        (fly('auto_stop_machines = "off"', 'auto_stop_machines = "suspend"'), "auto_stop_machines"),
        (fly('auto_stop_machines = "off"', "auto_stop_machines = true"), "auto_stop_machines"),
    ],
    "autostop-unset": [(fly('auto_stop_machines = "off"\n'), "[http_service]")],
    "min-machines": [(fly("min_machines_running = 0", "min_machines_running = 1"), "min_machines_running")],
    "restart-always": [(fly('"on-failure"', '"always"'), "policy")],
    "restart-no": [(fly('"on-failure"', '"never"'), "policy"), (fly('"on-failure"', '"no"'), "policy")],
    "restart-unset": [(fly('[[restart]]\npolicy = "on-failure"\n'), 'app = "my-worker"')],
    "kill-signal": [(fly('"SIGTERM"', '"SIGKILL"'), "kill_signal")],
    "kill-signal-unset": [(fly('kill_signal = "SIGTERM"\n'), 'app = "my-worker"')],
    "kill-timeout-unset": [(fly("kill_timeout = 5\n", "", SERVICES), 'app = "my-worker"')],
    "kill-timeout-long": [(fly("kill_timeout = 30", 'kill_timeout = "10m"'), "kill_timeout")],
    "stop-timeout-long": [(fly("kill_timeout = 30", 'kill_timeout = "10s"'), "WORKER_STOP_TIMEOUT_S")],
    "stop-timeout-short": [(fly('WORKER_STOP_TIMEOUT_S = "30"\n'), "kill_timeout")],
    "checks": [
        (fly("[[restart]]", '[[http_service.checks]]\npath = "/"\n[[restart]]'), "[[http_service.checks]]"),
        (fly("[[restart]]", '[[services.tcp_checks]]\ninterval = "10s"\n[[restart]]', SERVICES), "tcp_checks"),
        (fly("[[restart]]", '[checks.alive]\ntype = "tcp"\n[[restart]]'), "[checks.alive]"),
    ],
    "strategy": [(fly("[env]", '[deploy]\nstrategy = "bluegreen"\n[env]'), "strategy")],
    "metrics-ring": [(fly("[env]", '[metrics]\nport = 8080\npath = "/metrics"\n[env]'), 'path = "/metrics"')],
    "shell-form": [
        (docker('["up", "tasks:queue"]', "up tasks:queue"), "CMD"),
        (docker('ENTRYPOINT ["worker"]', "ENTRYPOINT worker up tasks:queue"), "ENTRYPOINT"),
        (docker('["up", "tasks:queue"]', "['up', 'tasks:queue']"), "CMD"),  # quotes that are not JSON's
        (docker('["worker"]\nCMD ["up", "tasks:queue"]', '["sh", "-c", "worker up tasks:queue"]'), "ENTRYPOINT"),
    ],
    "no-worker": [
        (docker('["worker"]\nCMD ["up", "tasks:queue"]', '["gunicorn", "app"]'), "ENTRYPOINT"),
        (docker('["worker"]\nCMD ["up", "tasks:queue"]', '["worker", "help"]'), "ENTRYPOINT"),
    ],
    "nothing-to-drain": [(docker('["up", "tasks:queue"]', '["up"]'), "CMD")],
    "not-compiled": [(docker("RUN python -m compileall", "RUN echo"), "FROM")],
    "unknown-setting": [(fly("[env]", '[env]\nWORKER_LINGERS = "1"'), "WORKER_LINGERS")],
    "token-in-file": [
        (fly("[env]", '[env]\nWORKER_TOKENS = "abc"'), "WORKER_TOKENS"),
        (docker("WORKDIR", "ENV WAKER_TOKEN abc\nWORKDIR"), "ENV WAKER_TOKEN"),
    ],
    "waker-target": [(fly("[env]", '[env]\nWAKER_TARGET = "http://my-worker.internal"'), "WAKER_TARGET")],
    "worker-baton": [(fly("[env]", '[env]\nWORKER_BATON = "http://my-worker.internal"'), "WORKER_BATON")],
    "baton-off": [(fly("[env]", '[env]\nWORKER_BATON = "off"'), "WORKER_BATON")],
    "hold-zero": [(fly("[env]", '[env]\nWORKER_HOLD_S = "0"'), "WORKER_HOLD_S")],
    "greet-zero": [(fly("[env]", '[env]\nWORKER_GREET_S = "0.0"'), "WORKER_GREET_S")],
    "queue-off-mount": [(fly('"/data/jobs.db"', '"/srv/jobs.db"'), None), (fly('"/data/jobs.db"', '"jobs.db"'), None)],
    "queue-one-machine": [({}, None)],
    "queue-setting": [({"tasks.py": 'durability="process"'}, None)],
}
CASES = [
    pytest.param(name, *case, id=f"{name}-{number}")
    for name, cases in FIRES.items()
    for number, case in enumerate(cases, 1)
]
TASKS = """\
import os
from waker import SqliteQueue
queue = SqliteQueue(os.environ.get("JOBS_FILE", "jobs.db"), {})
"""


def write(folder, files=None):
    """A project: the good files, with some replaced."""
    content = {"fly.toml": FLY, "Dockerfile": DOCKER, **(files or {})}
    content["tasks.py"] = TASKS.format(content.get("tasks.py", ""))
    for name, text in content.items():
        (folder / name).write_text(text)


def found_in(folder, environ=None):
    """Everything that the rules find in the files of *folder*."""
    manifest = read(str(folder / "fly.toml"), environ or {})
    return [finding for deployment in manifest.deployments for finding in rules.findings(deployment)]


def check(folder, *arguments, environ=None):
    """`worker check` as a person calls it."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WORKER_", "WAKER_", "FLY_", "JOBS_"))}
    env = {**inherited, **(environ or {})}
    command = [f"{BIN}/worker", "check", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_every_rule_has_a_file_that_makes_it_fire():
    in_files = [rule.name for rule in rules.RULES if rule.looks_at != rules.ADDRESSES]  # those are of deployed apps
    assert set(FIRES) == set(in_files)
    assert len(FIRES) == len(in_files)


@pytest.mark.parametrize(("name", "files", "line"), CASES)
def test_a_rule_fires_on_its_file_and_names_the_line(tmp_path, name, files, line):
    """The same project without the change leaves the rule silent: the next tests."""
    write(tmp_path, files)
    if line is None:
        findings = json.loads(check(tmp_path, "tasks:queue", "--json").stdout)["findings"]
        assert [finding["at"] for finding in findings if finding["rule"] == name] == ["tasks:queue"]
        return
    findings = [finding for finding in found_in(tmp_path) if finding.rule == name]
    assert findings, f"{name} did not fire"
    file, number = findings[0].at.rsplit(":", 1)
    with open(file, encoding="utf-8") as opened:
        assert line in opened.read().splitlines()[int(number) - 1]
    assert findings[0].severity == next(rule.severity for rule in rules.RULES if rule.name == name)


def test_the_good_files_leave_every_rule_silent(tmp_path):
    """One with an http_service, one with services."""
    write(tmp_path)
    assert found_in(tmp_path) == []
    write(tmp_path, {"fly.toml": SERVICES})
    assert found_in(tmp_path) == []


def test_a_queue_that_no_rule_is_about_leaves_the_queues_rules_silent(tmp_path):
    """They are about the embedded queue: a command has none."""
    write(tmp_path, docker('"tasks:queue"', '"--", "php", "artisan", "queue:work", "--stop-when-empty"'))
    done = check(tmp_path)
    assert (done.returncode, done.stdout) == (0, "fly.toml and Dockerfile: nothing is wrong\n")


def test_our_own_files_are_clean():
    """They are the reference; what remains to be said is that a volume belongs to one Machine."""
    assert check(ROOT).stdout == "fly.toml and Dockerfile: nothing is wrong\n"
    done = check(f"{ROOT}/examples/plain", "tasks:queue", "--file", "../../fly.toml", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["errors"]) == (0, 0)
    assert [finding["rule"] for finding in report["findings"]] == ["queue-one-machine"]


def test_our_image_is_not_run_by_root_and_holds_no_tools():
    """The exec form and the compiled library are rules; these two are not."""
    with open(f"{ROOT}/Dockerfile", encoding="utf-8") as file:
        last_stage = file.read().rpartition("\nFROM ")[2]
    assert "\nUSER worker\n" in last_stage
    assert "pip" not in last_stage.split()
    assert "apt-get" not in last_stage


def test_every_line_of_our_fly_toml_says_why():
    """A setting has a comment above it, or stands under another one that shares the comment."""
    with open(f"{ROOT}/fly.toml", encoding="utf-8") as file:
        blocks = file.read().split("\n\n")
    for block in blocks:
        assert block.lstrip().startswith(("#", "[")), block
        assert "#" in block, block


def test_the_workers_defaults_are_those_of_its_configuration():
    """The rules compare them with the platform's and may not import the worker."""
    defaults = {setting.name: setting.default for setting in SETTINGS}
    assert {name: float(defaults[name]) for name in rules.WORKER_DEFAULTS} == dict(rules.WORKER_DEFAULTS)


def test_the_exit_code_is_1_for_an_error_and_0_for_warnings(tmp_path):
    """`worker check && fly deploy` goes on after a warning."""
    write(tmp_path, fly("hard_limit = 100", "hard_limit = 3"))
    done = check(tmp_path)
    assert done.returncode == 0
    assert done.stdout.endswith("fly.toml and Dockerfile: 0 errors, 1 warning\n")
    write(tmp_path, fly('"on-failure"', '"always"'))
    done = check(tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith('fly.toml:26: error: restart policy "always": ')


@pytest.mark.parametrize(
    ("text", "says"), [(None, "cannot read fly.toml: No such file"), ("app = ", "fly.toml is not TOML: ")]
)
def test_what_cannot_be_checked_is_a_sentence_and_2(tmp_path, text, says):
    if text is not None:
        (tmp_path / "fly.toml").write_text(text)
    done = check(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"worker check: {says}")
    assert "Traceback" not in done.stderr


def test_a_dockerfile_that_is_named_and_not_there_is_said(tmp_path):
    """One that is not named may be missing: the image may come from elsewhere."""
    write(tmp_path, {"fly.toml": '[build]\ndockerfile = "worker.Dockerfile"\n' + FLY.replace("app =", "#")})
    with pytest.raises(ManifestError, match=r"fly.toml:2: there is no .*worker.Dockerfile"):
        read(str(tmp_path / "fly.toml"), {})
    write(tmp_path)
    (tmp_path / "Dockerfile").unlink()
    assert found_in(tmp_path) == []


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nothing:queue", "there is no module 'nothing'"),
        ("tasks:nothing", "tasks has no 'nothing'"),
        ("broken:queue", "the module raised while it was imported"),
        ("os:path", "which is not known"),
        ("tasks", "expected module:name"),
    ],
)
def test_a_target_that_cannot_be_drained_is_an_error(tmp_path, target, says):
    write(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    done = check(tmp_path, target)
    assert done.returncode == 1
    assert f"{target}: error: " in done.stdout
    assert says in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_the_users_own_worker_module_is_the_one_that_is_imported(tmp_path):
    """`worker check` steps aside as the drainer does."""
    write(tmp_path)
    (tmp_path / "worker.py").write_text("HERE = True\n")
    with open(tmp_path / "tasks.py", "a", encoding="utf-8") as file:
        file.write("import worker\nassert worker.HERE\n")
    assert check(tmp_path, "tasks:queue").returncode == 0


def test_the_environment_counts_on_a_machine_alone(tmp_path):
    """A developer's shell is not what will be deployed; a secret on a Machine is no secret in a file."""
    write(tmp_path)
    environ = {"WORKER_PORT": "9000", "WORKER_TOKENS": "abc"}
    assert found_in(tmp_path, environ) == []
    found = found_in(tmp_path, {**environ, "FLY_MACHINE_ID": "1485"})
    assert [finding.rule for finding in found] == ["port-mismatch"]
    assert "environment:WORKER_PORT" in found[0].says


def test_a_wrong_token_is_not_shown(tmp_path):
    write(tmp_path, fly("[env]", '[env]\nWORKER_TOKENS = "xyzzy\\u00e9"'))
    done = check(tmp_path)
    assert done.returncode == 1
    assert "xyzzy" not in done.stdout


def test_only_the_group_that_runs_the_worker_is_looked_at(tmp_path):
    """An app and its worker may share one fly.toml, each group with a service of its own."""
    groups = '[processes]\nweb = "gunicorn app"\nqueue = "worker up tasks:queue"\n\n[env]'
    shared = FLY.replace("[env]", groups).replace("[http_service]", '[http_service]\nprocesses = ["queue"]')
    shared += 'processes = ["queue"]\n\n[[restart]]\npolicy = "always"\nprocesses = ["web"]\n'
    shared += '\n[[services]]\nprocesses = ["web"]\ninternal_port = 3000\nauto_stop_machines = "stop"\n'
    write(tmp_path, {"fly.toml": shared, "Dockerfile": DOCKER.replace('ENTRYPOINT ["worker"]\n', "")})
    assert found_in(tmp_path) == []
    (tmp_path / "fly.toml").write_text(shared.replace('processes = ["queue"]', 'processes = ["web"]'))
    assert {finding.rule for finding in found_in(tmp_path)} == {"no-service", "restart-unset"}


def test_the_stage_that_is_deployed_is_the_one_that_is_read(tmp_path):
    """Stages inherit from each other; [build] may name one that is not the last."""
    stages = DOCKER.replace("FROM python:3.11-slim", "ARG V=3.11\nFROM python:${V}-slim AS base")
    stages += "FROM base AS tests\nCMD pytest\n"
    write(tmp_path, {"Dockerfile": stages})
    assert {finding.rule for finding in found_in(tmp_path)} == {"shell-form", "no-worker"}
    write(tmp_path, {"Dockerfile": stages, "fly.toml": FLY + '[build]\nbuild-target = "base"\n'})
    assert found_in(tmp_path) == []


def test_an_exec_behind_a_shell_is_no_shell(tmp_path):
    """`exec` puts the worker in the shell's place."""
    write(
        tmp_path, docker('["worker"]\nCMD ["up", "tasks:queue"]', '["sh", "-c", "cd /x && exec worker up tasks:queue"]')
    )
    assert found_in(tmp_path) == []


def test_keys_in_a_text_of_several_lines_are_no_keys(tmp_path):
    """The line of a value is found by reading the file once more; a text may hold anything."""
    text = 'note = """\n[http_service]\nforce_https = true\n"""\n'
    write(tmp_path, {"fly.toml": text + FLY.replace("force_https = false", "force_https = true")})
    (finding,) = found_in(tmp_path)
    assert finding.at.endswith(f":{4 + FLY.splitlines().index('force_https = false') + 1}")


def test_a_reader_that_leaves_is_no_traceback(tmp_path):
    """`worker check --json | head -c 1`."""
    (tmp_path / "fly.toml").write_text('app = "x"\n')
    done = subprocess.run(
        ["bash", "-c", f"{BIN}/worker check --json | true; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
