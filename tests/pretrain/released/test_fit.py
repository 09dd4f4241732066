"""Published layouts made into our models: strictly, whole, and changed only where that was asked for."""

import pytest
import torch
from torch.nn import functional as F

from configs.errors import UserError
from pretrain.models.joint import JointModel
from pretrain.models.videomamba import VideoMamba
from pretrain.released.config import ImportConfig
from pretrain.released.fit import fit, identify

HEADS = 4


def fitted(published, layout, target, state=None, **options):
    state = published.state(layout) if state is None else state
    heads = HEADS if layout == "joint" else None
    return fit(state, ImportConfig(**{"target": target, "heads": heads} | options))


def ours(name):
    """Where a published name stands in our models, for the layouts without a prefix."""
    return "norm.weight" if name == "norm_f.weight" else name


@pytest.mark.parametrize(
    ("layout", "target", "lost", "new"),
    [
        ("image", "classifier", [], []),
        ("image", "stage1", ["head.weight", "head.bias"], ["temporal_pos_embedding"]),
        ("distilled", "stage2", ["head.", "distill_head."], ["temporal_pos_embedding"]),
        ("video", "classifier", [], []),
        ("video", "stage1", ["head."], []),
        ("masked", "stage1", [], []),
        ("masked", "stage2", [], []),
        ("joint", "stage2", ["clip_teacher.", "text_encoder.bert.embeddings.position_ids"], []),
    ],
)
def test_every_tensor_goes_where_it_belongs_and_no_other_changes(published, layout, target, lost, new):
    given, made = published.state(layout), fitted(published, layout, target)
    state = made.model.state_dict()
    kept = {name: tensor for name, tensor in given.items() if not name.startswith(tuple(lost))}
    assert state.keys() - {ours(name) for name in kept} == set(new)
    for name, tensor in kept.items():
        found = state[ours(name)]
        if name == "patch_embed.proj.weight" and layout in ("image", "distilled"):
            found = found[:, :, 0]
        if name == "temp":
            assert found.shape == (1,)
            found = found[0]
        assert found.equal(tensor), name
    assert all(not state[name].any() for name in new)


def test_sizes_are_read_from_shapes(published):
    vision = fitted(published, "masked", "stage1").meta.vision
    assert (vision.depth, vision.width, vision.patch_size, vision.tubelet, vision.image_size) == (3, 48, 8, 1, 32)
    assert (vision.frames, vision.d_state, vision.d_conv, vision.expand, vision.rank) == (4, 16, 4, 2, 3)
    assert (vision.align_width, vision.align_source, vision.dt_init, vision.classes) == (24, "released", "released", 0)
    assert fitted(published, "video", "classifier").meta.vision.classes == 7
    assert fitted(published, "image", "classifier").meta.vision.frames == 1
    for layout, frames in (("image", 8), ("masked", 4)):
        assert fitted(published, layout, "stage1").meta.vision.frames == frames
        assert fitted(published, layout, "classifier", classes=2).meta.vision.frames == frames
    joint = fitted(published, "joint", "stage2").meta.joint
    text = joint.text
    assert (text.width, text.layers, text.fusion_layers, text.intermediate) == (32, 2, 1, 128)
    assert (text.vocab_size, text.positions, text.heads, joint.embed) == (40, 64, 4, 20)


