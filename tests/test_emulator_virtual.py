"""The emulated platform on a virtual clock: machines are callables, hours take milliseconds, a seed repeats all."""

import asyncio
import signal

import pytest

from waker.emulator import Faults, Knobs, NobodyWillWakeUsError, Platform, RefusedError, run_virtual


def drainer(*, binds_s=0.05, hold_s=0.5, lives_s=5.0, code=0):
    """Listen after *binds_s*, answer each request after *hold_s* with the machine's id, exit after *lives_s*."""

    async def program(machine):
        async def serve():
            await asyncio.sleep(binds_s)
            async for request in machine.requests:
                machine.spawn(hold(request))

        async def hold(request):
            await asyncio.sleep(hold_s)
            request.answer(200, {"wake-machine": machine.id}, machine.id.encode())

        machine.spawn(serve())
        await asyncio.sleep(lives_s)
        return code

    return program


def on_platform(program, story, *, seed=0, shuffle=False, **options):
    """Run *story(platform)* on a virtual clock; return what it returns."""
    options.setdefault("log", lambda machine, line: None)

    async def main():
        async with Platform(program, seed=seed, **options) as platform:
            return await story(platform)

    return run_virtual(main(), seed, shuffle=shuffle)


async def together(platform, count, **options):
    return await asyncio.gather(*(platform.request(**options) for _ in range(count)))


def answered_by(replies):
    return {reply.header("wake-machine") for reply in replies if reply.status == 200}


def kinds(platform, *types):
    return [event.type for event in platform.events if event.type in types]


# The clock


def test_an_hour_passes_at_once():
    async def story():
        before = asyncio.get_running_loop().time()
        await asyncio.gather(asyncio.sleep(3600), asyncio.sleep(1800))
        return asyncio.get_running_loop().time() - before

    assert run_virtual(story()) == 3600


def test_a_story_that_stops_is_an_error_not_a_hang():
    async def story():
        await asyncio.Event().wait()

    with pytest.raises(NobodyWillWakeUsError):
        run_virtual(story())


def test_a_seed_repeats_a_whole_story():
    async def story(platform):
        await together(platform, 5)
        await platform.wait_all_stopped()
        return [str(event) for event in platform.events]

    faults = Faults(drop_connect=0.3, slow_answer=0.3)
    first = [on_platform(drainer(), story, seed=seed, faults=faults, shuffle=True) for seed in (1, 2)]
    again = [on_platform(drainer(), story, seed=seed, faults=faults, shuffle=True) for seed in (1, 2)]
    assert first == again
    assert first[0] != first[1]


def test_a_test_explores_hundreds_of_schedules():
    """Whatever the seed draws: as many machines as the soft limit says, each billed from start to stop."""

    async def story(platform):
        replies = await together(platform, 3)
        await platform.wait_all_stopped()
        return replies, platform.machines

    for seed in range(200):
        knobs = Knobs(soft_limit_reading="at-or-above")
        replies, machines = on_platform(drainer(), story, seed=seed, shuffle=True, knobs=knobs)
        assert len(answered_by(replies)) == 3
        assert all(machine.exit_code == 0 and len(machine.runs) == 1 for machine in machines)
        assert all(abs(machine.billed_s - 5.0) < 1e-6 for machine in machines)


# Starting


@pytest.mark.parametrize(("reading", "needed"), [("at-or-above", 3), ("above", 6)])
def test_held_requests_start_machines_and_instant_answers_do_not(reading, needed):
    async def story(platform):
        replies = await together(platform, needed)
        warm = [await platform.request() for _ in range(needed)]  # one after the other: one machine is enough
        return answered_by(replies), answered_by(warm), kinds(platform, "machine.starting")

    cold, warm, started = on_platform(drainer(), story, knobs=Knobs(soft_limit_reading=reading))
    assert len(cold) == 3
    assert warm <= cold
    assert len(started) == 3


