"""The way back: published file -> our checkpoint folder -> published file, equal bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from pretrain import checkpoint
from pretrain.released.back import convert, to_released
from pretrain.released.config import ImportConfig
from pretrain.released.fit import fit
from pretrain.released.folder import import_released

NOT_BACK = ("clip_teacher.", "distill_head.", "text_encoder.bert.embeddings.position_ids")
"""What an import drops: the frozen teacher, the distillation's head, a table of 0, 1, 2, ..."""


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("layout", "target", "back"),
    [
        ("image", "classifier", None),
        ("distilled", "stage1", "image"),
        ("video", "classifier", None),
        ("masked", "stage1", None),
        ("joint", "stage2", None),
    ],
)
def test_there_and_back(published, tmp_path, layout, target, back, suffix):
    given = published.state(layout)
    folder = tmp_path / "ours"
    import_released(published.file(layout, given), folder, ImportConfig(target=target, heads=4))
    if target == "stage1":
        given = {name: tensor for name, tensor in given.items() if not name.startswith("head.")}
    lines = convert(folder, tmp_path / f"back{suffix}", back)
    assert lines[-1].startswith(f"written: {tmp_path}")
    if suffix == ".pth":
        returned = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    else:
        returned = load_file(tmp_path / "back.safetensors")
    kept = {name: tensor for name, tensor in given.items() if not name.startswith(NOT_BACK)}
    assert returned.keys() == kept.keys()
    for name, tensor in kept.items():
        assert returned[name].shape == tensor.shape, name
        assert returned[name].equal(tensor), name


def test_what_was_written_is_read_again(published, tmp_path):
    """The file that we write is itself a published file to us."""
    import_released(published.file("joint"), tmp_path / "ours", ImportConfig(target="stage2", heads=4))
    convert(tmp_path / "ours", tmp_path / "back.pth")
    import_released(tmp_path / "back.pth", tmp_path / "again", ImportConfig(target="stage2", heads=4))
    first, second = (checkpoint.load_weights(tmp_path / name) for name in ("ours", "again"))
    assert first.keys() == second.keys()
    assert all(second[name].equal(tensor) for name, tensor in first.items())


def test_what_a_layout_has_no_place_for_is_named(published, tmp_path):
    import_released(published.file("masked"), tmp_path / "ours", ImportConfig(target="stage1"))
    lines = convert(tmp_path / "ours", tmp_path / "video.pth", "video")
    assert any("left out: clip_decoder.0.head.weight" in line for line in lines)
    returned = torch.load(tmp_path / "video.pth", weights_only=True)["model"]
    assert "norm_f.weight" in returned
    assert not any(name.startswith(("clip_decoder", "norm.")) for name in returned)


def test_what_the_release_cannot_compute_is_refused(published):
    made = fit(published.state("masked"), ImportConfig(target="stage1"))
    state = made.model.state_dict()
    for change, said in (
        ({"stem": "conv"}, "vision.stem is conv, there it is linear"),
        ({"tubelet": 2}, "tubelet is 2"),
    ):
        meta = made.meta.model_copy(update={"vision": made.meta.vision.model_copy(update=change)})
        with pytest.raises(UserError, match=said):
            to_released(state, meta, "image")
    with pytest.raises(UserError, match="is a vision model"):
        to_released(state, made.meta, "joint")
    joint = fit(published.state("joint"), ImportConfig(target="stage2", heads=4))
    with pytest.raises(UserError, match="is a joint model"):
        to_released(joint.model.state_dict(), joint.meta, "masked")


def test_a_name_without_a_known_ending_is_refused_and_nothing_is_left_half(published, tmp_path, monkeypatch):
    import_released(published.file("masked"), tmp_path / "ours", ImportConfig(target="stage1"))
    with pytest.raises(UserError, match=r"neither in \.pth nor in \.safetensors"):
        convert(tmp_path / "ours", tmp_path / "weights.bin")

    def full(*_arguments):
        raise RuntimeError("[enforce fail at inline_container.cc:1] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="disk that is full"):
        convert(tmp_path / "ours", tmp_path / "back.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
