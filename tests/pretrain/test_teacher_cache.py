import copy
import json

import pytest
import torch

from configs.errors import ConfigError, UserError
from configs.loader import validate
from data_pipeline.feature_cache import ROWS, FeatureShards, FeatureSpec
from data_pipeline.loader import TrainLoader
from pretrain.config import PretrainConfig
from pretrain.sight import open_teacher
from pretrain.tasks import build_task
from pretrain.teacher_cache import TeacherCache, fill, open_stores
from tests.pretrain.tower_cases import CLIPA, clip_folder

CPU = torch.device("cpu")


@pytest.fixture
def tree(stage1_tree, corpora, tmp_path):
    """A run on unchanged clips and images, with a cache to fill."""
    tree = copy.deepcopy(stage1_tree) | {"out": str(tmp_path / "run"), "precision": "fp32"}
    tree["data"] |= {
        "crop_scale": [1.0, 1.0],
        "frames": {"count": 4, "rule": "middle"},
        "train": [{"path": corpora["video"]}, {"path": corpora["image"], "kind": "image"}],
    }
    tree["vision"] = tree["vision"] | {"align_layers": 2}
    tree["teacher"] |= {"cache": str(tmp_path / "cache"), "layers": 2}
    return tree


def config_of(tree, **teacher):
    return validate(tree | {"teacher": tree["teacher"] | teacher}, PretrainConfig, "run.yaml")


def filled(config):
    teacher = open_teacher(config, CPU)
    return teacher, list(fill(config, teacher, CPU, batch=5))


@pytest.mark.parametrize(("width", "least"), [("fp16", 0.9999), ("int8", 0.999)])
def test_cached_features_are_the_live_ones_of_the_very_batches_of_a_run(tree, width, least):
    config = config_of(tree, cache_width=width)
    teacher, steps = filled(config)
    assert steps[0] == (0, 36)
    assert steps[-1] == (36, 36)
    cache = TeacherCache.open(config, teacher)
    kinds = set()
    for batch in TrainLoader(config.data, seed=3, steps=9):
        kinds.add(batch.kind)
        live, held = teacher(batch.frames), cache.read(batch, CPU)
        assert held.features_JBLC.shape == live.features_JBLC.shape
        assert held.features_JBLC.shape[0] == 2
        cosine = torch.nn.functional.cosine_similarity(held.features_JBLC, live.features_JBLC, dim=-1)
        assert cosine.min() > least
        torch.testing.assert_close(held.attention_BKN, live.attention_BKN, atol=1e-3, rtol=1e-3)
    assert kinds == {"video", "image"}


def test_a_teacher_without_attention_has_none_in_the_cache(tree, tmp_path):
    tree["mask"] = {"kind": "tube", "ratio": 0.5}
    config = config_of(tree, source=clip_folder(tmp_path, CLIPA))
    teacher, _ = filled(config)
    batch = next(iter(TrainLoader(config.data, seed=3, steps=1)))
    held = TeacherCache.open(config, teacher).read(batch, CPU)
    assert held.attention_BKN is None
    live = teacher(batch.frames).features_JBLC
    assert torch.nn.functional.cosine_similarity(held.features_JBLC, live, dim=-1).min() > 0.9999
    assert build_task(config, CPU).losses(batch)["alignment"] > 0


def test_a_step_with_the_cache_is_the_step_without_and_asks_no_tower(tree, monkeypatch):
    config = config_of(tree)
    filled(config)
    batch = next(iter(TrainLoader(config.data, seed=3, steps=1)))
    live = build_task(config_of(tree, cache=None), CPU).losses(batch)["alignment"]
    task = build_task(config, CPU)
    monkeypatch.setattr(task.see, "teacher", None)
    assert task.losses(batch)["alignment"].item() == pytest.approx(live.item(), abs=2e-3)


def test_filling_goes_on_where_it_stopped_and_does_nothing_when_done(tree):
    config = config_of(tree)
    teacher = open_teacher(config, CPU)
    begun = fill(config, teacher, CPU, batch=8)
    next(begun)
    next(begun)  # the first corpus is there
    begun.close()
    with pytest.raises(UserError, match="0 of 1 shards") as told:
        TeacherCache.open(config, teacher)
    assert "teacher-cache" in told.value.cure
    assert [done for done, _ in fill(config, teacher, CPU, batch=8)] == [0, 12]
    assert list(fill(config, teacher, CPU, batch=8)) == [(0, 0)]
    TeacherCache.open(config, teacher)


