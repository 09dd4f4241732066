"""configs/deepspeed: one file for each ZeRO stage, every key of which DeepSpeed knows and takes as it is written."""

import json

import pytest

from configs.loader import PACKAGED, validate
from pretrain.config import PretrainConfig

FILES = sorted((PACKAGED / "deepspeed").glob("*.json"))


def test_there_is_one_for_each_stage():
    assert [path.stem for path in FILES] == ["zero0", "zero1", "zero2", "zero3"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_deepspeed_takes_every_key(path, method, stage1_tree):
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig

    from pretrain.engine import settings

    stage = int(path.stem[-1])
    tree = stage1_tree | {"out": "x", "deepspeed": path.stem, "micro_batch": 2, "optim": {"method": method}}
    given = settings(validate(tree, PretrainConfig, "x"), ranks=1)
    read = DeepSpeedConfig(given)
    assert read.zero_config.stage == stage
    for key, value in given["zero_optimization"].items():
        assert getattr(read.zero_config, key) == value, key
    assert (read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps, read.train_batch_size) == (2, 2, 4)
    assert read.gradient_clipping == 0.0
    assert read.zero_allow_untested_optimizer
    assert read.steps_per_print is None
    known = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    assert given.keys() <= known | {"zero_optimization"}
    assert json.loads(path.read_text()).keys() == {
        "zero_optimization", "zero_allow_untested_optimizer", "steps_per_print",
    }  # fmt: skip
