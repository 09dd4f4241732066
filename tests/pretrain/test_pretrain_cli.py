"""`videomamba pretrain` as a user types it: killed, stopped, resumed, on one rank and on two."""

import copy
import json
import signal

import pytest
from typer.testing import CliRunner

from pretrain.cli import app


@pytest.fixture(scope="module")
def tree(stage1_tree):
    """Stage 1 in float32, twelve steps, saved at 4, 8 and 12."""
    return copy.deepcopy(stage1_tree) | {"precision": "fp32", "steps": 12, "checkpoint": {"every_steps": 4, "keep": 3}}


@pytest.fixture(scope="module")
def straight(tree, runs_in, tmp_path_factory):
    """The uninterrupted run of one rank, in a folder `one`."""
    runs = runs_in(tmp_path_factory.mktemp("straight"))
    done = runs.run(runs.write(tree, "one"))
    assert done.returncode == 0, done.stderr
    return runs


def weights(runs, name: str) -> str:
    meta = json.loads((runs.folder / name / "checkpoints" / "step-0000012" / "meta.json").read_text())
    return meta["files"]["model.safetensors"]


def numbers(lines):
    return [[line[key] for key in ("step", "losses", "grad_norm", "lr")] for line in lines]


def test_killed_and_resumed_equals_uninterrupted_to_the_last_digit(runs, tree, straight):
    config = runs.write(tree, "killed")
    runs.kill_when(runs.start(config), runs.folder / "killed" / "checkpoints" / "latest", signal.SIGKILL)
    folder = runs.folder / "killed"
    assert not (folder / "done.json").exists()  # it was killed in the middle
    resumed = runs.run(config)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from" in resumed.stderr
    assert numbers(runs.log("killed")) == numbers(straight.log("one"))
    assert weights(runs, "killed") == weights(straight, "one")
    again = runs.run(config)
    assert again.returncode == 0
    assert "is finished (--fresh begins again)" in again.stderr


@pytest.mark.slow
def test_two_ranks_equal_one_and_stop_by_a_signal(runs, tree, straight):
    config = runs.write(tree, "two")
    latest = runs.folder / "two" / "checkpoints" / "latest"
    unfinished = runs.folder / "unfinished"
    process = runs.start(config, "--ranks", "2", VIDEOMAMBA_UNFINISHED_FILE=str(unfinished))
    runs.kill_when(process, latest, signal.SIGUSR2)
    assert process.returncode == 0
    assert json.loads(unfinished.read_text())["steps"] == 12
    stopped = runs.log("two")[-1]["step"]
    assert 4 <= stopped < 12
    assert latest.read_text() == f"step-{stopped:07d}\n"  # what was done is saved, whatever checkpoint.every_steps
    resumed = runs.run(config, "--ranks", "2", VIDEOMAMBA_UNFINISHED_FILE=str(unfinished))
    assert resumed.returncode == 0, resumed.stderr
    assert not unfinished.exists()
    assert "Traceback" not in resumed.stderr
    ours, theirs = runs.log("two"), straight.log("one")
    assert [line["step"] for line in ours] == list(range(1, 13))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=1e-5)
    assert [line["grad_norm"] for line in ours] == pytest.approx([line["grad_norm"] for line in theirs], rel=1e-3)
    meta = json.loads((runs.folder / "two" / "checkpoints" / "step-0000012" / "meta.json").read_text())
    assert meta["ranks"] == 2
    assert meta["counters"] == {"seen": 48, "lost": {}, "bad": []}


@pytest.mark.slow
def test_stage_2_on_two_ranks_equals_one(runs, stage2_tree, straight):
    tree = copy.deepcopy(stage2_tree) | {
        "precision": "fp32",
        "steps": 4,
        "checkpoint": {},
        "init": str(straight.folder / "one"),
        "losses": {"matching": {"negatives": "global"}},
        "deepspeed": "zero1",
    }
    starts = [runs.start(runs.write(tree, name), *ranks) for name, ranks in (("one", ()), ("two", ("--ranks", "2")))]
    for process in starts:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    one, two = runs.log("one"), runs.log("two")
    assert set(one[0]["losses"]) == {"contrastive", "matching", "mlm", "alignment"}
    for ours, theirs in zip(two, one, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=2e-4)
    assert two[0]["losses"] == pytest.approx(one[0]["losses"], abs=1e-5)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-4)


def test_wrong_requests_are_refused_at_once(runs, tree):
    config = runs.write(tree, "wrong")
    for arguments, cause in (
        (("optim.lrr=1",), "unknown key 'optim.lrr'"),
        (("--ranks", "3"), "data.batch: 4 samples do not divide by 3 ranks"),
        (("data.train.0.path=nowhere",), "There is no folder of shards nowhere"),
    ):
        refused = runs.run(config, *arguments)
        assert refused.returncode == 2
        assert cause in refused.stderr
        assert "cure:" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert not (runs.folder / "wrong").exists()


def test_the_config_is_shown_and_the_run_checked_without_starting_it(runs, tree, straight):
    def say(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    config = str(runs.write(tree, "shown"))
    assert "lr: 0.0005" in say("pretrain", config, "optim.lr=5e-4", "--print-config")
    checked = say("pretrain", config, "--check", "--ranks", "2")
    assert "24 videos" in checked
    assert "this run can start" in checked
    assert not (runs.folder / "shown").exists()
    inspected = say("checkpoint", "inspect", str(straight.folder / "one"), "--tensors")
    assert "stage1, step 12" in inspected
    assert "layers.0.mixer.in_proj.weight" in inspected
