"""timm's ViTs behind open_clip's TimmModel, however they pool: EVA, SigLIP, PE-Core, ViTamin, MobileCLIP-B and others.

F frames, M = P + N tokens (P prefix tokens, cls first where there is one), W the tower's width, C what it puts out.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from pretrain.models.towers.attention import watch_first
from pretrain.models.towers.tower import Seen, Tower, joined, pair, resize


def is_timm_vit(trunk: Any) -> bool:
    """Whether a timm model is a sequence of blocks over tokens, with a pooling, a norm and a head after them."""
    return all(hasattr(trunk, part) for part in ("patch_embed", "blocks", "norm", "fc_norm", "set_input_size"))


def timm_vit(visual: Any, image_size: int | None) -> Tower:
    """The tower of a TimmModel with a ViT; `image_size` pixels a side, or its own."""
    trunk = visual.trunk
    patches = trunk.patch_embed
    own, cells = pair(patches.img_size), pair(patches.grid_size)
    resize(own, (own[0] // cells[0], own[1] // cells[1]), image_size, trunk.set_input_size)
    by_attention = getattr(trunk, "attn_pool", None) is not None
    by_token = trunk.global_pool == "token" and not by_attention
    return Tower(
        module=visual,
        blocks=trunk.blocks,
        depth=len(trunk.blocks),
        size=pair(patches.img_size),
        grid=pair(patches.grid_size),
        width=_width(visual),
        see=partial(_see_cls if by_token else _see_pooled, visual),
        norm=nn.Sequential(trunk.norm, trunk.fc_norm),
        project=nn.Sequential(trunk.head, visual.head),
        pooled=not by_token,
        attends=by_token or by_attention,
    )


def _see_cls(visual: Any, pixels_FCHW: Tensor, layers: Sequence[int]) -> Seen:
    with watch_first(visual.trunk.blocks[-1]) as attention:
        prefixes, patches = _tokens(visual, pixels_FCHW, layers)
    cls = [prefix_FPW[:, 0] for prefix_FPW in prefixes if prefix_FPW is not None]
    return Seen(cls, patches, attention()[:, -patches[-1].shape[1] :])


def _see_pooled(visual: Any, pixels_FCHW: Tensor, layers: Sequence[int]) -> Seen:
    trunk = visual.trunk
    prefixes, patches = _tokens(visual, pixels_FCHW, layers)

    def pooled(prefix_FPW: Tensor | None, patch_FNW: Tensor) -> Tensor:
        out: Tensor = visual.head(trunk.forward_head(trunk.norm(joined(prefix_FPW, patch_FNW))))
        return out.float()

    if getattr(trunk, "attn_pool", None) is None:
        return Seen([*map(pooled, prefixes, patches)], patches, None)
    with watch_first(trunk.attn_pool) as attention:  # the deepest layer runs last
        cls = [*map(pooled, prefixes, patches)]
    return Seen(cls, patches, attention()[:, -patches[-1].shape[1] :])


def _tokens(visual: Any, pixels_FCHW: Tensor, layers: Sequence[int]) -> tuple[list[Tensor | None], list[Tensor]]:
    """Prefix tokens, where there are any, and patches after each of `layers`."""
    out = visual.forward_intermediates(
        pixels_FCHW,
        indices=list(layers),
        output_fmt="NLC",
        output_extra_tokens=bool(visual.trunk.num_prefix_tokens),
        intermediates_only=True,
    )
    patches = out["image_intermediates"]
    return out.get("image_intermediates_prefix", [None] * len(patches)), patches


def _width(visual: Any) -> int:
    """What a TimmModel puts out: by open_clip's own head, or by timm's classifier in its place."""
    for layers in (visual.head, nn.Sequential(visual.trunk.head)):
        linear = [layer for layer in layers.modules() if isinstance(layer, nn.Linear)]
        if linear:
            return linear[-1].out_features
    return int(visual.trunk.num_features)
