"""The trainer against a bare loop, and its promises: micro-batches, ZeRO, what is not finite, one folder one run."""

import copy
import json
import time

import pytest
import torch

from configs.errors import UserError
from data_pipeline.loader import TrainLoader
from pretrain import trainer
from pretrain.groups import parameter_groups
from pretrain.schedule import warmup_cosine
from pretrain.tasks import Stage1, build_task

pytestmark = pytest.mark.usefixtures("alone")


def losses(runs, name):
    return [line["loss"] for line in runs.log(name)]


@pytest.fixture
def exact(stage1_tree):
    """Stage 1 in float32, three steps."""
    return copy.deepcopy(stage1_tree) | {"precision": "fp32", "steps": 3, "checkpoint": {}}


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_equals_a_bare_pytorch_loop(runs, exact, clip_norm):
    exact["optim"]["clip_norm"] = clip_norm
    config = runs.config(exact, "ours")
    assert trainer.train(config) == 0

    task = build_task(config, torch.device("cpu"))
    groups = parameter_groups(task.model.named_parameters(), config.optim)
    bare = torch.optim.AdamW([{k: g[k] for k in ("params", "lr", "weight_decay")} for g in groups])
    expected, norms = [], []
    for step, batch in enumerate(TrainLoader(config.data, config.seed, 0, 1, 0, config.steps)):
        for group in bare.param_groups:
            group["lr"] = config.optim.lr * warmup_cosine(step, config.steps, config.optim.warmup_steps, 0.0)
        loss = sum(task.losses(batch).values())
        bare.zero_grad()
        loss.backward()
        for parameter in task.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(float(torch.nn.utils.clip_grad_norm_(task.model.parameters(), clip_norm or float("inf"))))
        bare.step()
        expected.append(loss.item())
    assert min(norms) > 1.0  # or the clipping would not be tried
    assert losses(runs, "ours") == pytest.approx(expected, rel=1e-5)
    assert [line["grad_norm"] for line in runs.log("ours")] == pytest.approx(norms, rel=1e-4)


def test_micro_batches_give_the_same_run(runs, exact):
    assert trainer.train(runs.config(exact, "whole")) == 0
    assert trainer.train(runs.config(exact | {"micro_batch": 2}, "cut")) == 0
    assert losses(runs, "cut") == pytest.approx(losses(runs, "whole"), rel=1e-5)


@pytest.mark.parametrize("zero", ["zero0", "zero2"])
def test_micro_batches_of_stage_2_see_the_whole_batch(runs, stage2_tree, zero):
    """All four losses, negatives from everywhere: one graph, or one a micro-batch, over clips and images."""
    tree = copy.deepcopy(stage2_tree) | {"precision": "fp32", "steps": 3, "checkpoint": {}, "deepspeed": zero}
    tree["losses"] = {"matching": {"negatives": "global"}}
    assert trainer.train(runs.config(tree, "whole")) == 0
    assert trainer.train(runs.config(tree | {"micro_batch": 1}, "cut")) == 0
    for cut, whole in zip(runs.log("cut"), runs.log("whole"), strict=True):
        assert set(cut["losses"]) == {"contrastive", "matching", "mlm", "alignment"}
        assert cut["losses"] == pytest.approx(whole["losses"], rel=1e-4)
        assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("zero", ["zero1", "zero2"])
