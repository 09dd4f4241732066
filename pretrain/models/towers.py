"""The visual towers that open_clip builds, each brought to the one form that the teacher reads.

F frames, M = P + N tokens (P prefix tokens, cls first; N patches), W the tower's width, C the width that it projects
to, H heads, E width of a head.

Supported: open_clip's own VisionTransformer (OpenAI's, LAION's, DataComp's and other CLIPs, with plain or custom
blocks), and timm's ViT and EVA with a cls token behind open_clip's TimmModel. A tower without a cls token (ResNet,
ConvNeXt, SigLIP) has no cls attention to draw masks by, and is refused by name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from configs.errors import UserError
from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.models.pos_embed import resize_spatial

SUPPORTED = (
    "a ViT of open_clip (such as ViT-B-16-quickgelu), or a ViT or EVA of timm with a cls token (such as EVA02-B-16)"
)


@dataclass(frozen=True)
class Tower:
    """A visual tower: its blocks, the pixels and patches of a frame, its final norm and its projection.

    `module` answers open_clip's `forward_intermediates`. `norm` maps (..., W) to itself, `project` to (..., C).
    """

    module: Any
    blocks: Sequence[nn.Module]
    size: tuple[int, int]
    grid: tuple[int, int]
    width: int
    norm: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]

    def __call__(self, pixels_FCHW: Tensor, layers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Tokens (F, 1 + N, W) after each of `layers`, cls first, and the cls attention (F, N) of the last block.

        The attention is the mean over heads, float32, softmaxed over all M tokens with the prefix columns dropped.
        """
        with watch_cls(self.blocks[-1]) as attention:
            out = self.module.forward_intermediates(
                pixels_FCHW, indices=list(layers), output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
            )
        pairs = zip(out["image_intermediates_prefix"], out["image_intermediates"], strict=True)
        tokens = [torch.cat([prefix_FPW[:, :1], patch_FNW], dim=1) for prefix_FPW, patch_FNW in pairs]
        return tokens, attention()[:, -(self.grid[0] * self.grid[1]) :]


def open_tower(visual: Any, image_size: int | None = None) -> Tower:
    """The tower of an open_clip model, for square frames of `image_size` pixels (None: its own).

    The module itself is changed where the size is another: its positions are resized bicubically. Raises UserError,
    naming what is supported, if it has no cls token, or pools by attention; and for a size its patches do not divide.
    """
    ensure_torchvision()
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        _resize(_pair(visual.image_size), _pair(visual.patch_size), image_size, partial(_resize_clip, visual))
        return Tower(
            module=visual,
            blocks=visual.transformer.resblocks,
            size=_pair(visual.image_size),
            grid=_pair(visual.grid_size),
            width=visual.transformer.width if visual.proj is None else visual.proj.shape[1],
            norm=visual.ln_post,
            project=lambda tokens: tokens if visual.proj is None else tokens @ visual.proj.float(),
        )
    if isinstance(visual, TimmModel) and _has_cls(visual.trunk):
        trunk = visual.trunk
        patches = trunk.patch_embed
        _resize(_pair(patches.img_size), _pair(patches.patch_size), image_size, trunk.set_input_size)
        return Tower(
            module=visual,
            blocks=trunk.blocks,
            size=_pair(patches.img_size),
            grid=_pair(patches.grid_size),
            width=_width(visual),
            norm=nn.Sequential(trunk.norm, trunk.fc_norm),
            project=nn.Sequential(trunk.head, visual.head),
        )
    kind = type(visual.trunk if isinstance(visual, TimmModel) else visual).__name__
    raise UserError(
        f"The teacher's visual tower is a {kind} without the cls token and the plain projection of a CLIP ViT.",
        f"Choose {SUPPORTED}.",
    )