def test_a_request_is_held_until_the_machine_runs_and_the_proxy_has_learned_of_it():
    async def story(platform):
        await platform.request()
        times = {event.type: event.at for event in platform.events}
        assert times["machine.starting"] == 0
        assert 0.48 <= times["machine.started"] <= 1.3
        assert 0.2 <= times["request.sent"] - times["machine.started"] <= 1.0

    for seed in range(30):
        on_platform(drainer(binds_s=0), story, seed=seed)


def test_the_proxy_connects_again_while_nothing_listens_and_then_gives_up():
    """A program that binds within about 8 s is reached; one that binds later is not (PM05)."""

    async def story(platform):
        return await platform.request()

    assert on_platform(drainer(binds_s=7, lives_s=60), story).status == 200
    late = on_platform(drainer(binds_s=9, lives_s=60), story, machines=1)
    assert late.status == 503
    assert late.body.startswith(b"[PM05]")
    assert b"after 15 attempts (in 7.70s)" in late.body


def test_a_program_that_does_not_wait_for_its_first_request_is_often_not_reached_at_its_first_start():
    """The proxy connects a moment after the start: who leaves at once is started again and again."""

    async def story(platform):
        while (await platform.request()).status != 200:
            await asyncio.sleep(1)
        return len(kinds(platform, "machine.starting"))

    def starts(lives_s):
        return [on_platform(drainer(hold_s=0, lives_s=lives_s), story, seed=seed, machines=1) for seed in range(100)]

    assert sum(count == 1 for count in starts(0.35)) < 50
    assert starts(2.0) == [1] * 100


def test_a_start_right_after_an_exit_is_refused_though_the_state_says_stopped():
    async def story(platform):
        await platform.request()
        await platform.wait_all_stopped()
        machine = platform.machines[0]
        assert machine.state == "stopped"
        with pytest.raises(RefusedError, match=r"PM07.*still active") as refused:
            await platform.start_machine(machine.id)
        assert refused.value.status == 412
        reply = await platform.request()
        assert (reply.status, reply.body[:6]) == (503, b"[PM07]")
        await asyncio.sleep(3)
        return await platform.request()

    knobs = Knobs(exit_settle_s=(2.5, 2.5))
    assert on_platform(drainer(), story, machines=1, knobs=knobs).status == 200


def test_pressing_on_runs_into_the_rate_limit():
    async def story(platform):
        await platform.request()
        await platform.wait_all_stopped()
        await together(platform, 3)
        return [event.fields["code"] for event in platform.events if event.type == "start.refused"]

    codes = on_platform(drainer(), story, machines=1, knobs=Knobs(exit_settle_s=(9.0, 9.0)))
    assert codes[:3] == ["PM07"] * 3
    assert "PM01" in codes


def test_a_refused_machine_is_left_for_another_one():
    async def story(platform):
        first = await platform.request()
        await platform.wait_all_stopped()
        second = await platform.request()
        return first, second

    first, second = on_platform(drainer(), story, machines=2, knobs=Knobs(exit_settle_s=(9.0, 9.0)))
    assert second.status == 200
    assert answered_by([first]) != answered_by([second])


def test_a_request_for_a_machine_that_just_stopped_goes_elsewhere_unless_it_is_the_only_one():
    """The proxy still believes it is up (late gossip); PM11."""

    async def story(platform):
        await platform.request()
        await platform.wait_all_stopped()
        await asyncio.sleep(4)  # settled, and the proxy does not know
        reply = await platform.request()
        return reply.status, [event.fields["code"] for event in platform.events if event.type == "request.moved"]

    faults = Faults(late_gossip=1)
    assert on_platform(drainer(), story, machines=2, faults=faults) == (200, ["PM11"])
    assert on_platform(drainer(), story, machines=1, faults=faults) == (200, [])


def test_a_machine_that_takes_too_long_to_start_times_out():
    async def story(platform):
        return await platform.request()

    knobs = Knobs(slow_start_s=30)
    reply = on_platform(drainer(), story, machines=1, faults=Faults(slow_start=1), knobs=knobs)
    assert (reply.status, reply.body[:6]) == (503, b"[PM03]")


