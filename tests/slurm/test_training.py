"""Real training runs on a real cluster: whatever happens to them, their losses are those of one undisturbed process."""

import json
import sys
import time
from pathlib import Path

import pytest
import yaml

from slurm.history import read_history
from slurm.job import Resources
from slurm.status import describe
from slurm.submit import read_record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, HELD = 8, 4
TWO = Resources(tasks_per_node=2)
HELD_RUN = (sys.executable, "-P", str(Path(__file__).with_name("held.py")), "pretrain")


@pytest.fixture(scope="session")
def tree(stage2_tree):
    """All four losses with global negatives, no dropout, and a checkpoint at every second step."""
    return stage2_tree | {
        "steps": STEPS,
        "precision": "fp32",
        "losses": {"matching": {"negatives": "global"}},
        "checkpoint": {"every_steps": 2, "keep": 8},
    }


@pytest.fixture(scope="session")
def reference(tree, runs_in, tmp_path_factory):
    """The losses of every step in one process, without Slurm."""
    runs = runs_in(tmp_path_factory.mktemp("reference"))
    done = runs.run(runs.write(tree, "alone"))
    assert done.returncode == 0, done.stderr
    return losses(runs.folder / "alone")


def losses(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["losses"] for line in lines}


def assert_equals(run, reference, rel=1e-4):
    ours = losses(run)
    assert sorted(ours) == sorted(reference) == list(range(1, STEPS + 1))
    for step, values in reference.items():
        assert ours[step] == pytest.approx(values, rel=rel), f"step {step}"
    assert (run / "done.json").is_file()


def attempts(run):
    return read_history(run / "slurm").attempts


def rank_logs(run):
    return "".join(path.read_text() for path in (run / "slurm" / "logs").glob("*/rank*.log"))


@pytest.fixture
def hold(cluster, start, runs, tree):
    """`hold(name, profile, **job options)`: a run that is held at its step HELD; its folder and its job."""

    def begin(name, profile, workers=0, **options):
        config = runs.write(tree | {"data": tree["data"] | {"workers": workers}}, name)
        run = runs.folder / name
        number = start(profile, run, *HELD_RUN, str(config), **options)

        def there():
            return (run / "log.jsonl").exists() and HELD in losses(run)

        cluster.wait_for(lambda: there() or number not in cluster.jobs(), f"step {HELD} of {name}", 300)
        assert there(), "\n".join(describe(run))
        assert (run / "checkpoints" / "latest").exists()  # that of step 2; step 4's is being written
        return run, number

    return begin


