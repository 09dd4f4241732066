"""Exported encoders: the same embeddings as the checkpoint, in another process, and nothing half-written."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.loader import to_yaml, validate
from data_pipeline.loader import EvalLoader
from data_pipeline.shards import Corpus
from pretrain import checkpoint
from pretrain.config import PretrainConfig
from pretrain.encoder import load_encoder
from pretrain.export import SUMMARY, export
from pretrain.export_card import model_card
from pretrain.models.config import JointConfig
from pretrain.models.joint import JointModel
from pretrain.tokenizer import load_tokenizer, tokenize, train_tokenizer

CAPTIONS = ["A red square moves right.", "blue", "a white square moves left, take 3"]


@pytest.fixture(scope="module")
def run_folder(stage2_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage 2 with one checkpoint of random weights, in the folder form that training leaves."""
    return _write(tmp_path_factory.mktemp("export") / "run", stage2_tree)


def _write(folder: Path, tree: dict[str, Any]) -> Path:
    config = validate(tree | {"out": str(folder)}, PretrainConfig, "test")
    tokenizer = train_tokenizer(CAPTIONS, folder.with_name("tokenizer"), 256) if config.text else None
    joint = None
    vision = config.vision.model_copy(update={"align_width": 24})
    if config.text is not None:
        vision = vision.model_copy(update={"pool_norm": True})
        joint = JointConfig(vision=vision, text=config.text, embed=config.embed)
    model_meta = checkpoint.ModelMeta(kind="joint" if joint else "vision", vision=vision, joint=joint)
    torch.manual_seed(0)
    model = checkpoint.build_model(model_meta)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "A_log" not in name:
            weight.data.mul_(4)
    final = folder / "checkpoints" / "step-0000008"
    aside = final.with_name(".step-0000008.part")
    checkpoint.prepare(final.parent, aside)
    meta = checkpoint.Meta(
        step=8, task=config.task, config="test", ranks=1, zero_stage=0, model=model_meta, versions={}
    )
    text = config.text_preprocess if joint else None
    fed = checkpoint.Preprocess(visual=config.data.visual(), text=text)
    beside = checkpoint.Surroundings(to_yaml(config), fed, tokenizer)
    checkpoint.publish_weights(final, model.state_dict(), meta, beside, aside)
    return folder


@pytest.fixture(scope="module")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "encoders"
    made = export(run_folder, out)
    assert made.video_difference <= 1e-6
    assert made.text_difference <= 1e-6
    return out


