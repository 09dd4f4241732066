"""The encoder as a whole: sizes, seeing less, images, resizing, drop path, poolings, stems, initialisation."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from pretrain.models.config import SIZES, JointConfig, TextConfig, VisionConfig
from pretrain.models.drop import keep_factors
from pretrain.models.joint import JointModel
from pretrain.models.mixer import Mixer
from pretrain.models.pos_embed import resize_spatial, resize_temporal, sincos_table
from pretrain.models.videomamba import VideoMamba


def small(**options) -> VisionConfig:
    settings = {"depth": 2, "width": 32, "patch_size": 8, "tubelet": 2, "frames": 4, "image_size": 32, "d_state": 4}
    return VisionConfig(**settings | options)


@pytest.fixture
def clip():
    return torch.randn(3, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def build(config: VisionConfig) -> VideoMamba:
    torch.manual_seed(0)
    model = VideoMamba(config)
    # Zeros at the start would hide a temporal embedding or a cls token that is never added.
    torch.nn.init.normal_(model.temporal_pos_embedding)
    torch.nn.init.normal_(model.cls_token)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("tiny", {"classes": 400}, 7_033_744),
        ("small", {"classes": 400}, 25_568_656),
        ("middle", {"classes": 400}, 73_875_856),
        ("base", {"classes": 400}, 97_143_184),
        ("tiny", {"frames": 1, "classes": 1000}, 7_148_008),
        ("small", {"frames": 1, "classes": 1000}, 25_796_584),
        ("middle", {"frames": 1, "classes": 1000}, 74_217_448),
        ("base", {"frames": 1, "classes": 1000}, 97_598_440),
        ("middle", {"align_width": 512}, 73_941_504),
        ("middle", {"align_width": 512, "pool_norm": True}, 73_942_656),
    ],
)
def test_published_sizes(name, options, count):
    with torch.device("meta"):
        model = VideoMamba(VisionConfig(name=name, **options))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "tiny", "depth": 3}, "name 'tiny' means"),
        ({"image_size": 30}, "does not divide by patch_size"),
        ({"frames": 3}, "do not divide by tubelet"),
        ({"patch_size": 6, "image_size": 30, "stem": "conv"}, "divides by 4"),
        ({"depht": 3}, "depht"),
    ],
)
def test_configs_that_cannot_be(options, said):
    with pytest.raises(ValidationError, match=said):
        small(**options)


def test_a_name_gives_depth_and_width():
    config = VisionConfig(name="small")
    assert (config.depth, config.width) == SIZES["small"]
    assert config.grid == (8, 14, 14)
    assert config.rank == math.ceil(384 / 16)


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_seeing_every_token_is_seeing_the_clip(clip, stem):
    model = build(small(stem=stem, align_width=8))
    everything = torch.arange(1 + 2 * 16).expand(3, -1)
    whole, listed = model(clip), model(clip, everything)
    torch.testing.assert_close(whole.tokens_BLD, listed.tokens_BLD)
    torch.testing.assert_close(model.align(whole), model.align(listed))
    assert whole.frames == 2
    assert whole.length == 33


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_hidden_patches_are_not_seen(clip, stem):
    model = build(small(stem=stem))
    visible = torch.tensor([[0, 2, 9, 17, 32], [0, 1, 2, 3, 4], [0, 5, 18, 30, 31]])
    before = model(clip, visible).tokens_BLD
    keep = torch.zeros(3, 33, dtype=torch.bool).scatter(1, visible, True)[:, 1:].view(3, 2, 4, 4)
    pixels = keep.repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)[:, None]
    after = model(torch.where(pixels, clip, torch.randn_like(clip)), visible).tokens_BLD
    torch.testing.assert_close(before, after)
    assert not torch.allclose(before, model(torch.where(pixels, torch.randn_like(clip), clip), visible).tokens_BLD)


def test_the_conv_stem_is_its_convolutions(clip):
    model = build(small(stem="conv"))
    embed = model.patch_embed
    frames = clip.transpose(1, 2).flatten(0, 1)
    lit = F.gelu(embed.stem(frames)).unflatten(0, (3, 4)).transpose(1, 2)
    tokens = embed.proj(lit).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(clip), tokens, rtol=1e-4, atol=1e-5)


def test_the_order_of_frames_and_rows_is_seen_in_both_directions(clip):
    model = build(small())
    with torch.no_grad():
        for name, value in model.layers.named_parameters():
            if "x_proj" in name or "in_proj" in name:
                value.copy_(torch.randn_like(value) * 0.3)
    tokens = model(clip).tokens_BLD
    last, first = clip.clone(), clip.clone()
    last[:, :, -1, -8:, -8:] += 1
    first[:, :, 0, :8, :8] += 1
    assert not torch.allclose(tokens[:, 1], model(last).tokens_BLD[:, 1], atol=1e-6)
    assert not torch.allclose(tokens[:, -1], model(first).tokens_BLD[:, -1], atol=1e-6)


def test_both_directions_are_the_same_map_when_their_weights_are():
    torch.manual_seed(0)
    mixer = Mixer(small())
    with torch.no_grad():
        for value in mixer.parameters():
            value.copy_(torch.randn_like(value) * 0.3)
        state = mixer.state_dict()
        for name in ("A_b_log", "D_b", "conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight",
                     "dt_proj_b.bias"):  # fmt: skip
            state[name].copy_(state[name.replace("_b", "", 1)])
    tokens = torch.randn(2, 7, 32)
    torch.testing.assert_close(mixer(tokens).flip(1), mixer(tokens.flip(1)), rtol=1e-4, atol=1e-5)


def test_an_image_has_no_time_and_fills_a_tubelet(clip):
    model = build(small())
    image = clip[:, :, :1]
    out = model(image)
    assert out.tokens_BLD.shape == (3, 17, 32)
    assert out.frames == 1
    with torch.no_grad():
        model.temporal_pos_embedding += 5
    torch.testing.assert_close(model(image).tokens_BLD, out.tokens_BLD)
    twice = image.expand(-1, -1, 2, -1, -1)
    assert not torch.allclose(model(twice).tokens_BLD, out.tokens_BLD, atol=1e-4)
    with torch.no_grad():
        model.temporal_pos_embedding.zero_()
    torch.testing.assert_close(model(twice).tokens_BLD, out.tokens_BLD)


def test_other_lengths_and_sizes_resize_the_positions():
    model = build(small(align_width=8))
    out = model(torch.randn(1, 3, 8, 48, 40))
    assert out.tokens_BLD.shape == (1, 1 + 4 * 6 * 5, 32)
    assert model.align(out).shape == (1, 1, 121, 8)
    with pytest.raises(ValueError, match="3 frames of 32x36"):
        model(torch.randn(1, 3, 3, 32, 36))


def test_position_tables():
    spatial, temporal = torch.randn(1, 17, 6), torch.randn(1, 4, 6)
    assert resize_spatial(spatial, (4, 4)) is spatial
    assert resize_temporal(temporal, 4) is temporal
    assert resize_spatial(spatial, (2, 6))[:, 0].equal(spatial[:, 0])
    with pytest.raises(ValueError, match="not a square"):
        resize_spatial(spatial[:, 1:], (2, 2))
    table = sincos_table(5, 6)
    for position in range(5):
        for column in range(6):
            angle = position / 10000 ** (2 * (column // 2) / 6)
            assert table[position, column] == pytest.approx(math.sin(angle) if column % 2 == 0 else math.cos(angle))


def test_poolings(clip):
    model = build(small(pool_norm=True))
    tokens = model(clip).tokens_BLD
    cls, patches = tokens[:, :1], tokens[:, 1:]
    frames = patches.view(3, 2, 16, 32).mean(2)
    expected = {"cls": cls, "avg": frames, "cls+avg": cls + frames, "cls_cat_avg": torch.cat([cls, frames], 1)}
    for pool, value in expected.items():
        torch.testing.assert_close(model.pooled(tokens, 2, pool, per_frame=True), model.pool_norm(value))
    torch.testing.assert_close(model.pooled(tokens), model.pool_norm(cls + patches.mean(1, keepdim=True)))


def test_drop_path_belongs_to_the_sample(clip):
    model = build(small(drop_path=0.5, depth=6))
    still = model(clip).tokens_BLD
    model.train()
    seeds = torch.tensor([11, 12, 13])
    whole = model(clip, seeds_B=seeds).tokens_BLD
    torch.testing.assert_close(model(clip[1:2], seeds_B=seeds[1:2]).tokens_BLD, whole[1:2])
    assert not torch.allclose(whole, model(clip, seeds_B=seeds + 100).tokens_BLD)
    assert not torch.allclose(whole, still)
    factors = keep_factors(model.config.drop_rates, torch.empty(4000), "drop_path", torch.arange(4000))
    rates = torch.linspace(0, 0.5, 6)
    torch.testing.assert_close((factors == 0).float().mean(0), rates, atol=0.03, rtol=0)
    torch.testing.assert_close(factors.mean(0), torch.ones(6), atol=0.06, rtol=0)


def test_recomputing_blocks_changes_no_gradient(clip):
    gradients = []
    for again in (False, True):
        model = build(small(checkpoint_blocks=again, drop_path=0.3)).train()
        model(clip, seeds_B=torch.arange(3)).tokens_BLD.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name])


def test_every_parameter_is_initialised(monkeypatch):
    """The tensors that layers allocate are filled with NaN first, so that a forgotten one shows."""
    sizes = small(align_width=8, pool_norm=True, classes=5, stem="conv")
    for layer in (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.LayerNorm):
        whole = layer.reset_parameters

        def fill(self, whole=whole):
            for p in self.parameters(recurse=False):
                torch.nn.init.constant_(p, math.nan)
            if not isinstance(self, torch.nn.Linear):
                whole(self)

        monkeypatch.setattr(layer, "reset_parameters", fill)
    for rule in ("mamba", "released"):
        model = VideoMamba(sizes.model_copy(update={"dt_init": rule}))
        assert [name for name, p in model.named_parameters() if not torch.isfinite(p).all()] == []


def test_the_time_step_starts_as_mambas_or_as_released():
    for layer in VideoMamba(small(width=64)).layers:
        for projection in (layer.mixer.dt_proj, layer.mixer.dt_proj_b):
            step = F.softplus(projection.bias)
            assert step.min() >= 1e-3 * 0.99
            assert step.max() <= 1e-1 * 1.01
            assert step.log().std() > 1
    for layer in VideoMamba(small(dt_init="released")).layers:
        assert not layer.mixer.dt_proj.bias.any()
        assert not layer.mixer.dt_proj_b.bias.any()


def test_states_and_residual_stay_in_float32_under_autocast(clip):
    model = build(small(align_width=8)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(clip, torch.arange(0, 33, 2).expand(3, -1))
    assert out.tokens_BLD.dtype == torch.float32
    exact = model(clip, torch.arange(0, 33, 2).expand(3, -1)).tokens_BLD
    assert (out.tokens_BLD - exact).norm() / exact.norm() < 0.05
    out.tokens_BLD.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_joint_model_meets_in_unit_vectors_and_holds_its_temperature(clip):
    text = TextConfig(width=16, heads=2, layers=1, fusion_layers=1, intermediate=32, vocab_size=40, max_tokens=8)
    model = JointModel(JointConfig(vision=small(), text=text, embed=12)).eval()
    assert model.temp.shape == (1,)
    seen = model.vision_encoder(clip)
    video = model.embed_video(model.vision_encoder.pooled(seen.tokens_BLD, seen.frames, per_frame=True))
    assert video.shape == (3, 2, 12)
    torch.testing.assert_close(video.norm(dim=-1), torch.ones(3, 2))
    with torch.no_grad():
        model.temp.fill_(3.0)
    model.clamp_temperature()
    assert model.temp.item() == 0.5