def test_zero_stages_agree_and_go_on(runs, exact, zero):
    assert trainer.train(runs.config(exact, "zero0")) == 0
    tree = exact | {"deepspeed": zero, "checkpoint": {"every_steps": 2, "keep": 3}}
    config = runs.config(tree, zero)
    assert trainer.train(config) == 0
    assert losses(runs, zero) == pytest.approx(losses(runs, "zero0"), rel=1e-5)
    norms = [[line["grad_norm"] for line in runs.log(name)] for name in (zero, "zero0")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    straight = losses(runs, zero)
    folder = runs.folder / zero
    (folder / "done.json").unlink()
    for path in (folder / "checkpoints" / "step-0000003").rglob("*"):
        if path.is_file():
            path.unlink()  # damaged: the run goes back to step 2
    assert trainer.train(config) == 0
    assert losses(runs, zero) == straight


class PoisonedLoss(Stage1):
    """Stage 1 whose loss is not a number at step 2."""

    def losses(self, batch, known=None):
        made = super().losses(batch)
        return {name: loss * (float("nan") if batch.step == 2 else 1) for name, loss in made.items()}


class PoisonedGradient(Stage1):
    """Stage 1 whose loss is finite at step 2, and its gradient is not."""

    def losses(self, batch, known=None):
        made = super().losses(batch)
        if batch.step == 2:
            return {name: loss + (loss - loss.detach()).sqrt() for name, loss in made.items()}
        return made


@pytest.mark.parametrize(
    "poisoned, said",
    [
        (PoisonedLoss, "Step 2 is not finite .alignment and gradient norm.* the loss alignment, of outputs that are"),
        (PoisonedGradient, "Step 2 is not finite .gradient norm.* gradient of module clip_decoder.0.norm's output"),
    ],
)
def test_what_is_not_finite_stops_before_the_update(runs, exact, monkeypatch, poisoned, said):
    made = []
    monkeypatch.setattr(
        trainer, "build_task", lambda config, device, _: made.append(poisoned(config, device)) or made[0]
    )
    config = runs.config(exact | {"checkpoint": {"every_steps": 2}}, "bad")
    with pytest.raises(UserError, match=said) as error:
        trainer.train(config)
    assert "video0" in error.value.cause  # a sample's key
    assert error.value.exit_code == 1
    assert all(bool(p.isfinite().all()) for p in made[0].model.parameters())
    assert (runs.folder / "bad" / "checkpoints" / "latest").read_text() == "step-0000002\n"
    assert not (runs.folder / "bad" / "done.json").exists()


def test_a_finished_run_does_nothing_again(runs, exact, caplog):
    config = runs.config(exact, "once")
    assert trainer.train(config) == 0
    before = (runs.folder / "once" / "log.jsonl").read_bytes()
    with caplog.at_level("INFO"):
        assert trainer.train(config) == 0
    assert "is finished, nothing to do" in caplog.text
    assert (runs.folder / "once" / "log.jsonl").read_bytes() == before
    other = runs.config(exact | {"seed": 5}, "once")
    with pytest.raises(UserError, match="seed is 0 there and 5 here"):
        trainer.train(other)
    assert trainer.train(other, fresh=True) == 0
    assert json.loads((runs.folder / "once" / "done.json").read_text())["step"] == 3
    assert (runs.folder / "once" / "log.jsonl").read_bytes() != before


def test_a_line_of_the_log(runs, exact):
    exact["log"] = {"every_steps": 2, "tensorboard": True}
    exact["optim"] = {"method": "muon", "lr": 1e-3, "muon_lr": 0.02}
    assert trainer.train(runs.config(exact, "log")) == 0
    lines = runs.log("log")
    assert [line["step"] for line in lines] == [2, 3]
    last = lines[-1]
    assert last["loss"] == pytest.approx(sum(last["losses"].values()))
    assert last["lr"]["muon"] == pytest.approx(20 * last["lr"]["decay"])
    assert 0 <= last["data_wait"] <= 1
    assert last["clips_per_s"] == pytest.approx(4 / last["step_s"], rel=1e-3)
    assert last["eta_s"] == 0
    assert last["memory_mb"] > 50
    assert list((runs.folder / "log" / "tensorboard").glob("events.*"))


class SlowLoader(TrainLoader):
    """Every batch comes a tenth of a second late."""

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.1)
            yield batch


def test_every_line_tells_how_long_data_was_waited_for(runs, exact, monkeypatch):
    monkeypatch.setattr(trainer, "TrainLoader", SlowLoader)
    exact["log"] = {"every_steps": 2, "tensorboard": False}
    assert trainer.train(runs.config(exact, "slow")) == 0
    for line in runs.log("slow"):
        assert 0.1 <= line["data_wait"] * line["step_s"] <= line["step_s"]
