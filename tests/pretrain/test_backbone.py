"""The encoder as a backbone: features of any layer, as tokens or maps, and the layers that are aligned."""

import pytest
import torch
from pydantic import ValidationError

from pretrain.models.config import VisionConfig
from pretrain.models.pos_embed import sincos_table
from pretrain.models.videomamba import VideoMamba

MIXED = ("spatial_first", "temporal_first", "st_half", "temporal_first")


def build(**options) -> VideoMamba:
    sizes = {"depth": 4, "width": 16, "patch_size": 4, "frames": 4, "tubelet": 2, "image_size": 8, "d_state": 4}
    torch.manual_seed(0)
    model = VideoMamba(VisionConfig(**sizes | options))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "A_log" not in name:
                value.copy_(torch.randn_like(value) * 0.4)
    return model.eval()


@pytest.fixture
def clip():
    return torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


VISIBLE = torch.tensor([[0, 1, 4, 6], [0, 2, 3, 8]])


@pytest.mark.parametrize("order", ["spatial_first", "temporal_first", MIXED])
@pytest.mark.parametrize("visible", [None, VISIBLE], ids=["whole", "masked"])
def test_features_are_those_of_the_layers(clip, order, visible):
    """Against an encoder cut off after that layer, whose own output they are."""
    model = build(scan_order=order)
    features = model.forward_features(clip, visible, layers="all")
    assert features[-1].equal(model(clip, visible).tokens_BLD)
    for depth in (1, 2, 3):
        pattern = order if isinstance(order, str) else order[:depth]
        cut = build(depth=depth, scan_order=pattern)
        cut.load_state_dict(model.state_dict(), strict=False)
        assert features[depth - 1].equal(cut(clip, visible).tokens_BLD)
        assert not features[depth - 1].equal(features[depth])


def test_layers_come_as_they_are_asked_for(clip):
    model = build()
    every = model.forward_features(clip, layers="all")
    asked = model.forward_features(clip, layers=(-1, 0, 2, 2, -4))
    for mine, index in zip(asked, (3, 0, 2, 2, 0), strict=True):
        assert mine.equal(every[index])
    assert model.forward_features(clip, layers=[]) == []
    (last,) = model.forward_features(clip)
    assert last.equal(every[3])
    bare = model.forward_features(clip, layers="all", norm=False)
    for plain, normed in zip(bare, every, strict=True):
        assert model.norm(plain).equal(normed)
        assert not plain.equal(normed)


def test_maps_have_the_place_of_every_patch(clip):
    model = build()
    wide = torch.randn(2, 3, 6, 8, 12)
    (tokens,), (maps,) = (model.forward_features(wide, layers=[1], maps=way) for way in (False, True))
    assert maps.shape == (2, 16, 3, 2, 3)
    for k in range(3):
        for row in range(2):
            for column in range(3):
                assert maps[:, :, k, row, column].equal(tokens[:, 1 + k * 6 + row * 3 + column])
    (image,) = model.forward_features(wide[:, :, :1], maps=True)
    assert image.shape == (2, 16, 1, 2, 3)


def test_layers_after_the_last_one_asked_for_do_not_run(clip):
    model = build()
    ran = []
    for index, block in enumerate(model.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.forward_features(clip, layers=(1, 0))
    assert ran == [0, 1]


def test_gradients_reach_what_a_feature_is_made_of(clip):
    model = build()
    model.forward_features(clip, layers=[1], norm=False)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.layers[1].parameters())
    assert all(p.grad is None for p in (*model.layers[2].parameters(), *model.norm.parameters()))


def test_wrong_requests_say_so(clip):
    model = build()
    with pytest.raises(ValueError, match=r"no layers \[4, -5\]; this encoder has 0 to 3, or -4 to -1"):
        model.forward_features(clip, layers=(0, 4, -5))
    with pytest.raises(ValueError, match="a masked clip has no whole maps"):
        model.forward_features(clip, VISIBLE, maps=True)


# the layers that learn from the teacher


@pytest.mark.parametrize(
    ("layers", "interval", "chosen"),
    [(1, 1.0, (7,)), (2, 1.0, (6, 7)), (3, 2.0, (3, 5, 7)), (4, 1.5, (3, 4, 6, 7)), (8, 1.0, tuple(range(8)))],
)
def test_which_layers_are_aligned(layers, interval, chosen):
    config = VisionConfig(depth=8, width=16, align_layers=layers, align_interval=interval)
    assert config.aligned == chosen


def test_layers_that_are_not_there():
    with pytest.raises(ValidationError, match="reach back further than 8 layers"):
        VisionConfig(depth=8, width=16, align_layers=5, align_interval=2)


@pytest.mark.parametrize("source", ["output", "released"])
@pytest.mark.parametrize("visible", [None, VISIBLE], ids=["whole", "masked"])
def test_each_layer_has_its_own_decoder(clip, source, visible):
    model = build(align_width=6, align_layers=3, align_source=source, scan_order=MIXED)
    student = model.align(model(clip, visible))
    features = model.forward_features(clip, visible, layers=(1, 2, 3))
    if source == "released":  # the last mixer's output and the norm are missing, as published
        (features[2],) = model.forward_features(clip, visible, layers=[2], norm=False)
    table = sincos_table(9, 16)
    place = table if visible is None else table[visible]
    for j, feature in enumerate(features):
        decoder = model.clip_decoder[j]
        expected = decoder.norm(decoder.head(feature + place))
        torch.testing.assert_close(student[j], expected)
    assert student.shape == (3, 2, 9 if visible is None else 4, 6)


def test_one_aligned_layer_keeps_its_names_and_more_add_theirs():
    one, two = (build(align_width=6, align_layers=n).state_dict().keys() for n in (1, 2))
    assert {name for name in one if name.startswith("clip_decoder")} == {
        "clip_decoder.0.head.weight", "clip_decoder.0.head.bias", "clip_decoder.0.norm.weight",
        "clip_decoder.0.norm.bias",
    }  # fmt: skip
    assert {name.replace("decoder.1", "decoder.0") for name in two} == set(one)


def test_the_released_way_takes_one_stream_twice(clip):
    """Two aligned layers are the same stream with and without the norm: what the paper's ablation compared."""
    model = build(align_width=6, align_layers=2, align_source="released")
    before, last = model(clip).aligned
    assert model.norm(last).equal(before)


def test_a_model_of_one_layer_has_something_before_it(clip):
    model = build(depth=1, align_width=6, align_source="released")
    (aligned,) = model(clip).aligned
    assert aligned.equal(model._embed(clip, None)[0])
