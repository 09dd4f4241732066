import copy
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from data_pipeline.loader import Batch, TrainLoader
from data_pipeline.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from pretrain.losses import alignment_loss, hard_negatives
from pretrain.pairs import over_ranks
from pretrain.stage2 import Stage2
from pretrain.tasks import build_task
from pretrain.tokenizer import train_tokenizer

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("autocast")


@pytest.fixture
def autocast():
    """As in training: DeepSpeed calls a task's losses under bf16 autocast."""
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # the cache would outlive an update
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    captions = [f"a {colour} square moves {way}" for colour in ("red", "green", "blue") for way in ("left", "right")]
    return train_tokenizer(captions, tmp_path_factory.mktemp("words") / "words", 200)


def batch_of(config, kind: str) -> Batch:
    """The first batch of that kind."""
    loader = TrainLoader(config.data, config.seed, 0, 1, 0, 50)
    return next(batch for batch in loader if batch.kind == kind)


def reordered(batch: Batch, order: list[int]) -> Batch:
    picked = torch.tensor(order)
    changed = copy.copy(batch)
    changed.frames, changed.identity, changed.seeds = batch.frames[picked], batch.identity[picked], batch.seeds[picked]
    changed.captions, changed.keys = [batch.captions[i] for i in order], [batch.keys[i] for i in order]
    return changed


def values(task, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(loss) for name, loss in task.losses(batch).items()}


def test_stage_1(runs, stage1_tree):
    config = runs.config(stage1_tree | {"losses": {"alignment": {"weight": 3.0}}}, "one")
    task = build_task(config, CPU)
    batch = batch_of(config, "video")
    losses = task.losses(batch)
    assert set(losses) == {"alignment"}
    losses["alignment"].backward()
    parameters = dict(task.model.named_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())  # the last layer too
    assert not any("teacher" in name or "visual" in name for name in task.model.state_dict())
    assert task.meta.vision.align_width == 24 == parameters["clip_decoder.0.head.weight"].shape[0]
    plain = build_task(runs.config(stage1_tree, "plain"), CPU)
    assert values(task, batch)["alignment"] == pytest.approx(3 * values(plain, batch)["alignment"], rel=1e-6)


def test_several_layers_are_aligned_each_to_its_own(runs, stage1_tree):
    tree = copy.deepcopy(stage1_tree)
    tree["vision"]["align_layers"] = tree["teacher"]["layers"] = 2
    task = build_task(runs.config(tree, "two"), CPU)
    batch = batch_of(task.config, "video")
    shown = task.see.show(batch.frames, batch.seeds, batch)
    student_JBVC = task.encoder.align(task.see.look(task.encoder, batch.frames, batch.seeds, shown))
    each = [float(alignment_loss(s, t).detach()) for s, t in zip(student_JBVC, shown.target_JBVC, strict=True)]
    assert each[0] != pytest.approx(each[1], rel=1e-3)
    loss = task.losses(batch)["alignment"]
    assert float(loss.detach()) == pytest.approx(sum(each) / 2, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in task.encoder.clip_decoder.parameters())


@pytest.mark.parametrize("order", ["temporal_first", ["st_half", "st_full"]])
def test_every_scan_order_trains(runs, stage1_tree, order):
    tree = copy.deepcopy(stage1_tree)
    tree["vision"]["scan_order"] = order
    task = build_task(runs.config(tree, "ordered"), CPU)
    batch = batch_of(task.config, "video")
    loss = task.losses(batch)["alignment"]
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in task.model.parameters())
    plain = build_task(runs.config(stage1_tree, "plain"), CPU)  # the same weights, from the same seed
    assert float(loss.detach()) != pytest.approx(values(plain, batch)["alignment"], rel=1e-5)


def test_what_is_drawn_belongs_to_the_sample(runs, stage1_tree):
    task = build_task(runs.config(stage1_tree, "one"), CPU)
    batch = batch_of(task.config, "video")
    visible_BV = task.see.show(batch.frames, batch.seeds, batch).visible_BV
    assert visible_BV.shape == (4, 1 + 2 * 8)  # half of 16 patches in each of two token frames, and cls
    assert values(task, reordered(batch, [2, 0, 3, 1])) == pytest.approx(values(task, batch), rel=1e-5)
    other = copy.copy(batch)
    other.seeds = batch.seeds + 1
    assert values(task, other) != pytest.approx(values(task, batch), rel=1e-4)


def test_the_model_is_a_function_of_the_seed(runs, stage1_tree):
    first, second, other = (
        build_task(runs.config(stage1_tree | {"seed": seed}, "one"), CPU).model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["pos_embed"], other["pos_embed"])