def test_without_autostart_nothing_starts():
    async def story(platform):
        reply = await platform.request()
        assert reply.status == 503
        await platform.start_machine(platform.machines[0].id)
        await platform.wait_for("machine.started")
        await asyncio.sleep(1)
        return (await platform.request()).status

    assert on_platform(drainer(), story, auto_start=False) == 200


# Ending


def test_a_failing_machine_is_restarted_until_the_budget_is_used_up():
    async def story(platform):
        await platform.start_machine(platform.machines[0].id)
        await platform.wait_all_stopped(3600)
        machine = platform.machines[0]
        assert [run.source for run in machine.runs] == ["api"] + ["restart-policy"] * 10
        assert {run.exit_code for run in machine.runs} == {3}
        # A later request may start it again.
        return (await platform.request()).status if not await asyncio.sleep(10) else None

    assert on_platform(drainer(code=3, lives_s=2.5), story, machines=1) == 200


@pytest.mark.parametrize(("policy", "code", "runs"), [("no", 3, 1), ("always", 0, 3), ("on-failure", 0, 1)])
def test_the_restart_policy_decides_after_the_exit(policy, code, runs):
    async def story(platform):
        machine = platform.machines[0].id
        await platform.start_machine(machine)
        for _ in range(runs):
            await platform.wait_for("machine.started", since=platform.event_log.count)
        await platform.wait_for(lambda: platform.machine(machine).state in ("stopped", "restarting"))
        return len(platform.machine(machine).runs)

    assert on_platform(drainer(code=code, lives_s=1), story, restart=policy) == runs


def test_a_stop_is_a_signal_then_a_deadline_then_the_end():
    seen = []

    def stubborn(obeys):
        async def program(machine):
            stopped = asyncio.Event()

            def handler(number):
                seen.append(signal.Signals(number).name)
                if obeys:
                    stopped.set()

            machine.on_signal(handler)
            await stopped.wait()
            return 7

        return program

    async def story(platform):
        machine = platform.machines[0].id
        await platform.start_machine(machine)
        await platform.wait_for("machine.started")
        began = platform.now
        await platform.stop_machine(machine)
        await platform.wait_all_stopped()
        return (
            platform.now - began,
            platform.machine(machine).exit_code,
            platform.machine(machine).runs[-1].requested_stop,
        )

    assert on_platform(stubborn(True), story, kill_timeout_s=9) == (0, 7, True)
    assert on_platform(stubborn(False), story, kill_timeout_s=9, kill_signal="SIGTERM") == (9, 137, True)
    assert seen == ["SIGINT", "SIGTERM"]


def test_a_program_without_a_handler_ends_by_the_signal():
    async def story(platform):
        machine = platform.machines[0].id
        await platform.start_machine(machine)
        await platform.wait_for("machine.started")
        await platform.stop_machine(machine, "SIGTERM")
        await platform.wait_all_stopped()
        return platform.machine(machine).exit_code

    assert on_platform(drainer(), story) == 128 + signal.SIGTERM


def test_a_stop_reaches_a_machine_in_every_state():
    async def story(platform):
        machine = platform.machines[0].id
        await platform.stop_machine(machine)  # stopped: nothing happens
        await platform.start_machine(machine)
        await platform.stop_machine(machine)  # starting: the program never runs
        await platform.stop_machine(machine)  # stopping: harmless
        await platform.wait_all_stopped()
        assert platform.machine(machine).billed_s == 0
        await asyncio.sleep(5)
        await platform.start_machine(machine)
        await platform.wait_for("machine.restarting")
        await platform.stop_machine(machine)  # between two runs: no other follows
        await asyncio.sleep(60)
        return kinds(platform, "machine.starting", "machine.started", "machine.stopped", "machine.restarting")

    assert on_platform(drainer(code=1), story) == [
        "machine.starting",
        "machine.stopped",
        "machine.starting",
        "machine.started",
        "machine.restarting",
        "machine.stopped",
    ]


