"""Schemathesis over the emulator's operations: no server error, no answer that is not documented.

Few examples by default, the same each time; `make fuzz` takes many, new ones each time (FUZZ_EXAMPLES).
"""

import json
import os

import documents
import pytest

from waker.emulator import Knobs, LocalPlatform
from waker.emulator.operations import EMULATED, ROWS

pytestmark = pytest.mark.skipif(not documents.there(), reason=documents.MISSING)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
FEW = 6
FUZZED = sorted((name, method) for method, _, name in ROWS if name in EMULATED)
# No budgets, waits of a second at most, and machines that are asked for are never launched: they are many.
UNLIMITED = Knobs(
    time_scale=0.01, api_rate_per_s=1e9, api_burst=1_000_000, api_get_rate_per_s=1e9, api_get_burst=1_000_000,
    start_rate_per_s=1e9, start_burst=1_000_000, api_app_deletes_per_min=1_000_000, wait_max_s=1,
    prepare_s=(1e6, 1e6),
)  # fmt: skip


@pytest.fixture(scope="module")
def schema():
    import schemathesis

    return schemathesis.openapi.from_dict(documents.openapi())


@pytest.fixture
def platform(tmp_path):
    # Commands that are made up find nothing to run.
    env = {"PATH": str(tmp_path)}
    with LocalPlatform(
        ["/bin/sleep", "600"], api=True, machines=1, app="fuzzed", images={"*": ["/bin/sleep", "600"]}, env=env,
        cwd=str(tmp_path), knobs=UNLIMITED, log=lambda *_: None,
    ) as platform:  # fmt: skip
        platform.start_machine(platform.machines[0].id)
        platform.wait_for("machine.started")
        yield platform


def sent(platform, method, path, body):
    import httpx

    headers = {"authorization": f"Bearer {platform.api_token}"}
    return httpx.request(method, f"{platform.api_url}/v1/apps/fuzzed{path}", headers=headers, json=body).json()


@pytest.mark.parametrize(("name", "method"), FUZZED)
def test_no_server_error_and_no_undocumented_shape(name, method, schema, platform):
    """Half of the requests are to what is there; some make no sense at all."""
    import hypothesis
    from hypothesis import strategies as st
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi import checks

    operation = next(
        each.ok()
        for each in schema.get_all_operations()
        if each.ok().definition.raw.get("operationId") == name and each.ok().method.upper() == method
    )
    volume = sent(platform, "POST", "/volumes", {"name": "data", "size_gb": 1})["id"]
    there = {
        "app_name": "fuzzed",
        "machine_id": platform.machines[0].id,
        "volume_id": volume,
        "key": "fly_process_group",
    }
    names = {each.name for each in operation.path_parameters}
    fixed = {key: value for key, value in there.items() if key in names}
    strategies = (
        [operation.as_strategy(path_parameters=fixed), operation.as_strategy()] if names else [operation.as_strategy()]
    )
    strategies.append(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    statuses = set()

    @hypothesis.settings(
        max_examples=EXAMPLES or FEW,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=st.one_of(strategies))
    def fuzz(case):
        headers = {"authorization": f"Bearer {platform.api_token}"}
        answer = case.call(base_url=f"{platform.api_url}/v1", headers=headers)
        statuses.add(answer.status_code)
        assert answer.status_code < 500 or (
            answer.status_code == 501 and answer.json()["error"].startswith("not emulated: ")
        )
        wanted = [checks.status_code_conformance, checks.response_schema_conformance, checks.content_type_conformance]
        case.validate_response(answer, checks=wanted)

    fuzz()
    assert statuses
    if name in ("Machines_show", "Apps_show", "Machines_list", "Volumes_list"):
        assert 200 in statuses, json.dumps(sorted(statuses))
