"""Pipelines as jobs of a real cluster: dependencies, arrays, what a failure ends, and what is submitted again."""

import os
import re
import signal
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def submit(cluster, site, runs):
    """`submit(file, **site options)`: the job ids by step; `wait=True` waits for the end of all."""

    def do(file, wait=True, **options):
        said = runs(file, "--cluster", site(python=runs.python(), **options), command="submit")
        ids = dict(re.findall(r"^(\w+): job (\d+)", said, flags=re.MULTILINE))
        if wait:
            cluster.wait_for(lambda: not _left(cluster, ids), "the end of all jobs")
        return ids

    return do


def _left(cluster, ids):
    """The jobs of `ids` that wait or run, elements of arrays included."""
    return {job.partition("_")[0] for job in cluster.jobs()} & set(ids.values())


def rows(said):
    """The rows of a status table: state, job, restarts and progress by step."""
    cells = [[cell.strip() for cell in row.split("│")[1:-1]] for row in said.splitlines() if row.startswith("│")]
    return {name: (state, restarts, progress) for name, state, _, restarts, progress in cells}


def test_a_parent_that_fails_ends_its_children_and_is_submitted_again(runs, submit):
    steps = {
        "first": {"command": "probe {folder}/order --say first", "resources": {"gpus": False}},
        "second": {"command": ["probe {folder}/order --say second", "probe {out} --say on-fire --code {code}"]},
        "third": {"command": "probe {folder}/order --say third"},
        "fourth": {"command": "probe {folder}/order --say fourth", "needs": ["first", "third"]},
        "aside": {"command": "probe {folder}/order --say aside", "needs": ["first"]},
    }
    file = runs.write(steps, variables={"code": 2})
    assert list(submit(file)) == ["first", "second", "third", "fourth", "aside"]
    said = runs(runs.folder / "run", command="status")
    shown = rows(said)
    assert {name: state for name, (state, *_) in shown.items()} == {
        "first": "done",
        "second": "given up: a wrong request, which another attempt would not mend",
        "third": "did not start: second did not succeed",
        "fourth": "did not start: third did not succeed",
        "aside": "done",
    }
    assert "second: last error, in attempt 0: rank 0, Exited with exit code 2" in said
    assert "on-fire" in said
    assert runs.lines("order") in (["first", "second", "aside"], ["first", "aside", "second"])

    file = runs.write(steps, variables={"code": 0})
    assert list(submit(file)) == ["second", "third", "fourth"]
    assert {state for state, *_ in rows(runs(runs.folder / "run", command="status")).values()} == {"done"}
    assert runs.lines("order")[3:] == ["second", "third", "fourth"]
    assert "All of" in runs(file, "--cluster", runs.folder / "site.yaml", command="submit")
    assert runs(file).count("finished before") == 5


def test_a_part_that_was_killed_is_submitted_again_alone(runs, submit, cluster):
    steps = {
        "pieces": {"command": "probe {folder}/part-{part} --say {part}/{parts} --wait {folder}/go", "array": 3},
        "merge": {"command": "probe {folder}/merged --say all"},
    }
    file = runs.write(steps)
    ids = submit(file, wait=False, max_restarts=0)
    cluster.wait_for(lambda: all(runs.lines(f"part-{part}") for part in (1, 2, 3)), "three parts at once")
    again = ("--cluster", runs.folder / "site.yaml")
    assert "'pieces' is in the queue already" in runs(file, *again, command="submit", code=2)
    assert "'pieces' is in the queue already" in runs(file, code=2)
    assert rows(runs(runs.folder / "run", command="status"))["merge"][0] == "pending (Dependency)"
    os.kill(int((runs.folder / "run" / "part-2").read_text().split()[0]), signal.SIGKILL)
    (runs.folder / "run" / "go").touch()
    cluster.wait_for(lambda: not _left(cluster, ids), "the end of all jobs")
    shown = rows(runs(runs.folder / "run", command="status"))
    assert shown["pieces"] == ("given up: no restarts left", "0", "2 of 3 parts")
    assert shown["merge"][0] == "did not start: pieces did not succeed"

    assert list(submit(file, max_restarts=0)) == ["pieces", "merge"]
    assert [runs.lines(f"part-{part}") for part in (1, 2, 3)] == [["1/3"], ["2/3", "2/3"], ["3/3"]]
    assert runs.lines("merged") == ["all"]
    assert {state for state, *_ in rows(runs(runs.folder / "run", command="status")).values()} == {"done"}


def test_cancel_ends_the_whole_chain(runs, submit, cluster):
    file = runs.write(
        {
            "long": {"command": "probe {folder}/long --say begun --wait {folder}/go"},
            "after": {"command": "probe {folder}/after --say ran"},
        }
    )
    ids = submit(file, wait=False)
    cluster.wait_for(lambda: runs.lines("long"), "the first step")
    said = runs(runs.folder / "run", "--now", command="cancel")
    assert [line.partition(":")[0] for line in said.splitlines()] == ["after", "long"]
    cluster.wait_for(lambda: not _left(cluster, ids), "the end of all jobs")
    assert "no job in the queue" in runs(runs.folder / "run", command="cancel", code=2)
    assert runs.lines("after") == []


def test_what_sbatch_refuses_leaves_nothing_in_the_queue(runs, cluster, site):
    file = runs.write(
        {
            "first": {"command": "probe {folder}/first --say ran --wait {folder}/go"},
            "second": {"command": "probe {folder}/second", "resources": {"memory_gb": 10_000_000}},
        }
    )
    said = runs(file, "--cluster", site(python=runs.python()), command="submit", code=1)
    assert "error: sbatch says:" in said
    cluster.wait_for(lambda: not cluster.jobs(), "an empty queue")
    assert Path(runs.folder / "run" / "pipeline.yaml").is_file()