def cls_attention(block: Any, entering_FMW: Tensor) -> Tensor:
    """Attention of the cls token in a block of open_clip with torch's MultiheadAttention, mean over heads, (F, M).

    Only the cls row is computed, in float32.
    """
    attention = block.attn
    normed_FMW = block.ln_1(entering_FMW).float()
    with torch.autocast(normed_FMW.device.type, enabled=False):
        query_weight, key_weight, _ = attention.in_proj_weight.float().chunk(3)
        query_bias, key_bias, _ = attention.in_proj_bias.float().chunk(3)
        query_FHE = F.linear(normed_FMW[:, 0], query_weight, query_bias).unflatten(-1, (attention.num_heads, -1))
        key_FMHE = F.linear(normed_FMW, key_weight, key_bias).unflatten(-1, (attention.num_heads, -1))
        return _softmax_of(query_FHE, key_FMHE.transpose(1, 2))


def _softmax_of(query_FHE: Tensor, key_FHME: Tensor) -> Tensor:
    scores_FHM = torch.einsum("fhe,fhme->fhm", query_FHE, key_FHME) * query_FHE.shape[-1] ** -0.5
    mean_FM: Tensor = scores_FHM.softmax(-1).mean(1)
    return mean_FM


class _Calls(TorchFunctionMode):
    """While it is on, remembers the cls query and the keys that reach scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.seen = args[0][:, :, 0], args[1]
        return function(*args, **(kwargs or {}))


@contextmanager
def watch_cls(block: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Yields what gives, once `block` has run, its cls token's attention (F, M) float32, mean over heads.

    Whatever a block does to its queries and keys (norms, rotations) is seen done. Those with torch's
    MultiheadAttention hide their call; there the row is computed again. UserError if it cannot be seen.
    """
    entered: list[Tensor] = []
    calls = _Calls()
    hidden = isinstance(getattr(block, "attn", None), nn.MultiheadAttention)

    def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entered.append(inputs[0])
        if not hidden:
            calls.__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: Any) -> None:
        if not hidden:
            calls.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def attention() -> Tensor:
        if hidden:
            return cls_attention(block, entered[0])
        if calls.seen is None:
            raise UserError(
                f"The attention of the teacher's last block ({type(block).__name__}) cannot be read.",
                f"Choose {SUPPORTED}.",
            )
        query_FHE, key_FHME = calls.seen
        with torch.autocast(query_FHE.device.type, enabled=False):
            return _softmax_of(query_FHE.float(), key_FHME.float())

    hooks = block.register_forward_pre_hook(enter), block.register_forward_hook(leave, always_call=True)
    try:
        yield attention
    finally:
        for hook in hooks:
            hook.remove()


def _resize(
    own: tuple[int, int], patch: tuple[int, int], image_size: int | None, change: Callable[[int], None]
) -> None:
    if image_size is None or own == (image_size, image_size):
        return
    if any(image_size % side for side in patch):
        raise UserError(
            f"teacher.image_size {image_size} does not divide by the teacher's patches of {patch[0]} pixels.",
            f"Use a multiple of {patch[0]}, or leave it out for {own[0]}.",
        )
    change(image_size)


def _resize_clip(visual: Any, image_size: int) -> None:
    rows, columns = (image_size // side for side in visual.patch_size)
    table_1MW = resize_spatial(visual.positional_embedding.detach()[None], (rows, columns))
    visual.positional_embedding = nn.Parameter(table_1MW[0], requires_grad=False)
    visual.image_size, visual.grid_size = (image_size, image_size), (rows, columns)


def _has_cls(trunk: Any) -> bool:
    """Whether a timm model is a ViT or EVA whose first token is cls, and that does not pool by attention."""
    tokens = getattr(trunk, "cls_token", None) is not None and hasattr(trunk, "blocks")
    return tokens and hasattr(trunk, "fc_norm") and getattr(trunk, "attn_pool", None) is None


def _width(visual: Any) -> int:
    """What a TimmModel projects to: by open_clip's own head, or by timm's classifier in its place."""
    for layers in (visual.head, nn.Sequential(visual.trunk.head)):
        linear = [layer for layer in layers.modules() if isinstance(layer, nn.Linear)]
        if linear:
            return linear[-1].out_features
    return int(visual.trunk.num_features)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, Sequence) else (int(value), int(value))
