"""The teacher: its own pixels, tubelets, chunks, attention, and that it never becomes part of the student."""

import json

import pytest
import torch
from torch import nn

from configs.errors import UserError
from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.models.teacher import ClipTeacher

ensure_torchvision()
from open_clip.transformer import VisionTransformer  # noqa: E402

SIDE = 32


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return VisionTransformer(SIDE, 8, 24, 2, 3, 2.0, output_dim=10)


@pytest.fixture
def frames():
    return torch.randint(0, 256, (2, 3, 4, SIDE, SIDE), dtype=torch.uint8)


def test_attention_is_that_of_the_last_block(tower, frames):
    out = ClipTeacher(tower)(frames)
    tower.eval()
    seen = {}
    block = tower.transformer.resblocks[-1]
    block.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    pixels = (frames / 255 - torch.tensor(ClipTeacher(tower).mean).view(3, 1, 1, 1)) / torch.tensor(
        ClipTeacher(tower).std
    ).view(3, 1, 1, 1)
    pooled = tower(pixels.transpose(1, 2).flatten(0, 1))
    normed = block.ln_1(seen["x"])
    _, weights = block.attn(normed, normed, normed, need_weights=True, average_attn_weights=True)
    torch.testing.assert_close(out.attention_BKN.flatten(0, 1), weights[:, 0, 1:], rtol=1e-4, atol=1e-6)
    assert (out.attention_BKN.sum(-1) < 1).all()
    # The tower's own output is the projection of ln_post(cls); with it, the teacher's cls is their mean.
    with_norm = ClipTeacher(tower, ln_post=True)(frames)
    torch.testing.assert_close(with_norm.features_BLC[:, 0], pooled.view(2, 4, -1).mean(1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out.features_BLC, with_norm.features_BLC)


def test_a_tubelet_averages_its_frames(tower, frames):
    one, two = ClipTeacher(tower)(frames), ClipTeacher(tower, tubelet=2)(frames)
    assert two.features_BLC.shape == (2, 1 + 2 * 16, 10)
    torch.testing.assert_close(two.features_BLC[:, :1], one.features_BLC[:, :1])
    patches = one.features_BLC[:, 1:].view(2, 2, 2, 16, 10).mean(2).flatten(1, 2)
    torch.testing.assert_close(two.features_BLC[:, 1:], patches, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two.attention_BKN, one.attention_BKN.view(2, 2, 2, 16).mean(2))
    with pytest.raises(ValueError, match="3 frames do not divide by the tubelet 2"):
        ClipTeacher(tower, tubelet=2)(frames[:, :, :3])


def test_an_image_fills_a_token_frame(tower, frames):
    out = ClipTeacher(tower, tubelet=2)(frames[:, :, :1])
    assert out.features_BLC.shape == (2, 17, 10)
    assert out.attention_BKN.shape == (2, 1, 16)


def test_chunks_bound_memory_and_change_nothing(tower, frames):
    whole, chunked = ClipTeacher(tower)(frames), ClipTeacher(tower, chunk=3)(frames)
    torch.testing.assert_close(whole.features_BLC, chunked.features_BLC)
    torch.testing.assert_close(whole.attention_BKN, chunked.attention_BKN)


def test_other_resolutions_are_resized_and_pixels_are_the_teachers_own(tower, frames):
    teacher = ClipTeacher(tower)
    large = frames.repeat_interleave(2, 3).repeat_interleave(2, 4)
    near = teacher(large).features_BLC
    assert near.shape == (2, 65, 10)
    assert nn.functional.cosine_similarity(near, teacher(frames).features_BLC, dim=-1).mean() > 0.9
    shifted = ClipTeacher(tower, mean=(0.1, 0.1, 0.1))(frames)
    assert not torch.allclose(shifted.features_BLC, teacher(frames).features_BLC)


def test_it_is_frozen_in_eval_and_no_part_of_a_model(tower, frames):
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = ClipTeacher(tower.train())
            self.layer = nn.Linear(2, 2)

    student = Student().train()
    assert list(student.state_dict()) == ["layer.weight", "layer.bias"]
    assert not student.teacher.visual.training
    assert not any(p.requires_grad for p in tower.parameters())
    assert not student.teacher(frames).features_BLC.requires_grad


def test_another_patch_grid_is_refused(tower):
    ClipTeacher(tower, grid=(4, 4))
    with pytest.raises(UserError, match="teacher sees 4x4 patches a frame and the student 8x8"):
        ClipTeacher(tower, grid=(8, 8))
    with pytest.raises(UserError, match="is a Linear"):
        ClipTeacher(nn.Linear(2, 2))


def test_a_folder_that_open_clip_wrote(teacher_folder, frames):
    teacher = ClipTeacher.from_open_clip(teacher_folder, grid=(4, 4))
    same = ClipTeacher.from_open_clip(f"local-dir:{teacher_folder}")
    assert teacher.width == 24
    assert teacher(frames).features_BLC.equal(same(frames).features_BLC)


@pytest.mark.parametrize(
    ("files", "said"),
    [({}, "comes without weights"), ({"open_clip_config.json": "{", "model.safetensors": ""}, "cannot build")],
)
def test_folders_that_hold_no_teacher(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        ClipTeacher.from_open_clip(str(tmp_path))


def test_weights_of_another_model_are_refused(tmp_path, teacher_folder):
    from shutil import copytree

    folder = copytree(teacher_folder, tmp_path / "other")
    described = json.loads((folder / "open_clip_config.json").read_text())
    described["model_cfg"]["vision_cfg"]["width"] = 48
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="cannot build the teacher"):
        ClipTeacher.from_open_clip(str(folder))


@pytest.mark.parametrize("weights", [None, "no_such_tag"])
def test_names_without_weights_are_refused(weights):
    with pytest.raises(UserError):
        ClipTeacher.from_open_clip("ViT-B-16", weights)


def test_a_stride_looks_at_the_middle_frames_of_a_tubelet_alone(tower, frames):
    strided = ClipTeacher(tower, tubelet=2, stride=2)(frames)
    alone = ClipTeacher(tower)(frames[:, :, 1::2])
    torch.testing.assert_close(strided.features_BLC, alone.features_BLC)
    torch.testing.assert_close(strided.attention_BKN, alone.attention_BKN)
    with pytest.raises(UserError, match="frame_stride 3 does not divide"):
        ClipTeacher(tower, tubelet=4, stride=3)
