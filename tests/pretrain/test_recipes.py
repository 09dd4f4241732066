"""The published recipes as configs: the numbers of the reference, what differs between them, and a check of each."""

import pytest

from configs.errors import ConfigError
from configs.loader import load_config
from pretrain.config import PretrainConfig
from pretrain.config_checks import check_inputs
from pretrain.length import resolve_length
from pretrain.setup import describe
from pretrain.tokenizer import train_tokenizer

STAGE1 = ("stage1/k400", "stage1/k400_small", "stage1/k400_tiny")
MASKED = ("stage2/5m", "stage2/17m", "stage2/25m")
UNMASKED = tuple(f"{name}_unmasked" for name in MASKED)
IMAGES = ["cc3m", "coco", "vg", "sbu", "cc12m"]
CORPORA = {"5m": ["webvid2m", "cc3m"], "17m": ["webvid2m", *IMAGES], "25m": ["webvid10m", *IMAGES]}


def recipe(name, *overrides) -> PretrainConfig:
    return load_config(name, PretrainConfig, list(overrides))


def test_stage_1_of_k400():
    """Reference 2.1 to 2.6."""
    run = recipe("stage1/k400")
    assert (run.vision.depth, run.vision.width, run.vision.drop_path) == (32, 576, 0.4)
    assert (run.vision.frames, run.vision.tubelet, run.vision.image_size, run.vision.patch_size) == (8, 1, 224, 16)
    assert (run.epochs, run.optim.warmup_epochs, run.data.batch, run.micro_batch) == (800, 40, 2048, 64)
    assert run.optim.lr * run.rate_scale == pytest.approx(1.2e-3)
    assert run.optim.min_lr * run.rate_scale == pytest.approx(8e-5)
    assert (run.optim.betas, run.optim.weight_decay, run.optim.clip_norm) == ((0.9, 0.95), 0.05, None)
    assert (run.mask.kind, run.mask.ratio) == ("attention", 0.8)
    assert (run.teacher.source, run.teacher.layers, run.teacher.ln_post) == ("ViT-B-16-quickgelu", 1, False)
    assert (run.losses.alignment.kind, run.losses.alignment.weight) == ("l2", 1)
    assert run.data.train[0].flip
    assert run.data.augment.crop == "multiscale"
    assert (run.precision, run.optim.ema_decay) == ("bf16", None)


@pytest.mark.parametrize(("name", "size"), [("k400_small", (24, 384, 0.35)), ("k400_tiny", (24, 192, 0.1))])
def test_the_sizes_differ_by_their_size(name, size):
    middle, run = recipe("stage1/k400"), recipe(f"stage1/{name}")
    assert (run.vision.depth, run.vision.width, run.vision.drop_path) == size
    same = {"out": "", "vision": middle.vision}
    assert run.model_copy(update=same) == middle.model_copy(update=same)


@pytest.mark.parametrize(("name", "batch"), [("5m", 2048), ("17m", 4096), ("25m", 4096)])
def test_the_masked_phase_of_stage_2(name, batch):
    """Reference 3.1 to 3.4."""
    run = recipe(f"stage2/{name}")
    assert (run.vision.name, run.vision.drop_path, run.vision.pool, run.vision.pool_norm) == (
        "middle", 0.25, "cls+avg", True,
    )  # fmt: skip
    assert (run.text.layers, run.text.fusion_layers, run.text.width, run.text.max_tokens) == (9, 3, 768, 32)
    assert (run.text.dropout, run.text.checkpoint_layers, run.embed) == (0.1, True, 512)
    assert (run.epochs, run.optim.warmup_epochs) == (10, 1)
    assert (run.data.batch, run.data.image_batch, run.micro_batch) == (batch, batch, 128)
    assert (run.optim.lr * run.rate_scale, run.optim.min_lr, run.optim.betas) == (4e-4, 4e-6, (0.9, 0.999))
    assert run.optim.weight_decay == 0.05
    assert (run.mask.kind, run.mask.ratio, run.mask.image_ratio) == ("attention", 0.8, 0.5)
    losses = run.losses
    parts = (losses.alignment, losses.contrastive, losses.matching, losses.mlm)
    assert [part.weight for part in parts] == [1, 1, 1, 1]
    assert (losses.mlm.probability, losses.mlm.every, losses.matching.negatives) == (0.5, 1, "local")
    assert [corpus.path.removeprefix("data/") for corpus in run.data.train] == CORPORA[name]
    assert [corpus.kind for corpus in run.data.train] == ["video"] + ["image"] * (len(run.data.train) - 1)
    assert (run.data.crop_scale, run.data.interpolation) == ((0.5, 1.0), "bicubic")
    assert run.init == recipe("stage1/k400").out


