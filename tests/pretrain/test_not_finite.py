"""A NaN in a batch, in a gradient and in a weight, at every ZeRO stage on one rank and on two.

Each run skips the first two steps that are not finite and stops at the third kind, for which skipping is no cure.
"""

import copy
import json

import pytest

from tests.pretrain import plants
from tests.pretrain.on_ranks import Job, said, train_all

LAYOUTS = [(zero, ranks) for ranks in (1, 2) for zero in ("zero0", "zero1", "zero2", "zero3")]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, runs_in, stage1_tree):
    """All runs, done."""
    runs = runs_in(tmp_path_factory.mktemp("poisoned"))
    tree = copy.deepcopy(stage1_tree) | {"precision": "fp32", "checkpoint": {}, "nonfinite": "skip", "max_skips": 1}
    tree["mask"] = {"kind": "tube", "ratio": 0.5}
    tree["optim"]["ema_decay"] = 0.9
    train_all(
        runs, [Job(f"{zero}-{ranks}", ranks, tree | {"deepspeed": zero}, "not_finite") for zero, ranks in LAYOUTS]
    )
    return runs


@pytest.mark.parametrize(("zero", "ranks"), LAYOUTS)
def test_it_is_named_and_skipped_and_at_last_stops_the_run(poisoned, zero, ranks):
    folder = poisoned.folder / f"{zero}-{ranks}"
    last = ranks - 1
    refused = [json.loads(line) for line in (folder / f"skipped.{last}.jsonl").read_text().splitlines()]
    keys = {line["step"]: line["keys"] for line in refused}
    assert list(keys) == [plants.BATCH, plants.GRADIENT, plants.WEIGHT]
    assert all(line["untouched"] for line in refused)

    in_batch, in_gradient, in_weight = (folder / "warnings.0.log").read_text().splitlines()
    assert f"Step {plants.BATCH} is not finite" in in_batch
    assert f"Replayed on rank {last}, it began with the output of module patch_embed" in in_batch
    assert f"samples {keys[plants.BATCH][1]}. The step was skipped (1 so far)." in in_batch  # that sample alone

    assert f"Step {plants.GRADIENT} is not finite (gradient norm)" in in_gradient
    assert f"on rank {last}, it began with the gradient of parameter {plants.POISONED}" in in_gradient
    assert f"(module layers.1.norm); samples {', '.join(keys[plants.GRADIENT])}." in in_gradient

    assert f"on rank {last}, it began with the weight {plants.POISONED} (module layers.1.norm)" in in_weight
    ended = said(poisoned, folder.name)
    assert len(ended) == ranks
    for rank in ended:
        assert rank["code"] == 1
        assert f"Step {plants.WEIGHT + 1} is not finite" in rank["error"]
        assert "It is the 2nd in a row. The step was not applied" in rank["error"]


@pytest.mark.parametrize(("zero", "ranks"), LAYOUTS)
def test_what_is_skipped_is_counted_and_changes_nothing_else(poisoned, zero, ranks):
    log = poisoned.log(f"{zero}-{ranks}")
    assert [line["skipped"] for line in log] == [0, 1, 0, 1, 0, 1]
    for line, wanted in zip(log, poisoned.log("zero0-1"), strict=True):
        if line["skipped"]:
            assert line["loss"] is line["grad_norm"] is None
        else:
            assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
            assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
