"""Every ZeRO stage, on one and two ranks, against ZeRO 0 on one: stage 2 over mixed steps of clips and images."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
LAYOUTS = [(zero, ranks) for ranks in (1, 2) for zero in ("zero0", "zero1", "zero2", "zero3")]
STEPS = 8

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, runs_in, stage2_tree):
    """name -> (lines of the log, final weights) of the same run under every stage, on one rank and on two."""
    runs = runs_in(tmp_path_factory.mktemp("zero"))
    tree = copy.deepcopy(stage2_tree) | {"precision": "fp32", "steps": STEPS, "checkpoint": {}, "micro_batch": 2}
    tree["losses"] = {"matching": {"negatives": "global"}, "mlm": {"every": 3}}
    tree["optim"] |= {"ema_decay": 0.5, "layer_decay": 0.9, "modules": {"text_encoder": {"lr": 1e-3}}}
    jobs = [
        {"config": str(runs.write(tree | {"deepspeed": zero}, f"{zero}-{ranks}")), "ranks": ranks}
        for zero, ranks in LAYOUTS
    ]
    (runs.folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-P", str(HERE / "on_ranks.py"), str(runs.folder / "jobs.json")],
        env=runs.environment(), capture_output=True, text=True, timeout=380, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    out = {}
    for zero, ranks in LAYOUTS:
        name = f"{zero}-{ranks}"
        for said in (runs.folder / name).glob("said.*.json"):
            assert json.loads(said.read_text()) == {"code": 0, "error": None}, said
        weights = runs.folder / name / "checkpoints" / f"step-{STEPS:07d}" / "model.safetensors"
        out[name] = runs.log(name), load_file(weights)
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
    for name, tensor in weights.items():
        off = float((tensor - expected[name]).norm())
        assert off <= 2e-3 * float(expected[name].norm()) + 1e-6, f"{name}: {off}"