def test_a_killed_machine_breaks_its_requests_off_and_is_restarted():
    async def story(platform):
        asking = asyncio.ensure_future(platform.request())
        sent = await platform.wait_for("request.sent")
        await platform.kill(sent.machine)
        reply = await asking
        restarting = await platform.wait_for("machine.restarting")
        return reply.status, reply.body[:6], restarting.fields["exit_code"]

    assert on_platform(drainer(), story, machines=1) == (502, b"[PC03]", 137)
    status, *_ = on_platform(drainer(), story, machines=2, knobs=Knobs(on_reset="retry"))
    assert status == 200


def test_a_destroyed_machine_is_gone():
    async def story(platform):
        first, second = (machine.id for machine in platform.machines)
        await platform.start_machine(first)
        await platform.wait_for("machine.started")
        await platform.destroy(first)
        await platform.destroy(second)
        await platform.wait_for(lambda: all(machine.state == "destroyed" for machine in platform.machines))
        with pytest.raises(RefusedError, match="not found"):
            await platform.start_machine(first)
        with pytest.raises(KeyError, match="no machine 'x'"):
            await platform.start_machine("x")
        return (await platform.request()).status

    assert on_platform(drainer(), story, machines=2) == 503


def test_a_program_that_raises_exits_with_1_and_says_why():
    lines = []

    async def program(machine):
        raise ValueError("no such queue")

    async def story(platform):
        await platform.start_machine(platform.machines[0].id)
        await platform.wait_all_stopped()
        return platform.machines[0].exit_code, platform.logs(platform.machines[0].id)

    said = ["ValueError: no such queue"]
    assert on_platform(program, story, restart="no", log=lambda machine, line: lines.append(line)) == (1, said)
    assert lines == said


# Limits


def test_requests_wait_at_the_hard_limit_and_not_for_ever():
    async def story(platform):
        return sorted(reply.status for reply in await together(platform, 3))

    assert on_platform(drainer(hold_s=1), story, machines=1, hard_limit=1) == [200, 200, 200]
    assert on_platform(drainer(hold_s=4), story, machines=1, hard_limit=1) == [200, 503, 503]
    assert on_platform(drainer(hold_s=1), story, machines=1, hard_limit=1, knobs=Knobs(queue_size=1)) == [200, 200, 503]


def test_one_edge_takes_a_bounded_number_of_requests():
    async def story(platform):
        replies = await together(platform, 5)
        return sorted(reply.status for reply in replies), [reply.body[:6] for reply in replies if reply.status == 503]

    assert on_platform(drainer(), story, knobs=Knobs(max_connections=4)) == ([200] * 4 + [503], [b"[PL01]"])


def test_a_caller_that_leaves_frees_its_place():
    async def story(platform):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await platform.request()
        assert [machine.in_flight for machine in platform.machines] == [0]
        assert kinds(platform, "request.gone") == ["request.gone"]
        platform.set_faults(Faults())
        return kinds(platform, "machine.started")

    assert on_platform(drainer(hold_s=100, lives_s=300), story, machines=1) == ["machine.started"]


def test_a_silent_machine_is_given_up():
    async def story(platform):
        return await platform.request()

    reply = on_platform(drainer(hold_s=100, lives_s=300), story)
    assert (reply.status, reply.body[:6]) == (502, b"[PC05]")


# Faults


def asked_with(fault, count=1, *, machines=1, times="1x1", **options):
    """Ask *count* times in turn, with the fault striking once; the statuses, and the number of runs."""

    async def story(platform):
        replies = []
        for _ in range(count):
            try:
                replies.append((await platform.request()).status)
            except ConnectionError:
                replies.append("reset")
        struck = [event.fields["fault"] for event in platform.events if event.type == "fault.struck"]
        assert set(struck) == {fault}
        return replies, sum(len(machine.runs) for machine in platform.machines)

    return on_platform(drainer(), story, machines=machines, faults=Faults(**{fault: times}), **options)


def test_each_fault_of_a_start_is_survived_by_asking_again():
    assert asked_with("start_rate_limited") == ([200], 1)
    assert asked_with("start_lease_held") == ([200], 1)
    assert asked_with("start_fails") == ([200], 2)
    assert asked_with("slow_start", knobs=Knobs(slow_start_s=5)) == ([200], 1)
    assert asked_with("drop_connect") == ([200], 1)
    statuses, _ = asked_with("start_rate_limited", times=1, count=2)
    assert statuses == [503, 503]


