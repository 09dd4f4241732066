"""The small CLIP that stands in as a teacher: trained, whole or absent, loaded by open_clip and by the teacher."""

import json
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.loader import validate
from pretrain.clip_config import ClipTinyConfig
from pretrain.clip_tiny import is_done, train_clip
from pretrain.models.teacher import ClipTeacher


def config_for(out: Path, corpora: dict[str, str], **changes: object) -> ClipTinyConfig:
    tree = {
        "out": str(out),
        "steps": 30,
        "width": 32,
        "layers": 2,
        "text_layers": 1,
        "head_width": 16,
        "embed": 16,
        "patch_size": 8,
        "warmup_steps": 5,
        "lr": 5e-3,
        "log_every": 5,
        "vocab_size": 200,
        "data": {
            "train": [{"path": corpora["video"]}, {"path": corpora["image"], "kind": "image"}],
            "batch": 8,
            "frames": {"count": 1},
            "image_size": 32,
            "crop_scale": [1.0, 1.0],
            "workers": 0,
        },
    }
    return validate({**tree, **changes}, ClipTinyConfig, "test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpora: dict[str, str]) -> ClipTinyConfig:
    config = config_for(tmp_path_factory.mktemp("clip") / "teacher", corpora)
    train_clip(config)
    return config


def test_it_learns_and_leaves_what_open_clip_loads(trained: ClipTinyConfig) -> None:
    lines = [json.loads(line) for line in (Path(trained.out) / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    teacher = ClipTeacher.from_open_clip(trained.out, tubelet=2, grid=(4, 4))
    frames = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    seen = teacher(frames)
    assert seen.features_JBLC.shape == (1, 2, 1 + 2 * 16, 16)
    assert teacher.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_the_same_seed_gives_the_same_weights(trained: ClipTinyConfig, corpora: dict[str, str], tmp_path: Path) -> None:
    again = config_for(tmp_path / "teacher", corpora)
    train_clip(again)
    name = "open_clip_model.safetensors"
    assert (Path(again.out) / name).read_bytes() == (Path(trained.out) / name).read_bytes()


def test_a_finished_teacher_is_left_alone_and_another_one_refused(
    trained: ClipTinyConfig, corpora: dict[str, str]
) -> None:
    weights = Path(trained.out) / "open_clip_model.safetensors"
    before = weights.stat().st_mtime_ns
    train_clip(trained)
    assert weights.stat().st_mtime_ns == before
    other = config_for(Path(trained.out), corpora, steps=31)
    assert not is_done(other)
    with pytest.raises(UserError, match="another config"):
        train_clip(other)


def test_an_interruption_leaves_no_teacher(
    tmp_path: Path, corpora: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path / "teacher", corpora, steps=20)
    steps = iter(range(5))

    def interrupted(*_: object) -> float:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return 1.0

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.clip_tiny.warmup_cosine", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_clip(config)
    assert not Path(config.out).exists()
    train_clip(config)
    assert is_done(config)