HELD_HERE = {"HELD_AT": str(HELD), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def test_four_ranks_on_two_nodes_are_one_process(cluster, site, runs, tree, reference, videomamba):
    config, run = runs.write(tree, "four"), runs.folder / "four"
    asked = ("submit", str(config), "--cluster", str(site()), "--nodes", "2")
    done = videomamba(*asked, cwd=runs.folder)
    assert done.returncode == 0, done.stderr
    assert "4 rank(s)" in done.stderr  # what --check says of nodes x GPUs
    number = done.stdout.strip()
    cluster.wait_until_gone(number, timeout=250)
    assert_equals(run, reference)
    logs = sorted(path.name for path in (run / "slurm" / "logs" / "latest").glob("rank*.log"))
    assert logs == [f"rank{rank}.log" for rank in range(4)]
    assert "8 of 8 kept" in videomamba("status", str(run)).stdout
    record = read_record(run)
    assert (run / "slurm" / "code" / "pretrain" / "trainer.py").is_file()
    assert yaml.safe_load((run / "slurm" / "config.yaml").read_text())["steps"] == STEPS
    assert record.job.code == run / "slurm" / "code"
    again = videomamba(*asked, cwd=runs.folder)
    assert (again.returncode, again.stdout) == (0, "")
    assert "is finished; nothing was submitted" in again.stderr
    assert cluster.jobs() == {}


def test_two_jobs_on_one_node_do_not_meet(cluster, profile, start, runs, tree, reference):
    here = profile(sbatch=(f"--nodelist={cluster.nodes[0]}",))
    names = ("left", "right")
    command = (sys.executable, "-P", "-m", "videomamba", "pretrain")
    numbers = [start(here, runs.folder / name, *command, str(runs.write(tree, name)), resources=TWO) for name in names]
    cluster.wait_for(lambda: set(cluster.jobs().values()) == {"RUNNING"}, "both to run")
    cluster.wait_until_gone(*numbers, timeout=250)
    for name in names:
        assert_equals(runs.folder / name, reference)
        assert len(attempts(runs.folder / name)) == 1


def test_a_time_limit_is_survived(cluster, profile, hold, reference):
    """Slurm signals before the limit; the run saves, is requeued and goes on; data workers are not hit."""
    run, number = hold("limited", profile(signal_lead=60, environment=HELD_HERE), workers=1, resources=TWO)
    minutes = int(time.time() - attempts(run)[0].started) // 60 + 2
    cluster("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")  # so that it comes now
    cluster.wait_until_gone(number, timeout=500)
    *stopped, last = attempts(run)
    assert stopped[0].step == HELD + 1
    assert {attempt.reason for attempt in stopped} == {"stopped"}  # on a slow machine the limit comes twice
    assert (last.reason, last.job) == ("done", number)
    assert "worker that reads data died" not in rank_logs(run)
    assert_equals(run, reference)


@pytest.mark.parametrize("how", ["TERM to the ranks", "the user's signal to the script"])
def test_preemption_is_survived(cluster, profile, hold, reference, how):
    """TERM goes to all processes of the ranks, data workers too; a site may send the job's own signal instead."""
    if how != "TERM to the ranks":
        cluster.reconfigure("SlurmctldParameters=preempt_send_user_signal\n")
    try:
        run, number = hold("preempted", profile(environment=HELD_HERE), workers=1, resources=TWO)
        cluster.preempt()
        cluster.wait_until_gone(number, timeout=300)
    finally:
        cluster.reconfigure()
    assert [attempt.reason for attempt in attempts(run)] == ["stopped", "done"]
    assert attempts(run)[0].step == HELD + 1
    assert "worker that reads data died" not in rank_logs(run)
    assert ("asked to stop" in (run / "slurm" / "logs" / f"{number}.out").read_text()) == (how != "TERM to the ranks")
    assert_equals(run, reference)


def test_a_rank_that_fails_takes_the_others_along_and_all_go_on(cluster, profile, start, runs, tree, reference):
    failing = profile(environment=HELD_HERE | {"HELD_FAULT": "raise"})
    run = runs.folder / "failing"
    number = start(failing, run, *HELD_RUN, str(runs.write(tree, "failing")), resources=TWO)
    cluster.wait_until_gone(number, timeout=300)
    first, second = attempts(run)
    assert (first.reason, second.reason) == ("failed", "done")
    assert 0 < first.step <= HELD
    assert "last error, in attempt 0: rank 1, Exited with exit code 1\n" in "\n".join(describe(run))
    assert "a rank of this test fails here" in "\n".join(describe(run))
    assert_equals(run, reference)


def test_a_lost_node_is_survived_on_fewer_nodes(cluster, profile, hold, reference):
    """kill -9 of all that runs on the batch host; no third node is free, so the run goes on with half the ranks."""
    cluster("scontrol", "update", f"nodename={cluster.nodes[2]}", "state=drain", "reason=test")
    fewer = Resources(nodes=2, min_nodes=1, tasks_per_node=2)
    run, number = hold("lost", profile(environment=HELD_HERE), resources=fewer)
    assert attempts(run)[0].nodes == ",".join(cluster.nodes[:2])
    cluster.kill_node(cluster.nodes[0])
    cluster.wait_until_gone(number, timeout=300)
    first, second = attempts(run)
    assert (first.reason, second.reason) == ("lost", "done")
    assert 0 < first.step <= HELD
    assert second.nodes == cluster.nodes[1]
    assert_equals(run, reference)