@pytest.mark.parametrize(("name", "batch"), [("5m", 1024), ("17m", 2048), ("25m", 2048)])
def test_the_unmasked_phase_goes_on_from_the_masked_one(name, batch):
    masked, run = recipe(f"stage2/{name}"), recipe(f"stage2/{name}_unmasked")
    assert run.init == masked.out
    assert run.teacher is run.mask is None
    assert run.losses.alignment.weight == 0
    assert (run.epochs, run.optim.warmup_epochs, run.optim.lr, run.optim.min_lr) == (1, 0.2, 8e-5, 8e-7)
    assert (run.data.batch, run.data.image_batch, run.micro_batch) == (batch, batch, 64)
    assert run.data.train == masked.data.train
    assert (run.vision, run.text, run.losses.mlm, run.optim.weight_decay) == (
        masked.vision, masked.text, masked.losses.mlm, masked.optim.weight_decay,
    )  # fmt: skip


@pytest.mark.parametrize("name", [*STAGE1, *MASKED, *UNMASKED])
def test_without_the_data_the_sentence_names_all_that_is_missing(name):
    run = recipe(name)
    with pytest.raises(ConfigError) as error:
        check_inputs(run)
    for place, corpus in enumerate(run.data.train):
        assert corpus.path in error.value.cause
        assert f"data.train.{place}.path=FOLDER" in error.value.cure
    assert "videomamba data build" in error.value.cure


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return train_tokenizer(["a red square moves left"], tmp_path_factory.mktemp("recipes") / "words", 200)


@pytest.mark.parametrize("name", [*STAGE1, *MASKED, *UNMASKED])
def test_each_can_start_where_its_data_are_there(name, tmp_path, corpora, teacher_folder, words):
    """As `--check` does, with small corpora in the place of the named ones, and models that fit them."""
    asked = recipe(name)
    small = [f"out={tmp_path / 'run'}", "init=null", "data.batch=8", "micro_batch=2", "data.image_size=32"]
    small += ["vision.name=null", "vision.depth=2", "vision.width=16", "vision.image_size=32", "vision.patch_size=8"]
    small += [f"data.train.{i}.path={corpora[corpus.kind]}" for i, corpus in enumerate(asked.data.train)]
    if asked.teacher is not None:
        small += [f"teacher.source={teacher_folder}", "teacher.weights=null"]
    if asked.task == "stage2":
        small += ["text.name=null", "text.layers=1", "text.fusion_layers=1", "text.width=16", "text.heads=2"]
        small += ["text.init=null", "data.image_batch=8", f"tokenizer={words}"]
    run = recipe(name, *small)
    check_inputs(run)
    run = resolve_length(run)
    epoch = sum((24 if corpus.kind == "video" else 12) // 8 for corpus in run.data.train)
    assert run.steps == round(asked.epochs * epoch)
    assert run.optim.warmup_steps == round(asked.optim.warmup_epochs * epoch)
    said = describe(run, ranks=2)
    assert "8 videos a step: 2 rank(s) x 2 micro-batch(es) of 2" in said
    assert said[-1] == "this run can start"
