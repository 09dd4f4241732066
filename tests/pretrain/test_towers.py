"""Towers with a cls token: each is held against its own forward pass and an attention computed in full."""

import pytest
import torch
from torch import nn

from configs.errors import UserError
from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.models.teacher import ClipTeacher
from tests.pretrain.tower_cases import clip_vit, shake, small_timm

ensure_torchvision()
from open_clip.timm_model import TimmModel  # noqa: E402

TOWERS = {
    "open_clip, plain blocks": lambda: clip_vit(),
    "open_clip, layer scale and no pre-norm": lambda: clip_vit(ls_init_value=0.3, no_ln_pre=True),
    "open_clip, custom blocks with normed queries": lambda: clip_vit(qk_norm=True, scale_attn=True),
    "timm ViT, linear projection": lambda: small_timm("vit_tiny_patch16_224", pool="token", proj="linear"),
    "timm ViT of CLIP, classifier as projection": lambda: small_timm(
        "vit_base_patch16_clip_224", pool="token", proj=None
    ),
    "timm ViT, relative positions": lambda: small_timm(
        "vit_relpos_medium_patch16_cls_224", pool="", proj="linear", global_pool="token"
    ),
    "timm EVA, rotated queries": lambda: small_timm("eva02_base_patch16_clip_224", pool="token", proj=None),
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
    shake(visual)
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


def test_an_attention_that_cannot_be_seen_is_refused():
    visual = small_timm("vit_tiny_patch16_224", pool="token", proj="linear")
    visual.trunk.blocks[-1].attn.fused_attn = False
    with pytest.raises(UserError, match=r"attention of the teacher's last block \(Block\) cannot be read"):
        ClipTeacher(visual).features(torch.randn(1, 1, 3, 32, 32))


def test_a_tower_that_open_clip_has_in_no_model_is_refused_by_name():
    with pytest.raises(UserError, match="visual tower is a Linear, which open_clip has in none"):
        ClipTeacher(nn.Linear(2, 2))
    with pytest.raises(UserError, match="ResNet with a pooling of timm's own"):
        ClipTeacher(small_timm("resnet18", pool="rot_attn", proj=None, image_size=64))
    with pytest.raises(UserError, match="pools by two attentions") as refused:
        ClipTeacher(clip_vit(attentional_pool="parallel", attn_pooler_heads=2))
    assert "ViT-B-16-quickgelu" in refused.value.cure