@pytest.mark.parametrize("kind", ["video", "image"])
def test_stage_2_masked(runs, stage2_tree, words, kind):
    config = runs.config(stage2_tree, "two")
    task = build_task(config, CPU, words)
    assert isinstance(task, Stage2)
    batch = batch_of(config, kind)
    losses = task.losses(batch)
    assert set(losses) == {"contrastive", "matching", "mlm", "alignment"}
    sum(losses.values()).backward()
    untouched = {name for name, p in task.model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    expected = {"vision_encoder.temporal_pos_embedding"} if kind == "image" else set()
    # keys' biases shift every score of a row alike, and there is one type of token
    harmless = {name for name in untouched if name.endswith("key.bias") or "token_type" in name}
    assert untouched - harmless == expected
    assert values(task, batch) == values(task, batch)
    if kind == "video":
        shuffled = reordered(batch, [3, 1, 0, 2])
        assert values(task, shuffled)["mlm"] == pytest.approx(values(task, batch)["mlm"], rel=2e-3)
        assert values(task, shuffled)["contrastive"] == pytest.approx(values(task, batch)["contrastive"], rel=2e-3)
    assert float(task.metrics["temperature"]) == pytest.approx(0.07)


def test_masked_words_of_every_second_caption_are_those_of_these_captions(runs, stage2_tree, words):
    tree = stage2_tree | {"losses": stage2_tree.get("losses", {}) | {"mlm": {"weight": 1.0}}}
    config = runs.config(tree, "all")
    sparse = runs.config(tree | {"losses": tree["losses"] | {"mlm": {"weight": 1.0, "every": 2}}}, "second")
    batch = batch_of(config, "video")
    half = values(build_task(sparse, CPU, words), batch)["mlm"]
    alone = values(build_task(config, CPU, words), reordered(batch, list(range(0, len(batch), 2))))["mlm"]
    assert half == pytest.approx(alone, rel=2e-3)
    assert half != pytest.approx(values(build_task(config, CPU, words), batch)["mlm"], rel=1e-4)


def test_stage_2_unmasked_uses_one_vector_a_frame_and_no_teacher(runs, stage2_tree, words):
    tree = stage2_tree | {"teacher": None, "mask": None, "losses": {"alignment": {"weight": 0}, "mlm": {"weight": 0}}}
    config = runs.config(tree, "two")
    task = build_task(config, CPU, words)
    seen = []
    embed = task.joint.embed_video
    task.joint.embed_video = lambda pooled: seen.append(pooled.shape) or embed(pooled)
    assert set(task.losses(batch_of(config, "video"))) == {"contrastive", "matching"}
    assert set(task.losses(batch_of(config, "image"))) == {"contrastive", "matching"}
    assert seen == [(4, 2, 32), (4, 1, 32)]
    assert task.see.teacher is None
    assert not any("clip_decoder" in name for name in task.model.state_dict())


def test_the_loss_falls_when_one_batch_is_learned_by_heart(runs, stage2_tree, words):
    config = runs.config(stage2_tree, "two")
    task = build_task(config, CPU, words)
    batch = batch_of(config, "video")
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-3)
    before = values(task, batch)
    for _ in range(60):
        optimizer.zero_grad()
        sum(task.losses(batch).values()).backward()
        optimizer.step()
    after = values(task, batch)
    for name in ("contrastive", "mlm", "alignment"):
        assert after[name] < 0.6 * before[name], (name, before, after)


def test_refusals(runs, stage1_tree, stage2_tree, words, tmp_path):
    tree = copy.deepcopy(stage1_tree)
    tree["vision"]["align_width"] = 7
    with pytest.raises(UserError, match="align_width is 7, and what there is to align to is 24 wide"):
        build_task(runs.config(tree, "a"), CPU)
    tree = copy.deepcopy(stage1_tree)
    tree["vision"]["patch_size"] = 16
    with pytest.raises(UserError, match="4x4 patches a frame and the student 2x2"):
        build_task(runs.config(tree, "b"), CPU)
    tree = copy.deepcopy(stage2_tree)
    tree["text"]["vocab_size"] = 64
    with pytest.raises(UserError, match=r"has \d+ pieces, text.vocab_size is 64"):
        build_task(runs.config(tree, "c"), CPU, words)
    with pytest.raises(UserError, match="holds no tokenizer"):
        build_task(runs.config(stage2_tree, "d"), CPU, tmp_path)


def test_over_ranks_divides_by_the_count_and_survives_none():
    assert over_ranks(torch.tensor(6.0), torch.tensor(4.0)) == 1.5
    assert over_ranks(torch.tensor(0.0), torch.tensor(0.0)) == 0.0


def test_hardness_nought_draws_negatives_evenly(runs, stage2_tree, words, monkeypatch):
    """At 0 the scores do not matter; at 1 they do: the negatives' scores, as they reach the draw."""
    seen = {}
    for name, hardness in (("even", 0.0), ("hard", 1.0)):
        tree = stage2_tree | {"losses": {"matching": {"weight": 1.0, "hardness": hardness}}}
        task = build_task(runs.config(tree, name), CPU, words)

        def drawn(score_BG, *rest, name=name):
            seen.setdefault(name, []).append(score_BG)
            return hard_negatives(score_BG, *rest)

        monkeypatch.setattr("pretrain.stage2.hard_negatives", drawn)
        values(task, batch_of(task.config, "video"))
    assert all(not scores.any() for scores in seen["even"])
    assert all(scores.std() > 0 for scores in seen["hard"])


def test_the_teachers_options_reach_it(runs, stage1_tree):
    own = build_task(runs.config(stage1_tree, "own"), CPU).see.teacher
    assert (own.mean, own.std) == (CLIP_MEAN, CLIP_STD)
    options = {"pixels": "released", "ln_post": True, "chunk": 5, "image_size": 64}
    tree = stage1_tree | {"teacher": stage1_tree["teacher"] | options}
    tree["vision"] = tree["vision"] | {"patch_size": 4}
    as_released = build_task(runs.config(tree, "released"), CPU).see.teacher
    assert (as_released.mean, as_released.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert as_released.tower.size == (64, 64)
    assert (as_released.ln_post, as_released.chunk) == (True, 5)
