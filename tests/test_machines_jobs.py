"""One-off jobs against the emulated platform: each runs once, does not run, or is unknown; none is left behind."""

import asyncio
import base64
import json
import logging
import os
import signal
from collections import Counter

import httpx
import pytest
from harness import BIN, until
from virtual_api import on_platform

from waker import UsageError
from waker.emulator import Faults, Knobs, LocalPlatform
from waker.machines import (
    JobNotRun,
    JobResult,
    JobUnknown,
    Machine,
    Machines,
    MachinesError,
    NoCapacity,
    RequestError,
    TokenRefused,
    run,
    run_async,
    shapes,
    submit,
    submit_async,
)
from waker.machines.client import Pacer
from waker.machines.jobs import JOB, UNTIL
from waker.machines.reap import GRACE_S, KEEP_FAILED_S, judge, reap

IMAGE = "job:1"


class Program:
    """What job machines run: counts how often each ran, takes LIVES seconds, ends with CODE."""

    def __init__(self):
        self.ran = Counter()

    async def __call__(self, machine):
        self.ran[machine.env.get("JOB", "")] += 1
        told = asyncio.Event()
        machine.on_signal(lambda number: told.set())
        try:
            async with asyncio.timeout(float(machine.env.get("LIVES", "1"))):
                await told.wait()
        except TimeoutError:
            return int(machine.env.get("CODE", "0"))
        return 0


def virtually(story, *, program=None, faults=None, knobs=None, seed=0):
    """Run *story(machines, platform, wire)* against a platform whose image `job:1` is *program*."""
    return on_platform(
        story, images={IMAGE: program or Program()}, machines=0, faults=faults or Faults(), knobs=knobs, seed=seed
    )


async def left(machines):
    """The machines that are still there."""
    return [each for each in await machines.list() if each.state not in ("destroyed", "destroying")]


# -- each job runs once, does not run, or is unknown -------------------------------------------------------------------


async def many(machines, platform, program, count):
    """Run *count* jobs at once, every fifth fails; hold each to what its result says, and look at what is left."""
    tally = Counter()
    jobs = [
        await submit_async(["x"], machines=machines, image=IMAGE, timeout_s=600,
                           env={"JOB": str(i), "LIVES": str(1 + i % 7), "CODE": str(int(i % 5 == 0))})
        for i in range(count)
    ]  # fmt: skip
    results = await asyncio.gather(*jobs, return_exceptions=True)
    may_stay = {job.name for job, result in zip(jobs, results, strict=True) if isinstance(result, JobUnknown)}
    for i, result in enumerate(results):
        times = program.ran[str(i)]
        if isinstance(result, JobResult):
            assert times == 1, result
            assert result.exit_code == (137 if result.oom_killed else int(i % 5 == 0))
            assert result.kept or result.ok  # one that succeeded stays only where it could not be deleted
            may_stay |= {result.name} if result.kept else set()
            tally["ran"] += 1
        elif isinstance(result, JobUnknown):
            assert times <= 1, result
            tally["unknown"] += 1
        else:
            assert isinstance(result, MachinesError), result
            assert times == 0, result
            tally["not run"] += 1
    platform.set_faults(Faults())
    assert {each.name for each in await left(machines)} <= may_stay
    return tally


ALL = {
    "api_rate_limited": 0.1,
    "api_error": 0.05,
    "api_error_after": 0.05,
    "api_bad_gateway": 0.03,
    "api_drop": 0.03,
    "api_reset_before_answer": 0.05,
    "api_reset_mid_answer": 0.05,
    "api_slow_answer": 0.05,
    "api_create_late": 0.1,
    "no_capacity": 0.02,
    "lease_held": 0.05,
}


def test_two_hundred_jobs_at_once_at_the_allowed_pace():
    """Three creates at once and then one a second: the last begins 197 s after the first, and no 429 is earned."""
    program = Program()

    async def story(machines, platform, wire):
        assert (await many(machines, platform, program, 200)) == {"ran": 200}
        creates = [at for at, method, path in wire.sent if method == "POST" and path.endswith("/machines")]
        assert creates == [0, 0, *range(198)]
        assert 429 not in [event.fields.get("status") for event in platform.events]

    virtually(story, program=program)


