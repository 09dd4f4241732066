"""A run's length and warm-up in samples or epochs, as steps."""

import pytest

from configs.errors import ConfigError
from configs.loader import validate
from pretrain.config import PretrainConfig
from pretrain.length import resolve_length


@pytest.fixture
def make(stage2_tree):
    """A run on 24 clips and 12 images, in batches of 4: 6 + 3 steps go through both once."""

    def build(optim=None, **changes) -> PretrainConfig:
        return validate(stage2_tree | {"out": "x", "steps": 0, "optim": optim or {}} | changes, PretrainConfig, "x")

    return build


def test_samples_are_batches(make):
    run = resolve_length(make(samples=402, optim={"warmup_samples": 41}))
    assert (run.steps, run.optim.warmup_steps) == (100, 10)
    assert run.samples is run.optim.warmup_samples is None
    assert resolve_length(run) is run


def test_epochs_are_what_the_corpora_hold(make, corpora):
    run = resolve_length(make(epochs=2.5, optim={"warmup_epochs": 0.5}))
    assert (run.steps, run.optim.warmup_steps) == (round(2.5 * 9), round(0.5 * 9))
    twice = {"path": corpora["image"], "kind": "image", "epochs": 2}
    data = make(epochs=1).data.model_dump() | {"train": [{"path": corpora["video"]}, twice]}
    assert resolve_length(make(epochs=1, data=data)).steps == 6 + 2 * 3
    assert resolve_length(make(epochs=1, data=data | {"image_batch": 6})).steps == 6 + 2 * 2


def test_units_may_differ(make):
    assert resolve_length(make(steps=50, optim={"warmup_epochs": 1})).optim.warmup_steps == 9
    assert resolve_length(make(epochs=10, optim={"warmup_steps": 7})).optim.warmup_steps == 7


def test_what_cannot_be(make):
    data = make(samples=8).data.model_dump() | {"image_batch": 8}
    with pytest.raises(ConfigError, match=r"count batches of one size, and here are \[4, 8\]"):
        resolve_length(make(samples=80, data=data))
    with pytest.raises(ConfigError, match="less than one batch of 4"):
        resolve_length(make(samples=3))
    with pytest.raises(ConfigError, match=r"warmup_steps is 30 of 25 steps, so the rate would only rise"):
        resolve_length(make(samples=100, optim={"warmup_steps": 30}))