def test_each_fault_of_an_answer_reaches_the_caller():
    assert asked_with("reset_before_answer", 2) == ([502, 200], 1)
    assert asked_with("reset_mid_answer", 2) == (["reset", 200], 1)
    assert asked_with("slow_answer") == ([200], 1)


def test_one_machine_too_many_is_started():
    assert asked_with("start_too_many", 2, machines=2) == ([200, 200], 2)


def test_a_request_may_arrive_twice():
    seen = []

    async def program(machine):
        async for request in machine.requests:
            seen.append((request.method, request.body))
            request.answer()
        return 0

    async def story(platform):
        reply = await platform.request("POST", body=b"once")
        await asyncio.sleep(1)
        return reply.status

    assert on_platform(program, story, faults=Faults(delivered_twice=1)) == 200
    assert sorted(seen) == [("POST", b""), ("POST", b"once")]


def test_a_start_may_be_refused_although_the_machine_has_settled():
    async def story(platform):
        await platform.request()
        await platform.wait_all_stopped()
        await asyncio.sleep(60)
        reply = await platform.request()
        return reply.status, [event.fields["code"] for event in platform.events if event.type == "start.refused"]

    assert on_platform(drainer(), story, machines=1, faults=Faults(start_refused_after_exit="1x1")) == (200, ["PM07"])


def test_a_host_may_lose_a_machine():
    async def story(platform):
        await platform.start_machine(platform.machines[0].id)
        lost = await platform.wait_for("machine.restarting")
        return lost.fields["exit_code"]

    assert on_platform(drainer(), story, faults=Faults(kill_machine="1x1")) == 137


# fly-replay and forced routing


def replaying(answers):
    """A program that answers with the headers `answers(machine, request)` gives, or with its id."""

    async def program(machine):
        async def leave():
            await asyncio.sleep(30)

        async def serve():
            async for request in machine.requests:
                asked = answers(machine, request)
                headers = {"fly-replay": asked} if isinstance(asked, str) else asked or {"wake-machine": machine.id}
                request.answer(200, headers, request.headers.get("fly-replay-src", "").encode())

        machine.spawn(serve())
        await leave()
        return 0

    return program


def first_time(asked):
    """Answer with a replay unless the request was replayed, or came back, already."""
    return lambda machine, request: None if {"fly-replay-src", "fly-replay-failed"} & set(request.headers) else asked


def test_a_replay_to_an_instance_starts_it_and_says_where_it_came_from():
    async def story(platform):
        target = platform.machines[2].id
        names.append(target)
        reply = await platform.request()
        source = next(event.machine for event in platform.events if event.type == "request.replayed")
        assert reply.header("wake-machine") == target or source == target
        assert reply.body.decode().startswith(f"instance={source};region=ams;t=")
        return reply.status

    names = []
    program = replaying(lambda machine, request: first_time(f"instance={names[0]}")(machine, request))
    assert on_platform(program, story) == 200


@pytest.mark.parametrize("starts", [False, True])
def test_whether_elsewhere_starts_a_stopped_machine_is_a_knob(starts):
    async def story(platform):
        first = await platform.request()
        return first.status, len(kinds(platform, "machine.starting"))

    program = replaying(first_time("elsewhere=true"))
    expected = (200, 2) if starts else (503, 1)
    assert on_platform(program, story, knobs=Knobs(elsewhere_starts=starts)) == expected


def test_a_fallback_brings_the_request_back_with_the_reason():
    seen = []

    def answers(machine, request):
        seen.append(request.headers.get("fly-replay-failed", ""))
        return first_time("elsewhere=true;fallback=force_self")(machine, request)

    async def story(platform):
        reply = await platform.request()
        return reply.status, platform.machines[0].id

    status, machine = on_platform(replaying(answers), story, machines=1)
    assert status == 200
    assert seen[0] == ""
    assert f"replay_source={machine};reason=no_candidate" in seen[1]