def test_two_hundred_jobs_at_once_with_every_fault():
    program = Program()

    async def story(machines, platform, wire):
        tally = await many(machines, platform, program, 200)
        assert tally.total() == 200
        assert tally["ran"] > 150

    virtually(story, program=program, faults=Faults(**ALL), seed=2)


@pytest.mark.parametrize("fault", [*ALL, "out_of_memory", "start_fails", "kill_machine", "slow_start"])
def test_jobs_with_one_fault_that_strikes_often(fault):
    program = Program()

    async def story(machines, platform, wire):
        assert (await many(machines, platform, program, 12)).total() == 12

    # A lease that somebody takes again and again, faster than it ends, leaves no gap for a deletion.
    faults = Faults(**{fault: 0.1 if fault == "lease_held" else 0.3})
    virtually(story, program=program, faults=faults, seed=5)


# -- one job -----------------------------------------------------------------------------------------------------------


def test_a_job_is_made_run_read_and_deleted():
    states = []

    async def story(machines, platform, wire):
        result = await run_async(
            ["report", "daily"], machines=machines, image=IMAGE, region="ams", guest="shared-cpu-2x",
            env={"LIVES": "30"}, files={"/etc/job.json": "{}"}, on_progress=lambda seen: states.append(seen.state),
        )  # fmt: skip
        assert (result.ok, result.exit_code, result.kept, result.region) == (True, 0, False, "ams")
        assert result.ended_at - result.started_at == pytest.approx(30, abs=1)
        assert result.output == f"fly logs --app my-worker --machine {result.machine}"
        assert [event.type for event in result.events][:1] == ["exit"]
        assert json.dumps(result.as_dict())
        assert await left(machines) == []
        made = await machines.get(result.machine)
        assert made.config["init"] == {"exec": ["report", "daily"]}
        assert made.config["restart"]["policy"] == "no"
        assert made.config["guest"] == {"cpu_kind": "shared", "cpus": 2, "memory_mb": 512}
        assert base64.b64decode(made.config["files"][0]["raw_value"]) == b"{}"
        assert made.metadata[JOB] == result.name == made.name

    virtually(story)
    assert states == ["creating", "created", "started", "stopped", "deleted"]


def test_a_job_that_fails_is_kept_and_its_message_says_how_to_look_and_how_to_delete():
    async def story(machines, platform, wire):
        result = await run_async(["x"], machines=machines, image=IMAGE, env={"CODE": "3"})
        assert (result.ok, result.exit_code, result.kept) == (False, 3, True)
        assert [step.split()[:3] for step in result.next_steps] == [
            ["fly", "logs", "--app"], ["fly", "machine", "status"], ["fly", "machine", "destroy"],
        ]  # fmt: skip
        assert [each.id for each in await left(machines)] == [result.machine]

    virtually(story)


def test_a_job_that_takes_too_long_is_stopped_and_kept():
    async def story(machines, platform, wire):
        result = await run_async(["x"], machines=machines, image=IMAGE, env={"LIVES": "1e6"}, timeout_s=90)
        assert (result.timed_out, result.ok, result.kept) == (True, False, True)
        assert result.ended_at - result.started_at == pytest.approx(90, abs=3)
        assert "stopped after its time" in str(result)

    virtually(story)


