"""The script on a real cluster, around a stand-in for training: how it ends, and how it does not."""

import re
from pathlib import Path

import pytest

from configs.errors import UserError
from slurm.history import FAILURES, read_history
from slurm.job import Resources
from slurm.show import EXAMPLES, PROFILES
from slurm.status import cancel, describe, state_of
from slurm.submit import prepare, read_record
from slurm.submit import test_only as only_test

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def reasons(run):
    history = read_history(run / "slurm")
    return [attempt.reason for attempt in history.attempts], history.verdict


@pytest.mark.parametrize("profile", PROFILES)
def test_a_cluster_would_take_every_shipped_profile(cluster, profile):
    path = EXAMPLES / f"{profile}.sbatch"
    text = re.sub(r"^#SBATCH --chdir=.*$", "#SBATCH --chdir=/", path.read_text(), flags=re.MULTILINE)
    assert "using 192 processors on nodes" in only_test(text)  # two nodes of the 96 CPUs that the profile says
    with pytest.raises(UserError, match="would refuse"):
        only_test(text.replace("gpus-per-node=8", "gpus-per-node=9"))


def test_two_nodes_and_their_ranks(cluster, profile, start, stand_in, tmp_path):
    run = tmp_path / "50% of it's"
    number = start(profile(), run, *stand_in, str(run), "5", resources=Resources(nodes=2), name="odd")
    cluster.wait_until_gone(number)
    assert reasons(run) == (["done"], None)
    heads = sorted((run / "slurm" / "logs" / "latest").glob("rank*.log"))
    assert [path.name for path in heads] == [f"rank{rank}.log" for rank in range(4)]
    said = {path.read_text().splitlines()[0].partition("from")[0] for path in heads}
    assert said == {f"rank {rank} of 4 " for rank in range(4)}
    first = cluster("scontrol", "show", "hostnames", read_history(run / "slurm").attempts[0].nodes).split()[0]
    assert f"meeting at {first}:" in heads[3].read_text()
    assert state_of(read_record(run)) == "done"


def test_a_crash_loop_ends_with_its_last_error(cluster, profile, start, stand_in, tmp_path):
    run = tmp_path / "crashing"
    number = start(profile(), run, *stand_in, str(run), "50", "--fault", "crash", resources=Resources(nodes=2))
    cluster.wait_until_gone(number)
    assert reasons(run) == (["failed"] * 3, "no_progress")
    said = "\n".join(describe(run))
    assert "given up: two restarts failed without progress" in said
    assert "last error, in attempt 2: rank 3, Exited with exit code 1\n" in said
    assert "rank 3 cannot go on: the disk is on fire" in said


def test_a_wrong_request_is_not_repeated(cluster, profile, start, stand_in, tmp_path):
    run = tmp_path / "wrong"
    cluster.wait_until_gone(start(profile(), run, *stand_in, str(run), "50", "--fault", "refuse"))
    assert reasons(run) == (["failed"], "refused")


def test_restarts_have_a_limit(cluster, profile, start, stand_in, tmp_path):
    run = tmp_path / "limited"
    command = [*stand_in, str(run), "50", "--fault", "crash"]
    cluster.wait_until_gone(start(profile(max_restarts=1), run, *command))
    assert reasons(run) == (["failed"] * 2, "max_restarts")


def test_finished_work_leaves_at_once(cluster, profile, start, stand_in, tmp_path):
    run = tmp_path / "finished"
    run.mkdir()
    (run / "done.json").write_text("{}")
    number = start(profile(), run, *stand_in, str(run), "50", "--fault", "crash")
    cluster.wait_until_gone(number)
    assert "ExitCode=0:0" in cluster("scontrol", "show", "job", number)
    assert reasons(run) == ([], None)


def test_without_the_right_to_requeue_a_chain_goes_on(cluster, profile, start, stand_in, tmp_path):
    """The first of the chain is stopped, the second finishes, the third finds the work done."""
    run = tmp_path / "chained"
    last = start(profile(requeue=False, max_restarts=2), run, *stand_in, str(run), "60")
    ids = read_record(run).ids
    assert len(ids) == 3
    assert ids[-1] == last
    cluster.wait_for(lambda: (run / "slurm/logs/0/rank0.log").exists(), "the first of the chain")
    cluster("scancel", "--batch", "--signal=USR2", ids[0])  # as before a time limit
    cluster.wait_until_gone(*ids)
    assert reasons(run) == (["stopped", "done"], None)
    codes = [re.search(r"ExitCode=(\S+)", cluster("scontrol", "show", "job", number))[1] for number in ids]
    assert codes == ["75:0", "0:0", "0:0"]


def test_ranks_that_do_not_stop_are_ended_in_time(cluster, profile, start, stand_in, tmp_path):
    """Deaf to the stop-file and to TERM: KILL comes before the limit would, and the job is still there to go on."""
    run = tmp_path / "deaf"
    number = start(profile(signal_lead=20, max_restarts=0), run, *stand_in, str(run), "5", "--fault", "deaf")
    cluster.wait_for(lambda: (run / "slurm/logs/0/rank0.log").exists(), "the ranks")
    cluster("scancel", "--batch", "--signal=USR2", number)
    cluster.wait_until_gone(number)
    assert reasons(run) == (["hung"], "max_restarts")