@pytest.mark.parametrize(
    ("layout", "depth", "width", "said", "parameters"),
    [
        ("image", 24, 192, "tiny", 7_148_008),
        ("image", 24, 384, "small", 25_796_584),
        ("image", 32, 576, "middle", 74_217_448),
        ("image", 24, 768, "base", 97_598_440),
        ("video", 24, 192, "tiny", 7_033_744),
        ("video", 24, 384, "small", 25_568_656),
        ("video", 32, 576, "middle", 73_875_856),
        ("masked", 32, 576, "middle", 73_941_504),
        ("joint", 32, 576, "middle", None),
    ],
)
def test_the_published_sizes_are_recognised(published_shapes, layout, depth, width, said, parameters):
    """Full-size names and shapes, without numbers; the count is the one published for that model."""
    state = published_shapes(layout, depth, width)
    found = identify(state, ImportConfig(target="stage2" if layout == "joint" else "stage1"))
    assert found.layout == layout
    assert f"size: {said}" in found.notes
    assert (found.meta.vision.image_size, found.meta.vision.rank) == (224, -(-width // 16))
    if parameters is not None:
        assert sum(tensor.numel() for tensor in found.kept.values()) == parameters
    else:
        text = found.meta.joint.text
        assert (text.width, text.heads, text.layers, text.fusion_layers) == (768, 12, 9, 3)
        assert (text.vocab_size, text.positions, text.intermediate, found.meta.joint.embed) == (30522, 512, 3072, 512)


def test_the_list_has_as_many_tensors_as_a_published_file(published_shapes):
    """552 is what was counted in videomamba_m16_ssv2_mask_ft_f16_res224.pth (docs/released.md)."""
    assert len(published_shapes("video", 32, 576)) == 552


def test_bf16_becomes_float32(published):
    state = {
        name: tensor if tensor.dtype == torch.int64 else tensor.bfloat16()
        for name, tensor in published.state("joint").items()
    }
    made = fitted(published, "joint", "stage2", state)
    found = made.model.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert found["vision_proj.weight"].equal(state["vision_proj.weight"].float())
    assert "converted: bfloat16 to float32" in made.notes


def test_a_joint_file_gives_its_encoder_alone(published):
    given = published.state("joint")
    made = fitted(published, "joint", "stage1")
    assert isinstance(made.model, VideoMamba)
    for name, tensor in made.model.state_dict().items():
        assert tensor.equal(given[f"vision_encoder.{name}"]), name
    head = fitted(published, "joint", "classifier", classes=5).model
    assert head.head.weight.shape == (5, 48)


def test_a_masked_file_starts_a_joint_model(published, tmp_path):
    made = fitted(published, "masked", "stage2")
    assert made.meta.joint is None
    assert made.meta.vision.align_width == 24


def test_a_head_is_made_where_one_is_asked_for_and_none_is_there(published):
    with pytest.raises(UserError, match="has no head") as error:
        fitted(published, "masked", "classifier")
    assert "--classes" in error.value.cure
    heads = []
    for seed in (1, 2):  # the new head does not depend on what was drawn before
        torch.manual_seed(seed)
        heads.append(fitted(published, "masked", "classifier", classes=9).model.head)
    first, second = heads
    assert first.weight.equal(second.weight)
    assert first.weight.std() > 0.01
    other = fitted(published, "video", "classifier", classes=7)
    assert not other.model.head.weight.equal(published.state("video")["head.weight"])
    assert any("left out: head.weight, head.bias" in note for note in other.notes)


def test_tables_are_resized_as_their_shapes_ask(published):
    given = published.state("video")
    made = fitted(published, "video", "classifier", frames=10, image_size=48).model.state_dict()
    temporal = F.interpolate(given["temporal_pos_embedding"].transpose(1, 2), size=10, mode="linear").transpose(1, 2)
    assert made["temporal_pos_embedding"].equal(temporal)
    grid = given["pos_embed"][:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    spatial = F.interpolate(grid, size=(6, 6), mode="bicubic").flatten(2).transpose(1, 2)
    assert made["pos_embed"][:, 1:].equal(spatial)
    assert made["pos_embed"][:, :1].equal(given["pos_embed"][:, :1])
    same = fitted(published, "video", "classifier", frames=4, image_size=32)
    assert same.model.state_dict()["pos_embed"].equal(given["pos_embed"])
    assert not any("resized" in note for note in same.notes)


@pytest.mark.parametrize("how", ["center", "average"])
@pytest.mark.parametrize("tubelet", [2, 3])
def test_an_inflated_kernel_sees_a_still_picture_as_before(published, how, tubelet):
    """Every frame of a tubelet being the same picture, both inflations give the image model's tokens."""
    made = fitted(published, "image", "classifier", tubelet=tubelet, frames=2 * tubelet, inflate=how).model
    flat = fitted(published, "image", "classifier", tubelet=1, frames=2).model
    picture = torch.randn(1, 3, 1, 32, 32)
    tokens = made.patch_embed(picture.expand(-1, -1, 2 * tubelet, -1, -1))
    torch.testing.assert_close(tokens, flat.patch_embed(picture.expand(-1, -1, 2, -1, -1)))
    kernel = made.patch_embed.proj.weight
    if how == "center":
        assert [bool(kernel[:, :, t].any()) for t in range(tubelet)] == [t == tubelet // 2 for t in range(tubelet)]
    else:
        assert kernel[:, :, 0].equal(kernel[:, :, -1])


def test_a_kernel_of_frames_is_not_stretched(published):
    state = published.state("video")
    state["patch_embed.proj.weight"] = torch.randn(48, 3, 2, 8, 8)
    assert fitted(published, "video", "classifier", state).meta.vision.frames == 8
    with pytest.raises(UserError, match="only one frame can be made 4"):
        fitted(published, "video", "classifier", state, tubelet=4)


def test_everything_wrong_is_in_one_message(published):
    state = published.state("video")
    for i in range(3):
        del state[f"layers.{i}.mixer.A_b_log"]
    state["layers.1.mixer.in_projj.weight"] = state.pop("layers.1.mixer.in_proj.weight")
    state["layers.2.mixer.x_proj.weight"] = torch.zeros(3, 96)
    state["head.bias"] = torch.zeros(8)
    state["ema.decay"] = torch.zeros(1)
    with pytest.raises(UserError) as error:
        fitted(published, "video", "classifier", state)
    for said in (
        "supervised on videos",
        "missing 4: ",
        "layers.{0-2}.mixer.A_b_log",
        "layers.1.mixer.in_proj.weight (nearest: layers.*.mixer.in_projj.weight)",
        "left over 2: ",
        "layers.1.mixer.in_projj.weight (nearest: layers.*.mixer.in_proj.weight)",
        "ema.decay",
        "of another shape 2: ",
        "layers.2.mixer.x_proj.weight is 3x96, expected 35x96",
        "head.bias is 8, expected 7",
    ):
        assert said in error.value.cause, said


def test_the_file_s_own_names_are_used_in_messages(published):
    state = published.state("image")
    del state["norm_f.weight"]
    with pytest.raises(UserError, match=r"missing 1: norm_f\.weight"):
        fitted(published, "image", "classifier", state)
    state = published.state("joint")
    state["temp"] = torch.zeros(2)
    with pytest.raises(UserError, match="temp is 2, expected a scalar"):
        fitted(published, "joint", "stage2", state)


def test_a_model_that_scans_one_way_is_recognised(published):
    state = {
        name: t
        for name, t in published.state("video").items()
        if "_b." not in name and not name.endswith(("_b", "_b_log"))
    }
    with pytest.raises(UserError, match=r"layers\.\{0-2\}\.mixer\.conv1d_b\.weight") as error:
        fitted(published, "video", "classifier", state)
    assert "one way only" in error.value.cure


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("layers.0.mixer.D", torch.ones(96, dtype=torch.int8), "int8"),
        ("layers.2.norm.weight", torch.full((48,), float("nan")), "not finite"),
        ("pos_embed", torch.zeros(1, 13, 48), "no square grid"),
        ("layers.0.mixer.A_log", torch.zeros(50, 16), "no multiple of the width"),
    ],
)
def test_numbers_and_shapes_that_cannot_be(published, name, value, said):
    with pytest.raises(UserError, match=said):
        fitted(published, "masked", "stage1", published.state("masked") | {name: value})


def test_a_file_that_lacks_what_sizes_are_read_from(published):
    state = {
        name: t for name, t in published.state("masked").items() if "pos_embed" not in name and "dt_proj" not in name
    }
    with pytest.raises(UserError, match=r"missing: layers\.0\.mixer\.dt_proj\.weight, pos_embed"):
        fitted(published, "masked", "stage1", state)


def test_weights_of_something_else(published):
    with pytest.raises(UserError, match="not the weights of a VideoMamba") as error:
        fitted(published, "video", "classifier", {"visual.conv1.weight": torch.zeros(2, 3, 4, 4)})
    assert "visual.conv1.weight" in error.value.cause


def test_tied_tensors_under_one_name_or_two(published):
    state = published.state("joint")
    del state["text_encoder.cls.predictions.decoder.weight"], state["text_encoder.cls.predictions.decoder.bias"]
    made = fitted(published, "joint", "stage2", state).model
    assert isinstance(made, JointModel)
    predictions = made.text_encoder.cls.predictions
    assert predictions.decoder.weight is made.text_encoder.bert.embeddings.word_embeddings.weight
    assert predictions.decoder.weight.equal(state["text_encoder.bert.embeddings.word_embeddings.weight"])
    state["text_encoder.cls.predictions.decoder.bias"] = state["text_encoder.cls.predictions.bias"] + 1
    with pytest.raises(UserError, match="are one tensor in the release and differ"):
        fitted(published, "joint", "stage2", state)


def test_heads_are_64_wide_unless_said(published):
    with pytest.raises(UserError, match="how many heads"):
        fitted(published, "joint", "stage2", heads=None)


def test_several_aligned_layers_are_counted(published):
    state = published.state("masked")
    state |= {name.replace("r.0.", "r.1."): tensor + 1 for name, tensor in state.items() if "clip_decoder" in name}
    made = fitted(published, "masked", "stage1", state)
    assert made.meta.vision.align_layers == 2
    assert made.model.state_dict()["clip_decoder.1.head.bias"].equal(state["clip_decoder.0.head.bias"] + 1)


def test_alignment_source_is_the_user_s_to_choose(published):
    assert fitted(published, "masked", "stage1", align_source="output").meta.vision.align_source == "output"
    assert fitted(published, "masked", "classifier", classes=2).meta.vision.align_source == "output"


def test_layouts_compute_what_they_hold(published):
    """The same encoder as video and as masked file gives the same tokens; the joint's through its prefix."""
    video = published.state("video")
    clip = torch.randn(2, 3, 4, 32, 32)
    masked = {ours(name): t for name, t in video.items() if not name.startswith("head.")}
    joint = published.state("joint") | {f"vision_encoder.{name}": t for name, t in masked.items()}
    with torch.no_grad():
        first = fitted(published, "video", "classifier").model(clip).tokens_BLD
        second = fitted(published, "masked", "stage1", masked).model(clip).tokens_BLD
        third = fitted(published, "joint", "stage2", joint).model.vision_encoder(clip).tokens_BLD
    assert first.equal(second)
    assert first.equal(third)
    assert first.std() > 0.1
