"""A run of 4 ranks x 1 micro-batch goes on as 2 x 2 and as 1 x 4 with its config untouched, as if it were one run."""

import copy

import pytest
from safetensors.torch import load_file

from tests.pretrain.on_ranks import Job, said, train_all

STEPS = 6
KINDS = {
    "stage1": {},
    "global": {"matching": {"negatives": "global"}, "mlm": {"every": 3}},
    "local": {"matching": {"negatives": "local"}},
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def resized(tmp_path_factory, runs_in, stage1_tree, stage2_tree):
    """Each kind of run twice: whole, and begun on 4 ranks, gone on with on 2, finished on 1."""
    runs = runs_in(tmp_path_factory.mktemp("layouts"))
    jobs = []
    for kind, losses in KINDS.items():
        tree = copy.deepcopy(stage1_tree if kind == "stage1" else stage2_tree)
        tree |= {"precision": "fp32", "steps": STEPS, "checkpoint": {}, "micro_batch": 2, "losses": losses}
        tree["data"]["batch"] = 8
        tree["optim"]["ema_decay"] = 0.5
        jobs.append(Job(f"{kind}-whole", 1, tree if kind == "local" else tree | {"micro_batch": 8}))
        jobs += [Job(f"{kind}-resized", ranks, tree, "stop_after_two_steps") for ranks in (4, 2)]
        jobs.append(Job(f"{kind}-resized", 1, tree))
    train_all(runs, jobs)
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_losses_gradients_weights_and_average_are_those_of_the_whole_batch(resized, kind):
    whole, other = resized.log(f"{kind}-whole"), resized.log(f"{kind}-resized")
    assert said(resized, f"{kind}-resized")[0] == {"code": 0, "error": None}
    assert [line["step"] for line in other] == list(range(1, STEPS + 1))
    assert [round(line["clips_per_s"] / line["clips_per_s_device"]) for line in other] == [4, 4, 2, 2, 1, 1]
    for line, wanted in zip(other, whole, strict=True):
        assert line["losses"] == pytest.approx(wanted["losses"], rel=2e-4)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    for file in ("model.safetensors", "ema.safetensors"):
        there, here = (
            load_file(resized.folder / f"{kind}-{name}" / "checkpoints" / f"step-{STEPS:07d}" / file)
            for name in ("whole", "resized")
        )
        assert there.keys() == here.keys()
        for name, tensor in here.items():
            off = float((tensor - there[name]).norm())
            assert off <= 2e-3 * float(there[name].norm()) + 1e-6, f"{file} {name}: {off}"
