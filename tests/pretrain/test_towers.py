"""Towers of other makes than OpenAI's: each is held against its own forward pass and an attention computed in full."""

import pytest
import torch
from torch import nn

from configs.errors import UserError
from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.models.teacher import ClipTeacher

ensure_torchvision()
import open_clip  # noqa: E402
import timm  # noqa: E402
from open_clip.timm_model import TimmModel  # noqa: E402
from open_clip.transformer import VisionTransformer  # noqa: E402


def clip_vit(**options):
    return VisionTransformer(32, 8, 24, 2, 3, 2.0, output_dim=10, **options)


def timm_tower(name, **options):
    """A tower as open_clip builds it, of a timm model made small; it gives timm no sizes itself."""
    small = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("open_clip.timm_model.timm.create_model", lambda *a, **k: create(*a, **small, **k))
        return TimmModel(name, 10, image_size=32, **options)


TOWERS = {
    "open_clip, plain blocks": lambda: clip_vit(),
    "open_clip, layer scale and no pre-norm": lambda: clip_vit(ls_init_value=0.3, no_ln_pre=True),
    "open_clip, custom blocks with normed queries": lambda: clip_vit(qk_norm=True, scale_attn=True),
    "timm ViT, linear projection": lambda: timm_tower("vit_tiny_patch16_224", pool="token", proj="linear"),
    "timm ViT of CLIP, classifier as projection": lambda: timm_tower(
        "vit_base_patch16_clip_224", pool="token", proj=None
    ),
    "timm EVA, rotated queries": lambda: timm_tower("eva02_base_patch16_clip_224", pool="token", proj=None),
}


def attention_in_full(visual, pixels):
    """The softmax of the last block, (frames, heads, tokens, tokens), by the tower's own unfused arithmetic."""
    if isinstance(visual, TimmModel):
        attention = visual.trunk.blocks[-1].attn
        attention.fused_attn = False
        seen = []
        hook = attention.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        visual(pixels)
        hook.remove()
        attention.fused_attn = True
        return seen[0]
    block, entering = visual.transformer.resblocks[-1], []
    block.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    visual(pixels)
    normed = block.ln_1(entering[0])
    if isinstance(block.attn, nn.MultiheadAttention):
        return block.attn(normed, normed, normed, need_weights=True, average_attn_weights=False)[1]
    heads = block.attn.num_heads
    query, key, _ = nn.functional.linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
    query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    query, key = block.attn.ln_q(query), block.attn.ln_k(key)
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_tower(name):
    torch.manual_seed(0)
    visual = TOWERS[name]().eval()
    for parameter in visual.parameters():  # many begin at zero or one, which would hide a mistake
        parameter += 0.2 * torch.randn_like(parameter)
    pixels = torch.randn(2, 3, 3, 32, 32)
    teacher = ClipTeacher(visual, ln_post=True, grid=(4, 4), layers=2)
    out = teacher.features(pixels)
    assert out.features_JBLC.shape == (2, 2, 1 + 3 * 16, 10)
    assert out.attention_BKN.shape == (2, 3, 16)
    # With its final norm, the last layer's cls is what the tower itself gives for a frame; the mean over frames here.
    own = visual(pixels.flatten(0, 1)).view(2, 3, 10).mean(1)
    torch.testing.assert_close(out.features_JBLC[-1, :, 0], own, rtol=1e-4, atol=1e-5)
    attention = attention_in_full(visual, pixels.flatten(0, 1)).mean(1)[:, 0, -16:]
    torch.testing.assert_close(out.attention_BKN.flatten(0, 1), attention, rtol=1e-4, atol=1e-6)
    assert attention.std() > 1e-4  # not one that any query would give
    larger = ClipTeacher(visual, image_size=48, grid=(6, 6))
    assert larger.features(torch.randn(1, 2, 3, 48, 48)).features_JBLC.shape == (1, 1, 1 + 2 * 36, 10)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("ModifiedResNet", lambda: open_clip.create_model("RN50", device="meta").visual),
        ("VisionTransformer", lambda: clip_vit(attentional_pool=True, attn_pooler_heads=2)),
        ("VisionTransformer", lambda: timm_tower("vit_base_patch16_siglip_224", pool="map", proj="none")),
    ],
)
def test_a_tower_without_cls_token_is_refused_with_the_ones_that_serve(kind, make):
    with pytest.raises(UserError, match=f"is a {kind} without the cls token") as refused:
        ClipTeacher(make())
    assert "ViT-B-16-quickgelu" in refused.value.cure
    assert "EVA02-B-16" in refused.value.cure


def test_an_attention_that_cannot_be_seen_is_refused():
    visual = timm_tower("vit_tiny_patch16_224", pool="token", proj="linear")
    visual.trunk.blocks[-1].attn.fused_attn = False
    with pytest.raises(UserError, match=r"attention of the teacher's last block \(Block\) cannot be read"):
        ClipTeacher(visual).features(torch.randn(1, 1, 3, 32, 32))
