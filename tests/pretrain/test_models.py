"""The encoder as a whole: sizes, seeing less, images, resizing, drop path, poolings, stems, initialisation."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from pretrain.models.config import SIZES, JointConfig, TextConfig, VisionConfig
from pretrain.models.joint import JointModel
from pretrain.models.mixer import Mixer
from pretrain.models.videomamba import VideoMamba


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
def test_configs_that_cannot_be(small_vision, options, said):
    with pytest.raises(ValidationError, match=said):
        small_vision(**options)


def test_a_name_gives_depth_and_width():
    config = VisionConfig(name="small")
    assert (config.depth, config.width) == SIZES["small"]
    assert config.grid == (8, 14, 14)
    assert config.rank == math.ceil(384 / 16)


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_seeing_every_token_is_seeing_the_clip(encoder, clip, stem):
    model = encoder(stem=stem, align_width=8)
    everything = torch.arange(1 + 2 * 16).expand(3, -1)
    whole, listed = model(clip), model(clip, everything)
    torch.testing.assert_close(whole.tokens_BLD, listed.tokens_BLD)
    torch.testing.assert_close(model.align(whole), model.align(listed))
    assert whole.frames == 2
    assert whole.length == 33


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_hidden_patches_are_not_seen(encoder, clip, stem):
    model = encoder(stem=stem)
    visible = torch.tensor([[0, 2, 9, 17, 32], [0, 1, 2, 3, 4], [0, 5, 18, 30, 31]])
    before = model(clip, visible).tokens_BLD
    keep = torch.zeros(3, 33, dtype=torch.bool).scatter(1, visible, True)[:, 1:].view(3, 2, 4, 4)
    pixels = keep.repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)[:, None]
    after = model(torch.where(pixels, clip, torch.randn_like(clip)), visible).tokens_BLD
    torch.testing.assert_close(before, after)
    assert not torch.allclose(before, model(torch.where(pixels, torch.randn_like(clip), clip), visible).tokens_BLD)


def test_the_order_of_frames_and_rows_is_seen_in_both_directions(encoder, clip):
    model = encoder()
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


def test_both_directions_are_the_same_map_when_their_weights_are(small_vision):
    torch.manual_seed(0)
    mixer = Mixer(small_vision())
    with torch.no_grad():
        for value in mixer.parameters():
            value.copy_(torch.randn_like(value) * 0.3)
        state = mixer.state_dict()
        for name in ("A_b_log", "D_b", "conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight",
                     "dt_proj_b.bias"):  # fmt: skip
            state[name].copy_(state[name.replace("_b", "", 1)])
    tokens = torch.randn(2, 7, 32)
    torch.testing.assert_close(mixer(tokens).flip(1), mixer(tokens.flip(1)), rtol=1e-4, atol=1e-5)


def test_every_parameter_is_initialised(small_vision, monkeypatch):
    """The tensors that layers allocate are filled with NaN first, so that a forgotten one shows."""
    sizes = small_vision(align_width=8, pool_norm=True, classes=5, stem="conv")
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


def test_the_time_step_starts_as_mambas_or_as_released(small_vision):
    for layer in VideoMamba(small_vision(width=64)).layers:
        for projection in (layer.mixer.dt_proj, layer.mixer.dt_proj_b):
            step = F.softplus(projection.bias)
            assert step.min() >= 1e-3 * 0.99
            assert step.max() <= 1e-1 * 1.01
            assert step.log().std() > 1
    for layer in VideoMamba(small_vision(dt_init="released")).layers:
        assert not layer.mixer.dt_proj.bias.any()
        assert not layer.mixer.dt_proj_b.bias.any()


def test_states_and_residual_stay_in_float32_under_autocast(encoder, clip):
    model = encoder(align_width=8).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(clip, torch.arange(0, 33, 2).expand(3, -1))
    assert out.tokens_BLD.dtype == torch.float32
    exact = model(clip, torch.arange(0, 33, 2).expand(3, -1)).tokens_BLD
    assert (out.tokens_BLD - exact).norm() / exact.norm() < 0.05
    out.tokens_BLD.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_joint_model_meets_in_unit_vectors_and_holds_its_temperature(small_vision, clip):
    text = TextConfig(width=16, heads=2, layers=1, fusion_layers=1, intermediate=32, vocab_size=40, max_tokens=8)
    model = JointModel(JointConfig(vision=small_vision(), text=text, embed=12)).eval()
    assert model.temp.shape == (1,)
    seen = model.vision_encoder(clip)
    video = model.embed_video(model.vision_encoder.pooled(seen.tokens_BLD, seen.frames, per_frame=True))
    assert video.shape == (3, 2, 12)
    torch.testing.assert_close(video.norm(dim=-1), torch.ones(3, 2))
    with torch.no_grad():
        model.temp.fill_(3.0)
    model.clamp_temperature()
    assert model.temp.item() == 0.5
