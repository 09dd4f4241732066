"""Every config on docs/loading.md is one that a run accepts, and says what the page says of it."""

import re
from pathlib import Path

import pytest
import yaml

from configs.loader import validate
from data_pipeline.config import DataConfig, RemoteConfig
from data_pipeline.order import Order, OrderCorpus
from data_pipeline.remote import CHUNK

PAGE = (Path(__file__).parents[2] / "docs" / "loading.md").read_text(encoding="utf-8")
CONFIGS = [yaml.safe_load(text)["data"] for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]


def order(data):
    sizes = {"shards/small": 320, "shards/large": 960}
    corpora = [
        OrderCorpus(
            item.path, sizes.get(item.path, 4096), data.batch_of(item.kind), item.kind, item.weight, epochs=item.epochs
        )
        for item in data.train
    ]
    return Order(corpora, 0, data.tail)


@pytest.mark.parametrize("tree", CONFIGS)
def test_every_config_is_accepted(tree):
    data = validate(tree, DataConfig, "docs/loading.md")
    assert order(data).batch(0).index.shape == (data.batch_of(data.train[0].kind),)


def test_the_page_says_what_the_configs_do():
    images = order(validate(CONFIGS[1], DataConfig, "page"))
    assert [images.batch(step).kind for step in range(8)].count("image") == 2
    rounds = order(validate(CONFIGS[2], DataConfig, "page"))
    assert (rounds.visits(0, 60), rounds.visits(1, 60)) == (30, 30)  # one epoch of 30 batches, three of 10
    shown = validate(CONFIGS[3], DataConfig, "page").remote
    assert (shown.fetch, shown.attempts, shown.pause, shown.timeout) == (
        RemoteConfig().fetch, RemoteConfig().attempts, RemoteConfig().pause, RemoteConfig().timeout,
    )  # fmt: skip
    assert CHUNK == 8 * 2**20
    defaults = validate({"train": [{"path": "x"}]}, DataConfig, "defaults")
    faults = validate(CONFIGS[4], DataConfig, "page")
    assert (defaults.decode_timeout, defaults.max_bad_fraction, defaults.prefetch) == (
        faults.decode_timeout, faults.max_bad_fraction, faults.prefetch,
    )  # fmt: skip
