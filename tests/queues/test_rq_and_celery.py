"""What is particular to RQ and to Celery."""

EXTRAS = ("rq", "celery")


def test_queues_chosen_by_name_are_drained_and_the_others_are_not(bench):
    """`--queues elsewhere`, as the library's users name them; the job waits in the default one."""
    bench.producer.enqueue("record", "here")
    machine = bench.up("--queues", "elsewhere")
    assert machine.wait() == 0, machine.text()
    assert bench.noted("ran") == []
    machine = bench.up("--queues", {"rq": "default", "celery": "celery"}[bench.library.extra] + ",elsewhere")
    assert machine.wait() == 0, machine.text()
    assert bench.noted("ran") == ["here"]


def test_settings_that_lose_jobs_are_named_with_their_values_and_a_remedy(bench):
    """For `worker check`; what the user never set and the drain sets is no finding."""
    found = {setting for setting, *_ in bench.producer.ask(do="findings")}
    if bench.library.extra == "rq":
        assert found == set()
        return
    assert "task_acks_late" not in found
    careless = bench.new_producer(CONTRACT_ACKS_LATE="0").ask(do="findings")
    assert ("task_acks_late", "False") in {(setting, value) for setting, value, *_ in careless}
    assert any(risk.startswith("loses the job") for _, _, risk, _ in careless)