def test_preemption_without_time_to_save_is_no_failure(cluster, profile, start, stand_in, tmp_path):
    run = tmp_path / "cut"
    number = start(profile(), run, *stand_in, str(run), "5", "--fault", "deaf")
    cluster.wait_for(lambda: (run / "slurm/logs/0/rank0.log").exists(), "the ranks")
    cluster("scontrol", "update", "PartitionName=gpu", "GraceTime=0")
    try:
        cluster.preempt()
        cluster.wait_for(lambda: len(read_history(run / "slurm").attempts) == 2, "the second attempt")
    finally:
        cluster("scontrol", "update", "PartitionName=gpu", "GraceTime=60")
    assert read_history(run / "slurm").attempts[0].reason not in FAILURES
    assert read_record(run).ids == (number,)


def test_a_restart_takes_the_nodes_that_there_are(cluster, profile, start, stand_in, tmp_path):
    run, fewer = tmp_path / "fewer", Resources(nodes=2, min_nodes=1)
    number = start(profile(), run, *stand_in, str(run), "40", resources=fewer)
    cluster.wait_for(lambda: (run / "slurm/logs/0/rank3.log").exists(), "four ranks")
    for node in (cluster.nodes[0], cluster.nodes[2]):
        cluster("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    cluster("scancel", "--batch", "--signal=USR2", number)
    cluster.wait_until_gone(number)
    assert [attempt.nodes for attempt in read_history(run / "slurm").attempts][1:] == [cluster.nodes[1]]
    assert sorted(path.name for path in (run / "slurm/logs/latest").glob("rank*")) == ["rank0.log", "rank1.log"]
    assert reasons(run) == (["stopped", "done"], None)


def test_a_node_lost_while_stopping_is_no_failure(cluster, profile, start, stand_in, tmp_path):
    run = tmp_path / "cut"
    number = start(profile(), run, *stand_in, str(run), "5", "--fault", "deaf")
    cluster.wait_for(lambda: (run / "slurm/logs/0/rank0.log").exists(), "the ranks")
    cluster("scancel", "--batch", "--signal=USR2", number)
    cluster.wait_for(lambda: (run / "slurm" / "stop").exists(), "the stop-file")
    cluster.kill_node(read_history(run / "slurm").attempts[0].nodes)
    cluster.wait_for(lambda: len(read_history(run / "slurm").attempts) == 2, "the second attempt")
    assert read_history(run / "slurm").attempts[0].reason == "cut"


def test_cancel_saves_first_and_is_final(cluster, profile, start, stand_in, tmp_path):
    run = tmp_path / "cancelled"
    number = start(profile(), run, *stand_in, str(run), "5000")
    cluster.wait_for(lambda: (run / "slurm/logs/0/rank0.log").exists(), "the ranks")
    assert cancel(run) == [f"job {number} saves and stops (at once: --now)"]
    cluster.wait_until_gone(number)
    assert reasons(run) == (["stopped"], "cancelled")
    assert (run / "checkpoints" / "latest").exists()
    with pytest.raises(UserError, match="no job in the queue"):
        cancel(run)


def test_scancel_is_final_too(cluster, profile, start, stand_in, tmp_path):
    run = tmp_path / "scancelled"
    number = start(profile(), run, *stand_in, str(run), "5000")
    cluster.wait_for(lambda: (run / "slurm/logs/0/rank0.log").exists(), "the ranks")
    cluster("scancel", number)
    cluster.wait_until_gone(number)
    assert "JobState=CANCELLED" in cluster("scontrol", "show", "job", number)
    assert len(reasons(run)[0]) == 1


def test_what_waits_is_cancelled_and_submitted_again(cluster, profile, start, stand_in, tmp_path):
    run = tmp_path / "waiting"
    command = [*stand_in, str(run), "5"]
    number = start(profile(), run, *command, resources=Resources(nodes=3, tasks_per_node=1))
    other = start(profile(sbatch=("--hold",)), tmp_path / "held", *command)
    assert "pending (JobHeldUser)" in state_of(read_record(tmp_path / "held"))
    with pytest.raises(UserError, match=f"in the queue already.*{other}"):
        prepare(tmp_path / "held")
    assert cancel(tmp_path / "held") == [f"job {other} is cancelled"]
    assert "before it started" in state_of(read_record(tmp_path / "held"))
    cluster.wait_until_gone(number)
    again = start(profile(), tmp_path / "held", *command)
    cluster.wait_until_gone(again)
    assert (tmp_path / "held" / "slurm.1" / "job.json").exists()
    assert reasons(tmp_path / "held") == (["done"], None)


def test_what_sbatch_refuses_is_said_and_leaves_nothing(cluster, profile, start, stand_in, tmp_path):
    run = tmp_path / "refused"
    with pytest.raises(UserError, match="invalid partition"):
        start(profile(partition="nowhere"), run, *stand_in, str(run), "5")
    assert cluster.jobs() == {}
    cluster.wait_until_gone(start(profile(), run, *stand_in, str(run), "2"))  # mended, it goes
    assert not Path(f"{run}/slurm.1").exists()