def test_a_stale_cache_is_refused_by_name(tree, corpora):
    config = config_of(tree)
    filled(config)
    for other, word in (
        (config_of(tree, frame_stride=2), "another teacher"),
        (config_of(tree, ln_post=True), "another teacher"),
        (config_of(tree | {"data": tree["data"] | {"interpolation": "bilinear"}}), "another preprocessing"),
    ):
        with pytest.raises(UserError, match=word):
            open_stores(other, open_teacher(other, CPU))
    teacher = open_teacher(config, CPU)
    with torch.no_grad():
        next(teacher.visual.parameters()).add_(0.01)
    with pytest.raises(UserError, match="another teacher") as told:
        TeacherCache.open(config, teacher)
    assert told.value.exit_code == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"crop_scale": [0.5, 1.0]}, "cropped at random"),
        ({"augment": {"rand_augment": "rand-m7-n4"}}, "data.augment changes"),
        ({"augment": {"color_jitter": [0.1, 0, 0, 0]}}, "data.augment changes"),
        ({"augment": {"erase": 0.25}}, "data.augment changes"),
        ({"frames": {"count": 4, "rule": "uniform"}}, "other frames in every epoch"),
        ({"cache": "frames", "cache_frames": 16}, "data.cache_frames is 16"),
        ({"train": [{"path": "x", "flip": True}]}, "data.train.0.flip mirrors"),
    ],
)
def test_where_the_view_changes_the_cache_is_refused_with_the_reason(tree, changed, words):
    with pytest.raises(ConfigError) as told:
        config_of(tree | {"data": tree["data"] | changed})
    assert words in str(told.value)
    assert "teacher.cache=null" in str(told.value)
    config_of(tree | {"data": tree["data"] | changed}, cache=None)


def test_the_command_fills_and_says_so(tree, videomamba, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    for word in ("36 clips were kept now", "nothing was left to do"):
        done = videomamba("teacher-cache", str(tmp_path / "run.yaml"), "--batch", "8")
        assert done.returncode == 0, done.stderr
        assert word in done.stdout
    done = videomamba("teacher-cache", str(tmp_path / "run.yaml"), "teacher.cache=null")
    assert done.returncode == 2


def test_the_bench_shows_the_ratio_and_the_cosine(tree, videomamba, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    done = videomamba(
        "bench", "teacher-cache", str(tmp_path / "run.yaml"), "--repeats", "2", "--json", str(tmp_path / "b.json")
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["unit"] for row in rows] == ["ms", "cosine", "ms", "cosine"]
    assert rows[1]["ours"] > 0.9999
    assert rows[3]["ours"] > 0.999
    refused = videomamba("bench", "teacher-cache", str(tmp_path / "run.yaml"), "data.crop_scale=[0.5,1]")
    assert refused.returncode == 2
    assert "cropped at random" in refused.stderr


SPEC = FeatureSpec("c" * 64, 2 * ROWS + 3, "teacher", "view", "int8")


def test_rows_come_back_whatever_their_order_and_lost_ones_are_told(tmp_path):
    store = FeatureShards(tmp_path, SPEC, "Fill it.")
    features = torch.randn(SPEC.samples, 5, 7) * torch.logspace(-3, 3, 5)[:, None]
    features[4] = 0
    weights = torch.rand(SPEC.samples, 6)
    for shard in (2, 0, 1):
        start, stop = store.span(shard)
        kept = [i for i in range(start, stop) if i != 9]
        store.write(shard, kept, {"a": features[kept]}, {"b": weights[kept]})
    again = FeatureShards(tmp_path, SPEC, "Fill it.")
    again.require_complete()
    asked = [SPEC.samples - 1, 4, 70, 0, 4]
    found = again.read(asked)
    step = features[asked].abs().amax(-1, keepdim=True) / 127
    assert ((found["a"] - features[asked]).abs() <= 0.5 * step + 1e-6).all()
    torch.testing.assert_close(found["b"], weights[asked], atol=5e-4, rtol=0)
    with pytest.raises(UserError, match="lacks sample 9"):
        again.read([9])
    with pytest.raises(ValueError, match="shard 0 holds"):
        again.write(0, [ROWS], {}, {})


def test_a_cut_shard_is_not_there(tmp_path, monkeypatch):
    store = FeatureShards(tmp_path, SPEC, "Fill it.")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write(0, [0], {"a": torch.ones(1, 2)}, {})
    assert store.missing() == [0, 1, 2]
    assert not list(store.folder.glob("*.safetensors"))
