"""The teacher: its own pixels, tubelets, chunks, attention, and that it never becomes part of the student."""

import json

import pytest
import torch
from torch import nn

from configs.errors import UserError
from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.models.pos_embed import resize_spatial
from pretrain.models.teacher import ClipTeacher, last_layers

ensure_torchvision()
from open_clip.transformer import VisionTransformer  # noqa: E402

SIDE = 32


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return VisionTransformer(SIDE, 8, 24, 3, 3, 2.0, output_dim=10)


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
    torch.testing.assert_close(with_norm.features_JBLC[0, :, 0], pooled.view(2, 4, -1).mean(1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out.features_JBLC, with_norm.features_JBLC)


def test_a_tubelet_averages_its_frames(tower, frames):
    one, two = ClipTeacher(tower)(frames), ClipTeacher(tower, tubelet=2)(frames)
    assert two.features_JBLC.shape == (1, 2, 1 + 2 * 16, 10)
    torch.testing.assert_close(two.features_JBLC[0, :, :1], one.features_JBLC[0, :, :1])
    patches = one.features_JBLC[0, :, 1:].view(2, 2, 2, 16, 10).mean(2).flatten(1, 2)
    torch.testing.assert_close(two.features_JBLC[0, :, 1:], patches, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two.attention_BKN, one.attention_BKN.view(2, 2, 2, 16).mean(2))
    with pytest.raises(ValueError, match="3 frames do not divide by the tubelet 2"):
        ClipTeacher(tower, tubelet=2)(frames[:, :, :3])


def test_an_image_fills_a_token_frame(tower, frames):
    out = ClipTeacher(tower, tubelet=2)(frames[:, :, :1])
    assert out.features_JBLC.shape == (1, 2, 17, 10)
    assert out.attention_BKN.shape == (2, 1, 16)


@pytest.mark.parametrize(("chunk", "tubelet"), [(3, 1), (1, 1), (3, 2), (1, 2)])
def test_chunks_change_nothing(tower, frames, chunk, tubelet):
    whole, chunked = (
        ClipTeacher(tower, tubelet=tubelet)(frames),
        ClipTeacher(tower, tubelet=tubelet, chunk=chunk)(frames),
    )
    torch.testing.assert_close(whole.features_JBLC, chunked.features_JBLC)
    torch.testing.assert_close(whole.attention_BKN, chunked.attention_BKN)


def test_chunks_bound_memory(tower, live_bytes):
    """Four times the clips cost their outputs and their uint8 frames, and no more of the tower's activations."""
    peaks, kept = {}, {}
    for chunk in (4, 256):
        for clips in (4, 16):
            frames = torch.zeros(clips, 3, 4, SIDE, SIDE, dtype=torch.uint8)
            teacher = ClipTeacher(tower, chunk=chunk)
            with live_bytes() as live:
                out = teacher(frames)
            peaks[chunk, clips] = live.peak
            kept[clips] = sum(t.untyped_storage().nbytes() for t in out) + frames.nbytes
    more = kept[16] - kept[4]
    assert peaks[4, 16] - peaks[4, 4] < 3 * more  # the parts, and the whole that they are joined to
    assert peaks[256, 16] - peaks[256, 4] > 6 * more


def test_other_resolutions_are_resized_and_pixels_are_the_teachers_own(tower, frames):
    teacher = ClipTeacher(tower)
    large = frames.repeat_interleave(2, 3).repeat_interleave(2, 4)
    near = teacher(large).features_JBLC
    assert near.shape == (1, 2, 65, 10)
    assert nn.functional.cosine_similarity(near, teacher(frames).features_JBLC, dim=-1).mean() > 0.9
    shifted = ClipTeacher(tower, mean=(0.1, 0.1, 0.1))(frames)
    assert not torch.allclose(shifted.features_JBLC, teacher(frames).features_JBLC)


def test_it_is_frozen_in_eval_and_no_part_of_a_model(tower, frames):
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = ClipTeacher(tower.train(), ln_post=True)
            self.layer = nn.Linear(2, 2)

    student = Student().train()
    assert list(student.state_dict()) == ["layer.weight", "layer.bias"]
    assert not student.teacher.visual.training
    assert not any(p.requires_grad for p in tower.parameters())
    once = student.teacher(frames).features_JBLC
    assert not once.requires_grad
    tower.transformer.resblocks[0].mlp.append(nn.Dropout(0.5))
    tower.train()  # by whoever still holds it
    assert student.teacher(frames).features_JBLC.equal(once)
    assert list(student.parameters()) == list(student.layer.parameters())


def test_another_patch_grid_is_refused(tower):
    ClipTeacher(tower, grid=(4, 4))
    with pytest.raises(UserError, match="teacher sees 4x4 patches a frame and the student 8x8"):
        ClipTeacher(tower, grid=(8, 8))
    with pytest.raises(UserError, match="is a Linear, which open_clip has in none"):
        ClipTeacher(nn.Linear(2, 2))


def test_a_folder_that_open_clip_wrote(teacher_folder, frames):
    teacher = ClipTeacher.from_open_clip(teacher_folder, grid=(4, 4))
    same = ClipTeacher.from_open_clip(f"local-dir:{teacher_folder}")
    assert teacher.width == 24
    assert teacher(frames).features_JBLC.equal(same(frames).features_JBLC)


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
    torch.testing.assert_close(strided.features_JBLC, alone.features_JBLC)
    torch.testing.assert_close(strided.attention_BKN, alone.attention_BKN)
    with pytest.raises(UserError, match="frame_stride 3 does not divide"):
        ClipTeacher(tower, tubelet=4, stride=3)


def test_several_layers_are_those_of_the_release(tower, frames):
    """Block j of depth 3 is depth - 1 - int(j interval), shallow first; what a hook sees leave each block."""
    seen = {}
    for number, block in enumerate(tower.transformer.resblocks):
        block.register_forward_hook(lambda _m, _i, out, number=number: seen.update({number: out}))
    assert last_layers(12, 3, 2.0) == (7, 9, 11)
    assert last_layers(12, 6, 1.5) == (4, 5, 7, 8, 10, 11)
    out = ClipTeacher(tower, layers=2, interval=2)(frames).features_JBLC
    assert out.shape == (2, 2, 65, 10)
    for place, number in enumerate((0, 2)):
        patches = (seen[number][:, 1:] @ tower.proj).view(2, 64, 10)
        cls = (seen[number][:, 0] @ tower.proj).view(2, 4, 10).mean(1)
        torch.testing.assert_close(out[place, :, 1:], patches, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out[place, :, 0], cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[1], ClipTeacher(tower)(frames).features_JBLC[0])
    with pytest.raises(UserError, match="4 layers, each 1 apart, do not fit a teacher of 3 blocks"):
        ClipTeacher(tower, layers=4)


def test_another_resolution_resizes_the_positions(tower, frames):
    table = tower.positional_embedding.detach().clone()
    teacher = ClipTeacher(tower, image_size=48, grid=(6, 6))
    out = teacher(frames)
    assert out.features_JBLC.shape == (1, 2, 1 + 4 * 36, 10)
    assert out.attention_BKN.shape == (2, 4, 36)
    torch.testing.assert_close(tower.positional_embedding[None], resize_spatial(table[None], (6, 6)))
    assert not tower.positional_embedding.requires_grad
    with pytest.raises(UserError, match="image_size 50 does not divide by the teacher's patches of 8 pixels"):
        ClipTeacher(tower, image_size=50)