def test_the_image_defaults_to_the_one_that_the_app_runs(monkeypatch):
    """That of its youngest machine which is no job's; in a machine of the app it is its own."""

    async def story(machines, platform, wire):
        with pytest.raises(UsageError, match="no image: app my-worker has no machine"):
            await run_async(["x"], machines=machines)
        await machines.create({"image": "old:1"}, skip_launch=True)
        await asyncio.sleep(10)
        await machines.create({"image": IMAGE}, skip_launch=True)
        await asyncio.sleep(10)
        await machines.create({"image": "old:1", "metadata": {JOB: "another"}}, skip_launch=True)
        result = await run_async(["x"], machines=machines, keep=True)
        assert (await machines.get(result.machine)).image == IMAGE
        monkeypatch.setenv("FLY_APP_NAME", "my-worker")
        monkeypatch.setenv("FLY_IMAGE_REF", "old:1")
        result = await run_async(["x"], machines=machines, keep=True)
        assert (await machines.get(result.machine)).image == "old:1"

    on_platform(story, images={IMAGE: Program(), "old:1": Program()}, machines=0)


@pytest.mark.parametrize("after_s", [0.5, 5, 60])
def test_a_caller_that_is_cancelled_takes_the_machine_with_it(after_s):
    """While it is being made, while it starts, and while it runs."""

    async def story(machines, platform, wire):
        job = await submit_async(["x"], machines=machines, image=IMAGE, env={"LIVES": "1e6"})
        await asyncio.sleep(after_s)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        await asyncio.sleep(5)
        assert await left(machines) == []

    virtually(story, faults=Faults(api_slow_answer=1.0))


def test_a_machine_that_somebody_else_deletes_is_told_as_far_as_it_is_known():
    """Its exit is read while the platform still shows it; once it is gone, so is the exit code: unknown."""

    async def story(machines, platform, wire):
        for gone in (False, True):
            job = await submit_async(["x"], machines=machines, image=IMAGE, env={"LIVES": "1e6"})
            while job.state != "started":
                await asyncio.sleep(1)
            if gone:
                wire.instead = lambda request: httpx.Response(404, json={"error": "machine not found"})
                with pytest.raises(JobUnknown, match=rf"{job.name} on machine {job.machine} is unknown: it is gone"):
                    await job
            else:
                await machines.delete(job.machine, force=True)
                result = await job
                assert (result.ok, result.kept) == (False, False)

    virtually(story)


def test_a_platform_that_falls_silent_makes_the_job_unknown():
    """It is not waited for for ever, and the machine is named."""

    async def story(machines, platform, wire):
        job = await submit_async(["x"], machines=machines, image=IMAGE, env={"LIVES": "1e6"})
        while job.state != "started":
            await asyncio.sleep(1)
        platform.set_faults(Faults(api_drop=1.0))
        with pytest.raises(JobUnknown, match=f"{job.machine} is unknown: the platform tells nothing any more"):
            await job

    virtually(story)