def test_the_folders_hold_what_they_should(exported: Path, run_folder: Path) -> None:
    both = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert {path.name for path in (exported / "video").iterdir()} == both
    assert {path.name for path in (exported / "text").iterdir()} == both | {
        "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    }  # fmt: skip
    said = json.loads((exported / SUMMARY).read_text())
    weights = next(run_folder.glob("checkpoints/step-*")) / "model.safetensors"
    assert said["checkpoint_sha256"] == checkpoint.sha256(weights)
    assert said["step"] == 8


def test_another_process_gives_the_checkpoint_s_vectors(
    exported: Path, run_folder: Path, corpora: dict[str, str], python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Real clips and captions, by transformers' AutoModel and AutoTokenizer, against the joint model."""
    program = f"""
import numpy, torch, pretrain.export_hf
from transformers import AutoModel, AutoTokenizer
from pretrain.encoder import load_encoder
from data_pipeline.loader import EvalLoader
folder = {str(exported)!r}
video, text = AutoModel.from_pretrained(folder + "/video"), AutoModel.from_pretrained(folder + "/text")
encoder = load_encoder(folder)
batch = next(iter(EvalLoader({corpora["video"]!r}, encoder.video.visual, 5)))
made = video(encoder.video.visual.normalise(batch.frames))
words = AutoTokenizer.from_pretrained(folder + "/text")
cleaned = [encoder.text.text.clean_caption(caption) for caption in {CAPTIONS!r}]
texts = text(**words(cleaned, return_tensors="pt", padding=True)).embedding
numpy.savez({str(exported.parent / "made.npz")!r}, frames=made.frame_embeddings.detach(), video=made.embedding.detach(),
            text=texts.detach(), encoded=encoder.encode_text({CAPTIONS!r}))
"""
    process = python("-c", program)
    assert process.returncode == 0, process.stderr
    found = np.load(exported.parent / "made.npz")
    model, _, preprocess = checkpoint.load_model(run_folder)
    assert isinstance(model, JointModel)
    batch = next(iter(EvalLoader(corpora["video"], preprocess.visual, 5)))
    with torch.no_grad():
        seen = model.vision_encoder(preprocess.visual.normalise(batch.frames))
        frames = model.embed_video(model.vision_encoder.pooled(seen.tokens_BLD, seen.frames, per_frame=True))
        tokenizer = load_tokenizer(next(run_folder.glob("checkpoints/step-*")) / "tokenizer")
        ids, mask = tokenize(tokenizer, [preprocess.text.clean_caption(caption) for caption in CAPTIONS], 16)
        text = model.embed_text(model.text_encoder.encode(ids, mask))
    assert frames.shape == (5, 2, 16)
    assert np.abs(found["frames"] - frames.numpy()).max() < 1e-6
    unit = torch.nn.functional.normalize(frames.mean(1), dim=-1)
    assert np.abs(found["video"] - unit.numpy()).max() < 1e-6
    for name in ("text", "encoded"):
        assert np.abs(found[name] - text.numpy()).max() < 1e-6
    assert float((text[0] - text[1]).abs().max()) > 0.01


def test_load_encoder_preprocesses_as_the_loader_does(exported: Path, corpora: dict[str, str], tmp_path: Path) -> None:
    encoder = load_encoder(exported)
    corpus = Corpus.open(corpora["video"])
    paths = []
    for number in range(3):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(corpus.read(number).media)
        paths.append(path)
    batch = next(iter(EvalLoader(corpus, encoder.video.visual, 3)))
    for number, path in enumerate(paths):
        assert torch.equal(encoder.video.frames(path), batch.frames[number])
    by_path, by_array = encoder.encode_video(paths), encoder.encode_video(
        [frames.permute(1, 2, 3, 0).numpy() for frames in batch.frames]
    )  # fmt: skip
    assert np.abs(by_path - by_array).max() < 1e-6
    one_by_one = np.concatenate([encoder.encode_video([path]) for path in paths])
    assert np.abs(by_path - one_by_one).max() < 1e-6
    lengths = np.linalg.norm(encoder.encode_video(paths, normalise=True), axis=1)
    assert lengths == pytest.approx(np.ones(3), abs=1e-6)
    picture = np.random.default_rng(0).integers(0, 255, (1, 40, 50, 3), dtype=np.uint8)
    assert encoder.encode_video([picture, paths[0]]).shape == (2, 16)
    assert encoder.encode_text([]).shape == (0, 16)


def test_input_that_is_no_clip_is_refused(exported: Path, tmp_path: Path) -> None:
    encoder = load_encoder(exported)
    (tmp_path / "x.mp4").write_text("no video")
    for clip, words in (
        (tmp_path / "x.mp4", "cannot be read as a clip"),
        (tmp_path / "none.mp4", "cannot be read as a clip"),
        (np.zeros((4, 8, 8, 3)), "not uint8"),
        (np.zeros((8, 8, 3), np.uint8), "not uint8"),
    ):
        with pytest.raises(UserError, match=words):
            encoder.encode_video([clip])
    with pytest.raises(UserError, match="holds no exported encoders"):
        load_encoder(tmp_path)


def test_weights_that_changed_on_the_way_are_refused(
    run_folder: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export whose file differs from the checkpoint by a hair, into a folder that holds a good one."""
    from pretrain import export as exporter

    right = exporter.to_video

    def wrong(model: JointModel) -> Any:
        made = right(model)
        made.vision_proj.weight.data[0] *= 1.01
        return made

    before = (exported / SUMMARY).read_text()
    monkeypatch.setattr(exporter, "to_video", wrong)
    with pytest.raises(UserError, match="other embeddings than the checkpoint"):
        export(run_folder, exported)
    assert (exported / SUMMARY).read_text() == before
    assert [path.name for path in exported.parent.iterdir() if path.name.startswith(".")] == []


def test_what_cannot_be_exported_is_refused(run_folder: Path, stage1_tree: dict[str, Any], tmp_path: Path) -> None:
    stage1 = _write(tmp_path / "stage1", stage1_tree)
    with pytest.raises(UserError, match="stage 1, which has no text encoder"):
        export(stage1, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no export"):
        export(run_folder, tmp_path / "mine")
    with pytest.raises(UserError, match="holds no checkpoint"):
        export(tmp_path / "mine", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_tells_of_run_and_result(run_folder: Path) -> None:
    numbers = {"R@1": 61.25, "R@5": 90.0, "R@10": 95.0, "MedR": 1.0}
    result = {
        "columns": {"dual": "dual encoder"},
        "results": {"dual": {"t2v": numbers, "v2t": numbers}},
        "protocol": {"corpus": "shards/test", "clips": 400, "captions": 400, "note": "A rendered world."},
    }
    config = checkpoint.load_model(run_folder)[1]
    meta = checkpoint.read_meta(checkpoint.resolve(run_folder))
    for part in ("video", "text"):
        card = model_card(part, config, meta, result)
        assert "| text to video (dual encoder) | 61.2 | 90.0 | 95.0 | 1.0 |" in card
        assert "A rendered world." in card
        assert "step 8 of 8" in card
        assert "task: stage2" in card
        assert "videos of `video" in card