def test_a_replay_that_takes_too_long_comes_back():
    async def story(platform):
        names.append(platform.machines[1].id)
        reply = await platform.request(headers={"fly-force-instance-id": platform.machines[0].id})
        return reply.header("wake-machine") == platform.machines[0].id

    names = []
    program = replaying(
        lambda machine, request: first_time(f"instance={names[0]};timeout=100ms;fallback=force_self")(machine, request)
    )
    assert on_platform(program, story, machines=2, knobs=Knobs(force_instance_wakes=True))


def test_a_request_is_not_replayed_for_ever():
    async def story(platform):
        reply = await platform.request()
        return reply.status, reply.body[:6], len(kinds(platform, "request.replayed"))

    program = replaying(lambda machine, request: f"instance={machine.id}")
    assert on_platform(program, story) == (502, b"[PA02]", 10)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("nonsense", (502, b"[PA03]")),
        ("app=another", (502, b"[PA04]")),
        ("instance=unknown", (503, b"[PR02]")),
        ("region=eu", (501, b"not em")),
        ({"fly-replay": "instance=a", "fly-replay-cache": "/*"}, (501, b"not em")),
    ],
)
def test_a_replay_that_cannot_be_done_says_why(asked, expected):
    async def story(platform):
        reply = await platform.request()
        assert [machine.in_flight for machine in platform.machines] == [0, 0, 0]
        return reply.status, reply.body[:6]

    assert on_platform(replaying(first_time(asked)), story) == expected


def test_the_json_form_of_a_replay_is_read():
    async def program(machine):
        async for request in machine.requests:
            if "fly-replay-src" in request.headers:
                request.answer(200, {}, request.headers["fly-replay-src"].encode())
            else:
                headers = {"content-type": "application/vnd.fly.replay+json"}
                request.answer(200, headers, b'{"instance": "%s", "state": "kept"}' % machine.id.encode())
        return 0

    async def story(platform):
        return (await platform.request()).body

    assert on_platform(program, story).endswith(b";state=kept")


def test_a_forced_machine_answers_or_nobody_does():
    async def story(platform):
        machine = platform.machines[1].id
        forced = {"fly-force-instance-id": machine}
        cold = await platform.request(headers=forced)
        await platform.start_machine(machine)
        await platform.wait_for("machine.started")
        await asyncio.sleep(2)
        warm = await platform.request(headers=forced)
        preferred = await platform.request(headers={"fly-prefer-instance-id": "unknown"})
        assert preferred.status == 200
        return cold.status, warm.header("wake-machine") == machine

    assert on_platform(replaying(lambda machine, request: None), story) == (503, True)
    assert on_platform(replaying(lambda machine, request: None), story, knobs=Knobs(force_instance_wakes=True)) == (
        200,
        True,
    )


def test_the_proxy_adds_its_headers_and_takes_forged_ones_away():
    seen = {}

    async def program(machine):
        async for request in machine.requests:
            seen.update(request.headers)
            request.answer()
        return 0

    async def story(platform):
        return await platform.request(headers={"Fly-Client-IP": "6.6.6.6", "wake-hold": "2"})

    reply = on_platform(program, story, region=["ams", "fra"])
    assert seen["fly-client-ip"] == "127.0.0.1"
    assert seen["wake-hold"] == "2"
    assert seen["fly-region"] == "ams"
    assert seen["x-forwarded-proto"] == "http"
    assert reply.header("fly-request-id") == seen["fly-request-id"]


def test_wrong_arguments_are_named_all_at_once():
    with pytest.raises(ValueError, match=r"machines=0.*soft_limit=0.*restart='never'.*kill_signal='TERM'"):
        Platform(drainer(), machines=0, soft_limit=0, restart="never", kill_signal="TERM")
    with pytest.raises(ValueError, match="not both"):
        Platform(["true"], processes=[["true"]])
    with pytest.raises(ValueError, match="list of words"):
        Platform("worker up")
    with pytest.raises(ValueError, match="no such folder"):
        Platform(["true"], cwd="/nowhere")
