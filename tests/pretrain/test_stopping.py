"""A run that is asked to stop: by which means, when, what it leaves, and that it goes on as if never asked."""

import copy
import json
import os
import signal
from pathlib import Path

import pytest

from pretrain import checkpoint, stopping, trainer

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def tree(stage1_tree):
    """Stage 1 in float32, four steps, saved at the second and the last."""
    return copy.deepcopy(stage1_tree) | {"precision": "fp32", "steps": 4, "checkpoint": {"every_steps": 2, "keep": 9}}


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file by which a run says that it has to be started again."""
    monkeypatch.setenv(stopping.UNFINISHED_FILE, str(tmp_path / "batch" / "unfinished"))
    return tmp_path / "batch" / "unfinished"


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, act)` has the next run call `act` while it takes its step n (from 0)."""
    real = trainer.build_task

    def arrange(step, act):
        def build(*arguments):
            task = real(*arguments)
            inner = task.losses

            def losses(batch, known=None):
                if batch.step == step:
                    act()
                return inner(batch, known)

            task.losses = losses
            monkeypatch.setattr(trainer, "build_task", real)
            return task

        monkeypatch.setattr(trainer, "build_task", build)

    return arrange


def losses(runs, name="run"):
    return [line["loss"] for line in runs.log(name)]


@pytest.mark.parametrize("means", ["TERM", "USR2", "INT", "file", "file elsewhere"])
def test_each_means_saves_at_the_edge_and_the_next_start_goes_on(
    runs, tree, unfinished, at_step, monkeypatch, tmp_path, means
):
    assert trainer.train(runs.config(tree, "straight")) == 0
    config, own, elsewhere = runs.config(tree, "run"), runs.folder / "run" / "stop", tmp_path / "stop all"
    monkeypatch.setenv(stopping.STOP_FILE, str(elsewhere))
    acts = {"file": own.touch, "file elsewhere": elsewhere.touch}
    at_step(2, acts.get(means) or (lambda: os.kill(os.getpid(), getattr(signal, f"SIG{means}"))))
    assert trainer.train(config) == (130 if means == "INT" else 0)
    assert losses(runs) == losses(runs, "straight")[:3]
    assert (runs.folder / "run" / "checkpoints" / "latest").read_text() == "step-0000003\n"
    assert not (runs.folder / "run" / "done.json").exists()
    assert not own.exists()
    assert elsewhere.exists() == (means == "file elsewhere")  # it belongs to whoever set the variable
    assert unfinished.exists() == (means != "INT")
    if unfinished.exists():
        assert json.loads(unfinished.read_text()) == {"out": str(runs.folder / "run"), "step": 3, "steps": 4}

    elsewhere.unlink(missing_ok=True)
    assert trainer.train(config) == 0
    assert losses(runs) == losses(runs, "straight")


@pytest.mark.parametrize("moment", ["build_task", "resume", "save"])
def test_a_signal_at_an_awkward_moment_waits_for_the_edge(runs, tree, unfinished, monkeypatch, moment):
    """Before the first step, while a checkpoint is read, while one is written (which is not cut short)."""
    config, real = runs.config(tree, "run"), getattr(trainer, moment)

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)
        return real(*arguments)

    monkeypatch.setattr(trainer, moment, interrupted)
    assert trainer.train(config) == 0
    taken = 3 if moment == "save" else 0  # the save of step 2 is over before the edge of step 3
    assert len(runs.log("run")) == taken
    assert json.loads(unfinished.read_text())["step"] == taken
    monkeypatch.setattr(trainer, moment, real)
    assert trainer.train(config) == 0
    assert [line["step"] for line in runs.log("run")] == [1, 2, 3, 4]


def test_a_run_that_is_asked_to_stop_does_not_keep_to_its_pace(runs, tree, at_step):
    """At one kB a second, the checkpoint under way and the last one would take a quarter of an hour."""
    config = runs.config(tree | {"checkpoint": {"every_steps": 2, "keep": 9, "write_mb_s": 0.001}}, "run")
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert trainer.train(config) == 0
    for step in (2, 3):
        checkpoint.verify(runs.folder / "run" / "checkpoints" / f"step-{step:07d}")


def test_asked_to_stop_in_its_last_step_a_run_is_finished(runs, tree, unfinished, at_step):
    config, own = runs.config(tree, "run"), runs.folder / "run" / "stop"

    def ask() -> None:
        own.touch()
        os.kill(os.getpid(), signal.SIGUSR2)

    at_step(3, ask)
    assert trainer.train(config) == 0
    assert (runs.folder / "run" / "done.json").exists()
    assert not unfinished.exists()
    assert not own.exists()


def test_a_stop_file_put_there_between_two_starts_is_obeyed_once(runs, tree, unfinished):
    config, own = runs.config(tree, "run"), runs.folder / "run" / "stop"
    own.parent.mkdir()
    own.touch()
    assert trainer.train(config) == 0
    assert runs.log("run") == []
    assert unfinished.exists()
    assert trainer.train(config) == 0
    assert len(runs.log("run")) == 4


def test_a_ctrl_c_that_comes_twice_at_once_is_one_and_a_later_one_stops(monkeypatch):
    clock = [10.0]
    with stopping.listening() as heard:
        monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
        for _ in range(2):  # from the terminal, and passed on by the launcher
            signal.raise_signal(signal.SIGINT)
        assert heard.interrupted
        clock[0] += stopping.ECHO + 0.1
        signal.raise_signal(signal.SIGTERM)  # nothing but a Ctrl-C is impatient
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