REFUSED = {
    "an image that is not there": ({"image": "nowhere:1"}, Knobs(), RequestError, "nowhere:1: not found"),
    "a region without room": ({"region": "ams"}, Knobs(full_regions="ams"), NoCapacity, "take another region"),
    "a region that is not there": ({"region": "xyz"}, Knobs(), RequestError, "xyz"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_platform_refuses_is_a_sentence_and_leaves_nothing(case):
    options, knobs, kind, says = REFUSED[case]

    async def story(machines, platform, wire):
        with pytest.raises(kind, match=says) as failure:
            await run_async(["x"], **{"machines": machines, "image": IMAGE, **options})
        assert not isinstance(failure.value, JobUnknown | JobNotRun)
        assert await machines.list() == []

    virtually(story, knobs=knobs)


WRONG = [
    ({"timeout_s": 0}, "timeout_s=0: expected seconds above 0"),
    ({"guest": "huge"}, "guest 'huge': expected a name like shared-cpu-1x"),
    ({"guest": {"memory_mb": 300}}, "300 MB with 1 shared CPU: expected a multiple of 256 up to 2048"),
    ({"env": {"FLY_X": "1"}}, "env 'FLY_X'"),
    ({"env": {"A": 1}}, "env A: expected text"),
    ({"files": {"etc/x": ""}}, "file 'etc/x': expected an absolute path"),
    ({"mounts": {"/": "vol"}}, "mount '/'"),
    ({"mounts": {"/a": "v1", "/b": "v2"}}, "2 volumes; the platform gives a machine one"),
]


@pytest.mark.parametrize(("options", "says"), WRONG)
def test_wrong_options_are_refused_before_anything_is_sent(options, says):
    with pytest.raises(UsageError, match=says.replace("(", r"\(")):
        submit(["x"], machines=Machines("a", token="t"), **options)


def test_a_command_is_words():
    for wrong in ("curl x", [], [""], ["a\0"]):
        with pytest.raises(UsageError, match="command"):
            run(wrong, local=True)


def test_durations_and_sizes():
    assert [shapes.seconds(text) for text in ("90", "2.5s", "15m", "1h30m", "1d", "250ms")] == [
        90, 2.5, 900, 5400, 86400, 0.25,
    ]  # fmt: skip
    assert [shapes.size_mb(text) for text in ("512", "512mb", "2gb", "1 GiB")] == [512, 512, 2048, 1024]
    for wrong in ("", "soon", "1h30", "-5", "5 m", "1x"):
        with pytest.raises(UsageError, match="expected"):
            shapes.seconds(wrong)
    for wrong in ("", "big", "0", "1.5gb", "-1"):
        with pytest.raises(UsageError, match="expected"):
            shapes.size_mb(wrong)


# -- here --------------------------------------------------------------------------------------------------------------


def test_a_local_job_needs_no_account(capfd, monkeypatch):
    monkeypatch.setenv("WAKER_LOCAL", "1")
    result = run(["sh", "-c", "echo $GREETING; exit 3"], env={"GREETING": "hello"})
    assert (result.exit_code, result.machine, result.kept, result.local) == (3, "local", False, True)
    assert capfd.readouterr().out == "hello\n"
    assert run(["sh", "-c", "kill -9 $$"], local=True).signal == 9
    slow = run(["sleep", "60"], local=True, timeout_s=0.2)
    assert (slow.timed_out, slow.exit_code) == (True, 143)
    with pytest.raises(JobNotRun, match="cannot run 'no-such-program' here: No such file"):
        run(["no-such-program"], local=True)
    with pytest.raises(UsageError, match="files"):
        run(["true"], local=True, files={"/x": ""})


def test_a_missing_token_is_never_a_local_run(monkeypatch):
    with pytest.raises(UsageError, match="no token"):
        run(["touch", "here"], app="a")
    monkeypatch.setenv("WAKER_LOCAL", "perhaps")
    with pytest.raises(UsageError, match="WAKER_LOCAL='perhaps'"):
        run(["true"])


# -- real processes, and the command -----------------------------------------------------------------------------------

SCALE = 0.05


@pytest.fixture
def platform():
    """A platform whose clock, and rate limit, are twenty times as fast; `alpine:3` is there."""
    knobs = Knobs(time_scale=SCALE)
    with LocalPlatform(api=True, machines=0, images={"alpine:3": ["true"]}, knobs=knobs, log=lambda *_: None,
                       env={"PATH": os.environ["PATH"]}) as world:  # fmt: skip
        yield world


@pytest.fixture
def machines(platform):
    return Machines("my-worker", token=platform.api_token, base_url=platform.api_url, pacer=Pacer(1 / SCALE))


def test_twelve_jobs_at_once_on_real_processes(platform, machines, tmp_path):
    """With resets and 500s: each ran once or is told; what is left has a reason."""
    platform.set_faults(Faults(api_reset_before_answer=0.1, api_error_after=0.1, api_rate_limited=0.1))
    jobs = [
        submit(["sh", "-c", f"echo ran >> {tmp_path}/{i}; exit {i % 3}"], machines=machines, image="alpine:3")
        for i in range(12)
    ]
    kept = set()
    for i, job in enumerate(jobs):
        ran = tmp_path / str(i)
        try:
            result = job.wait(60)
        except JobUnknown:
            kept.add(job.name)
        except MachinesError:
            assert not ran.exists()
            continue
        else:
            assert result.exit_code == i % 3
            kept |= {job.name} if result.kept else set()
        assert ran.read_text() == "ran\n"
    platform.set_faults(Faults())
    assert {m.name for m in machines.list() if m.state not in ("destroyed", "destroying")} <= kept


def test_the_sync_run_works_inside_a_running_loop_too(machines):
    async def main():
        return run(["true"], machines=machines, image="alpine:3")

    assert asyncio.run(main()).ok


def test_a_job_is_at_once_a_handle(machines, caplog):
    caplog.set_level(logging.INFO, "waker.jobs")
    job = submit(["sleep", "60"], machines=machines, image="alpine:3", timeout_s=0.5)
    assert job.name.startswith("job-")
    assert not job.done
    with pytest.raises(TimeoutError):
        job.wait(0.001)
    assert job.wait(30).timed_out
    assert f"run.timed_out name={job.name} machine={job.machine}" in caplog.text


def command(processes, platform, *arguments, **env):
    return processes([f"{BIN}/waker", *arguments], env={**platform.environment, **env})


def test_waker_run_shows_progress_and_ends_with_the_jobs_code(processes, platform, tmp_path):
    gate = tmp_path / "gate"
    script = f"while [ ! -e {gate} ]; do sleep 0.02; done; exit 7"
    process = command(processes, platform, "run", "--image", "alpine:3", "--memory", "512mb", "--", "sh", "-c", script)
    process.saw(" started")  # a shorter job may have ended before anybody looked
    gate.touch()
    assert process.wait() == 7, process.text()
    states = [line.split()[2] for line in process.lines if " s  " in line]
    assert states == ["creating", "created", "started", "stopped"]
    assert "fly machine destroy" in process.text()
    good = command(processes, platform, "run", "--image", "alpine:3", "--json", "--", "true")
    assert good.wait() == 0, good.text()
    assert json.loads("\n".join(good.out))["exit_code"] == 0


def test_waker_run_that_is_told_to_stop_leaves_no_machine(processes, platform, machines):
    for number in (signal.SIGINT, signal.SIGTERM):
        process = command(processes, platform, "run", "--image", "alpine:3", "--", "sleep", "60")
        process.saw("started")
        process.signal(number)
        assert process.wait() == 130, process.text()
        until(lambda: not [m for m in machines.list() if m.state not in ("destroyed", "destroying")], "it is gone")


def test_waker_run_here(processes, platform, tmp_path):
    process = processes([f"{BIN}/waker", "run", "--local", "--timeout", "30s", "--", "sh", "-c", "pwd; exit 4"])
    assert process.wait() == 4
    assert process.out == [str(tmp_path)]
    slow = processes([f"{BIN}/waker", "run", "--local", "--timeout", "200ms", "--", "sleep", "60"])
    assert (slow.wait(), "stopped after 200ms" in slow.text()) == (124, True)


BAD = {
    ("run", "--", "true"): ({"FLY_API_TOKEN": ""}, 2, "no token"),
    ("run", "--image", "alpine:3", "--", "true"): ({"FLY_API_TOKEN": "wrong"}, 125, "401 Authenticate"),
    ("run", "--app", "elsewhere", "--image", "alpine:3", "--", "true"): ({}, 125, "404 app not found; does the token"),
    ("run", "--image", "nowhere:1", "--", "true"): ({}, 125, "nowhere:1: not found"),
    ("run", "--timeout", "soon", "--", "true"): ({}, 2, "--timeout 'soon': expected seconds, or something like 90s"),
    ("run", "--memory", "much", "--", "true"): ({}, 2, "--memory 'much': expected megabytes"),
    ("run", "--env", "A", "--", "true"): ({}, 2, "--env 'A': expected NAME=VALUE"),
    ("run", "--file", "/a=nowhere", "--", "true"): ({}, 2, "--file nowhere: No such file"),
    ("run", "--mount", "data", "--", "true"): ({}, 2, "--mount 'data': expected VOLUME:PATH"),
    ("run",): ({}, 2, "no command: write it after --"),
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_input_is_a_sentence_and_leaves_nothing(processes, platform, machines, arguments):
    env, code, says = BAD[arguments]
    process = command(processes, platform, *arguments, **env)
    assert process.wait() == code, process.text()
    assert says in process.text()
    assert "Traceback" not in process.text()
    assert machines.list() == []


# -- what dead callers leave -------------------------------------------------------------------------------------------


def a_machine(state, *, code=None, at=1000.0, marks=None):
    events = [{"type": "launch", "status": "created", "timestamp": 500_000}]
    if state != "created":
        events.insert(0, {"type": "start", "status": "started", "timestamp": 600_000})
    if code is not None:
        exit_event = {"exit_code": code, "requested_stop": False}
        events.insert(0, {"type": "exit", "status": "stopped", "timestamp": at * 1000,
                          "request": {"exit_event": exit_event}})  # fmt: skip
    metadata = {JOB: "job-1", **(marks or {})}
    return Machine.read({"id": "e1", "state": state, "events": events, "config": {"metadata": metadata}})


VERDICTS = [
    (a_machine("stopped", code=0), 1000 + GRACE_S - 1, "leave"),
    (a_machine("stopped", code=0), 1000 + GRACE_S, "delete"),
    (a_machine("stopped", code=1), 1000 + GRACE_S, "leave"),
    (a_machine("stopped", code=1), 1000 + KEEP_FAILED_S, "delete"),
    (a_machine("started"), 1e9, "leave"),
    (a_machine("started", marks={UNTIL: "2000"}), 2000 + GRACE_S - 1, "leave"),
    (a_machine("started", marks={UNTIL: "2000"}), 2000 + GRACE_S, "delete"),
    (a_machine("failed"), 1000, "leave"),
    (a_machine("failed"), 500 + KEEP_FAILED_S, "delete"),
    (a_machine("destroying", code=0), 1e9, "leave"),
]


@pytest.mark.parametrize(("machine", "now", "action"), VERDICTS)
def test_what_is_to_become_of_a_job_machine(machine, now, action):
    """A caller that lives deletes what succeeded at once; a failure is kept for a day, a run until its time is over."""
    assert judge(machine, now).action == action


def test_a_machine_that_is_no_jobs_is_nobodys_business():
    assert judge(Machine.read({"id": "e1", "state": "stopped"}), 1e9) is None


def test_what_a_killed_caller_left_is_reaped(processes, platform, machines):
    """kill -9 in the middle: the job runs to its end by itself, and the next reap deletes its machine."""
    process = command(processes, platform, "run", "--image", "alpine:3", "--", "sleep", "0.5")
    process.saw("started")
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: [m.state for m in machines.list()] == ["stopped"], "the job has ended by itself")
    assert [each.action for each in reap(machines)] == ["leave"]
    looked = command(processes, platform, "jobs", "reap", "--grace", "0s", "--dry-run")
    assert looked.wait() == 0, looked.text()
    assert "would be deleted" in looked.text()
    reaped = command(processes, platform, "jobs", "reap", "--grace", "0s", "--json")
    assert reaped.wait() == 0, reaped.text()
    assert [each["action"] for each in json.loads(reaped.out[0])["jobs"]] == ["delete"]
    until(lambda: not [m for m in machines.list() if m.state not in ("destroyed", "destroying")], "it is gone")
    assert command(processes, platform, "jobs", "reap", FLY_API_TOKEN="wrong").wait() == 1


def test_a_token_that_is_revoked_meanwhile_makes_the_job_unknown():
    async def story(machines, platform, wire):
        job = await submit_async(["x"], machines=machines, image=IMAGE, env={"LIVES": "100"})
        while job.state != "started":
            await asyncio.sleep(1)
        from dataclasses import replace

        machines._config = replace(machines._config, authorization="Bearer revoked")
        with pytest.raises(JobUnknown, match="token validation error") as failure:
            await job
        assert isinstance(failure.value.__cause__, TokenRefused)

    virtually(story)
