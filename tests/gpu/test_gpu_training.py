"""Steps of DeepSpeed on the GPU give the losses that plain PyTorch gives on the CPU."""

import copy

import pytest


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 5e-2)])
def test_steps_of_deepspeed(runs, stage1_tree, device, precision, tolerance):
    tree = copy.deepcopy(stage1_tree) | {"steps": 3, "checkpoint": {}}
    for name, options, environment in (
        ("plain", {"device": "cpu", "precision": "fp32"}, {"VIDEOMAMBA_OPS": "reference"}),
        ("ours", {"device": device, "precision": precision}, {"VIDEOMAMBA_OPS": "auto"}),
    ):
        done = runs.run(runs.write(tree | options, name), **environment)
        assert done.returncode == 0, done.stderr
    plain, ours = ([line["loss"] for line in runs.log(name)] for name in ("plain", "ours"))
    assert len(plain) == 3
    assert ours == pytest.approx(plain, rel=tolerance)
