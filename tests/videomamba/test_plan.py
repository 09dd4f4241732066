"""`videomamba plan`: its estimates against measured steps, what it prints, and what it says of too large a run."""

import json

import pytest
import yaml

from configs.errors import ConfigError
from configs.loader import validate
from pretrain.config import PretrainConfig
from pretrain.cost import devices
from pretrain.cost.dry_run import DryRun
from pretrain.cost.memory import memory, network_bytes
from pretrain.cost.plan import Asked, make_plan
from videomamba.bench_plan import SHAPES, compare
from videomamba.memory import alone

P = 1_000_000
RUN = DryRun(parameters=P, trained=P, weights=4 * P, teacher=0, gradients=0, activations=10 * P, whole_gradients=4 * P)


@pytest.fixture
def tree(tmp_path):
    return {
        "task": "stage1",
        "out": str(tmp_path / "run"),
        "steps": 100,
        "vision": {"depth": 2, "width": 64, "frames": 4, "image_size": 112},
        "teacher": {"source": "ViT-S-16-alt", "image_size": 112},
        "mask": {"kind": "tube", "ratio": 0.5},
        "data": {
            "train": [{"path": "elsewhere"}], "batch": 64, "image_size": 112, "frames": {"count": 4},
        },
    }  # fmt: skip


def config(tree):
    return validate(tree, PretrainConfig, "tree")


@pytest.fixture(scope="module")
def compared():
    """Every shape planned and measured, each in a process of its own: what one has allocated the next would find."""
    return dict(zip(SHAPES, alone(compare, [(shape,) for shape in SHAPES.values()], ["pretrain.engine"]), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", SHAPES)
def test_estimates_are_within_15_percent_of_a_measured_step(compared, name):
    """Three of the shapes were held out: `held_out` in bench_plan.py says which."""
    found = compared[name]
    assert found.flops == pytest.approx(found.flops_measured, rel=0.15)
    assert found.memory == pytest.approx(found.memory_measured, rel=0.15)


def test_enough_shapes_were_held_out():
    assert len(SHAPES) >= 6
    assert sum(shape.held_out for shape in SHAPES.values()) >= 3


def test_zero_cuts_what_it_says(tree):
    """Weights, float32 copy, optimizer, gradients on 4 ranks, stage by stage, with 2 micro-batches a step."""
    expected = {
        "zero0": {"weights": 4, "optimizer": 8, "gradients": 4},
        "zero1": {"weights": 4, "float32 copy of ZeRO": 1, "optimizer": 2, "gradients": 4},
        "zero2": {"weights": 4, "float32 copy of ZeRO": 1, "optimizer": 2, "gradients": 1},
        "zero3": {"weights": 1, "float32 copy of ZeRO": 1, "optimizer": 2, "gradients": 1},
    }
    for name, parts in expected.items():
        found = memory(config(tree | {"deepspeed": name}), RUN, 0, 4, 8, 2, gpu=False).parts
        assert {part: found.get(part) for part in parts} == {part: size * P for part, size in parts.items()}, name
        assert ("float32 copy of ZeRO" in found) == (name != "zero0")


def test_network_bytes_by_stage(tree):
    """In units of 4 P bytes: all-reduce twice; reduce and gather; gather twice for each of 2 micro-batches."""
    sent = {
        name: {
            part: size / (4 * P * 3 / 4)
            for part, size in network_bytes(config(tree | {"deepspeed": name}), RUN, 4, 16, 2).items()
        }
        for name in ("zero0", "zero1", "zero2", "zero3")
    }
    assert sent["zero0"] == {"gradients": 2}
    assert sent["zero1"] == {"gradients": 1, "weights": 1}
    assert sent["zero2"] == {"gradients": 2, "weights": 1}
    assert sent["zero3"] == {"gradients": 2, "weights": 4}
    assert network_bytes(config(tree), RUN, 1, 64, 1) == {}


def test_the_more_particular_device_comes_first():
    assert devices.by_full_name("NVIDIA H100 80GB HBM3") is devices.DEVICES["h100"]
    assert devices.by_full_name("NVIDIA H100 PCIe") is devices.DEVICES["h100-pcie"]
    assert devices.by_full_name("NVIDIA H200") is devices.DEVICES["h200"]
    assert devices.by_full_name("NVIDIA A100-SXM4-40GB") is devices.DEVICES["a100-40gb"]
    assert devices.by_full_name("NVIDIA A100-SXM4-80GB") is devices.DEVICES["a100"]
    assert devices.by_full_name("NVIDIA A10") is devices.DEVICES["a10"]
    assert devices.by_full_name("Some GPU") is None
    with pytest.raises(ConfigError, match="no GPU 'h20'") as error:
        devices.device_of("h20")
    assert "'h200'" in error.value.cure


def test_time_follows_from_the_stated_utilisation(tree):
    half, whole = (make_plan(config(tree), Asked(8, devices.device_of("a100"), share)) for share in (0.25, 0.5))
    assert half.step_seconds == pytest.approx(2 * whole.step_seconds)
    done = sum(part.model + part.beside for part in whole.flops["video"])
    assert whole.step_seconds == pytest.approx(done / (0.5 * 312e12 * 8))
    assert whole.days == pytest.approx(100 * whole.step_seconds / 86400)
    assert (whole.micro_batch, whole.micro_batches) == (8, 1)


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_would(tree, tmp_path, videomamba):
    tree["vision"] |= {"image_size": 224, "frames": 16, "depth": 4}
    tree["teacher"]["image_size"] = 224
    tree["data"] |= {"image_size": 224, "frames": {"count": 16}, "batch": 1024}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    done = videomamba("plan", str(path), "--gpu", "a10", "--json")
    assert done.returncode == 1, done.stderr
    plan = json.loads(done.stdout)
    assert not plan["fits"]
    assert plan["memory_bytes"] == sum(plan["memory"]["parts"].values())
    advice = " ".join(plan["notes"])
    assert "does not fit" in advice
    micro = int(advice.partition("micro_batch=")[2].split()[0])
    again = videomamba("plan", str(path), f"micro_batch={micro}", "--gpu", "a10")
    assert again.returncode == 0, again.stdout
    assert "elsewhere is not on this machine" in again.stdout


def test_what_cannot_be_planned_is_refused(tree):
    device = devices.device_of("h100")
    with pytest.raises(ConfigError, match="do not divide by 7 ranks"):
        make_plan(config(tree), Asked(7, device, 0.3))
    with pytest.raises(ConfigError, match="epochs long, and elsewhere is not here"):
        make_plan(config(tree | {"steps": 0, "epochs": 3}), Asked(8, device, 0.3))
    tree["teacher"] = {"source": "hf-hub:somebody/something"}
    with pytest.raises(Exception, match="neither a folder that open_clip wrote nor a model"):
        make_plan(config(tree), Asked(8, device, 0.3))
