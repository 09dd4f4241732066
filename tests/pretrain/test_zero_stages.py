"""Every ZeRO stage, on one and two ranks, against ZeRO 0 on one: stage 2 over mixed steps of clips and images."""

import copy

import pytest
from safetensors.torch import load_file

from pretrain.models.joint import TEMPERATURE_MAX
from tests.pretrain.on_ranks import Job, said, train_all

LAYOUTS = [(zero, ranks) for ranks in (1, 2) for zero in ("zero0", "zero1", "zero2", "zero3")]
STEPS = 6

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, runs_in, stage2_tree):
    """name -> (log, final weights and their average) of the same run under every stage, on one rank and on two."""
    runs = runs_in(tmp_path_factory.mktemp("zero"))
    tree = copy.deepcopy(stage2_tree) | {"precision": "fp32", "steps": STEPS, "checkpoint": {}, "micro_batch": 2}
    tree["losses"] = {"matching": {"negatives": "global"}, "mlm": {"every": 3}}
    tree["optim"] |= {
        "ema_decay": 0.5,
        "layer_decay": 0.9,
        "modules": {"text_encoder": {"lr": 1e-3}, "temp": {"lr": 0.2}},
    }
    train_all(runs, [Job(f"{zero}-{ranks}", ranks, tree | {"deepspeed": zero}) for zero, ranks in LAYOUTS])
    out = {}
    for zero, ranks in LAYOUTS:
        name = f"{zero}-{ranks}"
        assert said(runs, name) == [{"code": 0, "error": None}] * ranks
        folder = runs.folder / name / "checkpoints" / f"step-{STEPS:07d}"
        average = {f"average of {key}": value for key, value in load_file(folder / "ema.safetensors").items()}
        out[name] = runs.log(name), load_file(folder / "model.safetensors") | average
    return out


@pytest.mark.parametrize(("zero", "ranks"), LAYOUTS[1:])
def test_it_is_the_run_of_one_rank_without_zero(trained, zero, ranks):
    expected_log, expected = trained["zero0-1"]
    log, weights = trained[f"{zero}-{ranks}"]
    assert {line["losses"].keys() == {"contrastive", "matching", "mlm", "alignment"} for line in log} == {True}
    for line, wanted in zip(log, expected_log, strict=True):
        assert line["losses"] == pytest.approx(wanted["losses"], rel=2e-4), line["step"]
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3), line["step"]
    assert weights.keys() == expected.keys()
    assert expected["temp"].item() == pytest.approx(TEMPERATURE_MAX)  # an update stays within the bounds
    for name, tensor in weights.items():
        off = float((tensor - expected[name]).norm())
        assert off <= 2e-3 * float(expected[name].norm()) + 1e-6, f"{name}: {off}"
