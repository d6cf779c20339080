"""`waker jobs`, as it is typed."""

import json
import subprocess
import threading

import pytest
from harness import BIN

from waker import SqliteQueue


@pytest.fixture
def ids(tmp_path):
    """A queue with one job in each state that waits, and a module that names it."""
    (tmp_path / "shop.py").write_text("from waker import SqliteQueue\nqueue = SqliteQueue('jobs.db')\nnumber = 7\n")
    with SqliteQueue(tmp_path / "jobs.db") as queue:
        broken = queue.task(name="shop:broken", retries=0)(lambda order: {}[order])
        ids = {"dead": [broken.enqueue("order-1"), broken.enqueue("order-2")]}
        queue.work(threading.Event())
        mail = queue.task(name="shop:mail")(print)
        ids["ready"] = [mail.enqueue("a" * 100, copy=True)]
        ids["delayed"] = [mail.enqueue_in(3600, "later")]
    return ids


@pytest.fixture
def jobs(tmp_path):
    """`jobs("list", …)` → exit code, stdout, stderr."""

    def run(*words):
        ended = subprocess.run([f"{BIN}/waker", "jobs", *words], cwd=tmp_path, capture_output=True, text=True)
        return ended.returncode, ended.stdout, ended.stderr

    return run


@pytest.mark.parametrize("name", ["jobs.db", "./jobs.db", "shop:queue"])
def test_list_counts_the_jobs_and_shows_the_oldest(jobs, ids, name):
    code, out, err = jobs("list", name)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[-1] == "1 ready, 1 delayed, 0 running, 2 dead"
    assert [line.split()[:2] for line in lines[1:-1]] == [
        [str(ids["dead"][0]), "dead"],
        [str(ids["dead"][1]), "dead"],
        [str(ids["ready"][0]), "ready"],
        [str(ids["delayed"][0]), "delayed"],
    ]
    assert "in 60 min" in lines[-2]
    assert 'shop:mail("later")' in lines[-2]
    assert max(map(len, lines)) < 130


def test_list_can_show_one_state_and_be_short(jobs, ids):
    assert jobs("list", "jobs.db", "--state", "delayed")[1].count("\n") == 3
    assert jobs("list", "jobs.db", "--limit", "1")[1].count("\n") == 3
    assert jobs("list", "jobs.db", "--state", "running")[1] == "1 ready, 1 delayed, 0 running, 2 dead\n"


def test_json_is_one_object_with_everything(jobs, ids):
    code, out, _ = jobs("list", "jobs.db", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["counts"] == {"ready": 1, "delayed": 1, "running": 0, "dead": 2}
    ready = next(job for job in found["jobs"] if job["state"] == "ready")
    assert (ready["id"], ready["args"], ready["kwargs"]) == (ids["ready"][0], ["a" * 100], {"copy": True})


def test_dead_shows_why(jobs, ids):
    code, out, _ = jobs("dead", "jobs.db")
    assert code == 0
    assert f'{ids["dead"][0]} shop:broken("order-1"), dead since 0 s ago, 1 attempts' in out
    assert "KeyError: 'order-1'" in out
    assert out.endswith("2 dead\n")
    assert jobs("dead", "jobs.db", "--limit", "1")[1].endswith("2 dead, 1 shown\n")
    assert len(json.loads(jobs("dead", "jobs.db", "--json")[1])["jobs"]) == 2


def test_retry_makes_dead_jobs_ready(jobs, ids):
    code, out, err = jobs("retry", "jobs.db", str(ids["dead"][0]), str(ids["ready"][0]))
    assert code == 1
    assert out.startswith("1 ready again")
    assert err == "1 of the ids are not dead jobs\n"
    assert json.loads(jobs("retry", "jobs.db", "--all", "--json")[1]) == {"changed": 1}
    assert jobs("list", "jobs.db")[1].endswith("3 ready, 1 delayed, 0 running, 0 dead\n")


def test_purge_deletes_dead_jobs_only(jobs, ids):
    assert jobs("purge", "jobs.db", str(ids["dead"][0])) == (0, "1 deleted\n", "")
    assert jobs("purge", "jobs.db", "--all") == (0, "1 deleted\n", "")
    assert jobs("list", "jobs.db")[1].endswith("1 ready, 1 delayed, 0 running, 0 dead\n")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["list", "missing.db"], 1, "missing.db: there is no such file"),
        (["list", "shop.py"], 1, "shop.py: it is not a SQLite database"),
        (["list", "nowhere/jobs.db"], 1, "its folder does not exist"),
        (["list", "shop:nothing"], 2, "shop has no 'nothing'"),
        (["list", "shop:number"], 2, "'shop:number' is a int; expected a SqliteQueue"),
        (["list", "shopping:queue"], 2, "there is no module 'shopping'"),
        (["retry", "jobs.db"], 2, "name the jobs by their ids, or say --all"),
        (["purge", "jobs.db", "1", "--all"], 2, "name the jobs by their ids, or say --all"),
        (["purge", "jobs.db", "one"], 2, "invalid int value: 'one'"),
        ([], 2, "required: ACTION"),
    ],
)
def test_a_mistake_is_a_sentence(jobs, ids, tmp_path, words, code, said):
    before = sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__")
    ended, out, err = jobs(*words)
    assert (ended, out) == (code, "")
    assert said in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before
