"""The parts of a checkpoint by themselves: the writer of tensors, its pace, what stays, and what `inspect` says."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from configs.errors import ConfigError
from configs.loader import validate
from pretrain import checkpoint, trainer
from pretrain.checkpoint import tensors
from pretrain.checkpoint.tensors import Pace, entries_of, write_tensors
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.cli import app
from pretrain.models.config import VisionConfig


def test_a_written_file_is_what_the_safetensors_library_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK", 40)  # so that a tensor goes in several pieces
    named = {
        "matrix": torch.randn(3, 5, 7), "number": torch.tensor(2.5), "nothing": torch.empty(0, 4),
        "transposed": torch.randn(6, 2).T, "rounded": torch.randn(9).bfloat16(), "steps": torch.tensor(7),
        "yes": torch.tensor([True, False]), "half": torch.randn(3).half(), "a/name": torch.arange(5, dtype=torch.int32),
    }  # fmt: skip
    path = tmp_path / "some.safetensors"
    digest = write_tensors(path, entries_of(named), iter(named.values()))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert read.keys() == named.keys()
    for name, tensor in named.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_a_tensor_is_asked_for_in_its_turn_and_has_to_be_what_was_announced(tmp_path):
    named = {"one": torch.ones(3), "two": torch.ones(2)}
    entries = entries_of(named)
    with pytest.raises(ValueError, match="shorter"):
        write_tensors(tmp_path / "short", entries, iter([torch.ones(3)]))
    with pytest.raises(AssertionError):
        write_tensors(tmp_path / "other", entries, iter([torch.ones(3), torch.ones(4)]))


def test_the_pace_is_that_of_all_bytes_together(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(tensors.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(tensors.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    pace = Pace(2.0)
    for size in (1_000_000, 500_000, 2_500_000):
        pace.passed(size)
        clock[0] += 0.01  # the writing itself
    assert clock[0] - 100 == pytest.approx(4_000_000 / 2e6, abs=0.02)
    free = Pace()
    free.passed(10**12)
    assert clock[0] < 103


@pytest.fixture
def saved(tmp_path: Path):
    """`saved(*steps, **metrics)`: the folder of checkpoints of a run that saved at those steps."""

    def make(*steps: int, **metrics: dict[int, float]) -> Path:
        model = checkpoint.ModelMeta(kind="vision", vision=VisionConfig(depth=1, width=16, patch_size=8))
        for step in steps:
            folder = tmp_path / "run" / "checkpoints" / f"step-{step:07d}"
            folder.mkdir(parents=True)
            numbers = {name: values[step] for name, values in metrics.items() if step in values}
            meta = checkpoint.Meta(
                step=step, task="stage1", config="x", ranks=1, zero_stage=0, model=model, versions={}, metrics=numbers
            )
            (folder / "meta.json").write_text(json.dumps(meta.model_dump(mode="json")))
        return tmp_path / "run" / "checkpoints"

    return make


@pytest.mark.parametrize(
    "policy, kept",
    [
        ({"keep": 2}, [70, 80]),
        ({"keep": 20}, [10, 20, 30, 40, 50, 60, 70, 80]),
        ({"keep": 1, "keep_every": 30}, [30, 60, 80]),
        ({"keep": 1, "keep_best": "loss", "best": "lowest"}, [50, 80]),
        ({"keep": 1, "keep_best": "r1"}, [40, 80]),  # two are as good: the newer
        ({"keep": 1, "keep_best": "nowhere"}, [80]),
        ({"keep": 2, "keep_every": 40, "keep_best": "loss", "best": "lowest"}, [40, 50, 70, 80]),
    ],
)
def test_what_stays(saved, policy, kept):
    loss = {10: 5.0, 20: 4.0, 30: float("nan"), 50: 1.0, 80: 1.5}
    root = saved(*range(10, 90, 10), loss=loss, r1={20: 0.5, 40: 0.5, 60: 0.2})
    checkpoint.prune(root, CheckpointConfig(**policy))
    assert [int(path.name[5:]) for path in checkpoint.checkpoints(root.parent)] == kept
    assert not list(root.glob(".*"))


def test_what_would_never_be_written_cannot_be_kept():
    with pytest.raises(ConfigError, match=r"keep_every is 250, but checkpoints come every 100 steps.*Use 200"):
        validate({"every_steps": 100, "keep_every": 250}, CheckpointConfig, "it")


@pytest.mark.usefixtures("alone")
def test_written_beside_training_it_is_what_it_was_at_its_step(runs, stage1_tree):
    """Training goes on over the tensors while they are written slowly; and an average is a part of it."""
    tree = copy.deepcopy(stage1_tree) | {"precision": "fp32", "steps": 6}
    tree["optim"] = {**tree["optim"], "ema_decay": 0.5}
    waiting = {"every_steps": 2, "keep": 9, "background": False}
    beside = {"every_steps": 2, "keep": 9, "write_mb_s": 2.0}
    for name, policy in (("waiting", waiting), ("beside", beside)):
        assert trainer.train(runs.config(tree | {"checkpoint": policy}, name)) == 0
    for step in (2, 4, 6):
        folders = [runs.folder / name / "checkpoints" / f"step-{step:07d}" for name in ("waiting", "beside")]
        files = [checkpoint.verify(folder).files for folder in folders]
        assert {"model.safetensors", "ema.safetensors", "optimizer-0000.safetensors"} < files[0].keys()
        assert all(files[0][name] == files[1][name] for name in files[0] if name.endswith(".safetensors"))


@pytest.mark.usefixtures("alone")
def test_inspect_says_what_is_there_and_convert_takes_the_average(runs, stage1_tree):
    tree = copy.deepcopy(stage1_tree) | {"precision": "fp32", "steps": 3}
    tree["optim"] = {**tree["optim"], "ema_decay": 0.5}
    assert trainer.train(runs.config(tree, "run")) == 0
    run = runs.folder / "run"

    def say(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["checkpoint", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    said = say("inspect", str(run), "--tensors")
    count = sum(tensor.numel() for tensor in checkpoint.load_weights(checkpoint.resolve(run)).values())
    assert f"exp_avg {count:,} of" in said
    assert f"{count:,} numbers (convert --ema writes them)" in said
    assert "for any number of ranks at any ZeRO stage" in said
    assert "exp_avg_sq/layers.0.mixer.A_log" in said
    assert "metrics    loss " in said

    average = load_file(checkpoint.resolve(run) / "ema.safetensors")
    plain, averaged = run / "plain.safetensors", run / "averaged.safetensors"
    for target, more in ((plain, ()), (averaged, ("--ema",))):
        say("convert", str(run), str(target), *more)
    name = "layers.0.mixer.A_log"
    assert torch.equal(load_file(averaged)[name], average[name])
    assert not torch.equal(load_file(plain)[name], average[name])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_a_save_holds_one_tensor_or_one_copy_of_the_state(runs, stage1_tree, live_bytes, monkeypatch, zero, background):
    peaks, real = [], checkpoint.Saver.save

    def measured(*arguments):
        with live_bytes() as live:
            real(*arguments)
        peaks.append(live.peak)

    monkeypatch.setattr(checkpoint.Saver, "save", measured)
    tree = copy.deepcopy(stage1_tree) | {"steps": 3, "deepspeed": zero, "checkpoint": {"background": background}}
    assert trainer.train(runs.config(tree, "run")) == 0
    folder = checkpoint.resolve(runs.folder / "run")
    files = [load_file(folder / name).values() for name in ("model.safetensors", "optimizer-0000.safetensors")]
    sizes = [tensor.nbytes for tensors in files for tensor in tensors]
    assert (
        sum(sizes) / 2 < peaks[0] <= (2 if background else 1) * sum(sizes) + 2 * max(sizes)
    )  # the state itself counts
