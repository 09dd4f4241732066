"""The attention of one query over the tokens, read off a module while it runs: the cls token's, or a pooling's.

F frames, M tokens, W width, H heads, E width of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from configs.errors import UserError
from pretrain.models.towers.tower import SUPPORTED


def cls_attention(block: Any, entering_FMW: Tensor) -> Tensor:
    """Attention of the cls token in a block of open_clip with torch's MultiheadAttention, mean over heads, (F, M).

    Only the cls row is computed, in float32.
    """
    attention = block.attn
    normed_FMW = block.ln_1(entering_FMW).float()
    with torch.autocast(normed_FMW.device.type, enabled=False):
        query_weight, key_weight, _ = attention.in_proj_weight.float().chunk(3)
        query_bias, key_bias, _ = attention.in_proj_bias.float().chunk(3)
        query_FW = F.linear(normed_FMW[:, 0], query_weight, query_bias)
        return heads_attention(query_FW, F.linear(normed_FMW, key_weight, key_bias), attention.num_heads)


def heads_attention(query_FW: Tensor, key_FMW: Tensor, heads: int) -> Tensor:
    """Softmax of one projected query over projected keys, mean over heads, (F, M) float32."""
    query_FHE = query_FW.float().unflatten(-1, (heads, -1))
    key_FHME = key_FMW.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    return softmax_of(query_FHE, key_FHME)


def softmax_of(
    query_FHE: Tensor, key_FHME: Tensor, bias_FHM: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """What scaled_dot_product_attention weighs its values by, for one query; mean over heads, (F, M)."""
    scale = query_FHE.shape[-1] ** -0.5 if scale is None else scale
    scores_FHM = torch.einsum("fhe,fhme->fhm", query_FHE, key_FHME) * scale
    if bias_FHM is not None:
        scores_FHM = scores_FHM + bias_FHM
    mean_FM: Tensor = scores_FHM.softmax(-1).mean(1)
    return mean_FM


class _Calls(TorchFunctionMode):
    """While it is on, remembers what reaches scaled_dot_product_attention of the first query, and its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[Tensor, Tensor, Tensor | None, float | None] | None = None

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            bias = kwargs.get("attn_mask")
            self.seen = args[0][:, :, 0], args[1], None if bias is None else bias[..., 0, :], kwargs.get("scale")
        return function(*args, **kwargs)


@contextmanager
def watch_first(module: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Yields what gives, once `module` has run, its first query's attention (F, M) float32, mean over heads.

    `module` is a block, whose first query is cls, or an attention pooling. Whatever it does to its queries and keys
    (norms, rotations, relative positions) is seen done. Blocks with torch's MultiheadAttention hide their call; there
    the row is computed again. UserError if it cannot be seen.
    """
    entered: list[Tensor] = []
    calls = _Calls()
    hidden = isinstance(getattr(module, "attn", None), nn.MultiheadAttention)

    def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entered.append(inputs[0])
        if not hidden:
            calls.__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: Any) -> None:
        if not hidden:
            calls.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def attention() -> Tensor:
        if hidden:
            return cls_attention(module, entered[0])
        if calls.seen is None:
            raise UserError(
                f"The attention of the teacher's last block ({type(module).__name__}) cannot be read.",
                f"Choose {SUPPORTED}.",
            )
        query_FHE, key_FHME, bias_FHM, scale = calls.seen
        with torch.autocast(query_FHE.device.type, enabled=False):
            return softmax_of(query_FHE.float(), key_FHME.float(), bias_FHM, scale)

    hooks = module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)
    try:
        yield attention
    finally:
        for hook in hooks:
            hook.remove()
