"""open_clip's own VisionTransformer: OpenAI's, LAION's, DataComp's and other CLIPs, CLIPA's, CoCa's.

F frames, M = 1 + N tokens (cls first), W the tower's width, C the width that it projects to.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from pretrain.models.pos_embed import resize_spatial
from pretrain.models.towers.attention import heads_attention, watch_first
from pretrain.models.towers.tower import SUPPORTED, Seen, Tower, joined, pair, resize


def open_clip_vit(visual: Any, image_size: int | None) -> Tower:
    """The tower of an open_clip VisionTransformer; `image_size` pixels a side, or its own."""
    resize(pair(visual.image_size), pair(visual.patch_size), image_size, partial(_resize, visual))
    if visual.attn_pool is not None and (visual.attn_pool_contrastive is not None or visual.pool_type != "tok"):
        raise UserError(
            f"The teacher pools by two attentions in a row or side by side ({visual.attn_pool_type or 'avg'}), "
            "which open_clip has as an untested option.",
            f"Choose {SUPPORTED}.",
        )
    by_attention = visual.attn_pool is not None
    by_token = visual.pool_type == "tok" and not by_attention
    see = partial(_see_cls if by_token else _see_pooled, visual)
    return Tower(
        module=visual,
        blocks=visual.transformer.resblocks,
        depth=len(visual.transformer.resblocks),
        size=pair(visual.image_size),
        grid=pair(visual.grid_size),
        width=visual.transformer.width if visual.proj is None else visual.proj.shape[1],
        see=see,
        norm=nn.Identity() if by_attention else visual.ln_post,
        project=partial(_pool_alone, visual) if by_attention else partial(_project, visual),
        pooled=not by_token,
        attends=by_token or by_attention,
    )


def _see_cls(visual: Any, pixels_FCHW: Tensor, layers: Sequence[int]) -> Seen:
    with watch_first(visual.transformer.resblocks[-1]) as attention:
        tokens = _tokens(visual, pixels_FCHW, layers)
    return Seen([x[:, 0] for x in tokens], [x[:, 1:] for x in tokens], attention()[:, 1:])


def _see_pooled(visual: Any, pixels_FCHW: Tensor, layers: Sequence[int]) -> Seen:
    tokens = _tokens(visual, pixels_FCHW, layers)
    attention = None if visual.attn_pool is None else _pooling_attention(visual.attn_pool, tokens[-1])[:, 1:]
    return Seen([_project(visual, visual._pool(x)[0].float()) for x in tokens], [x[:, 1:] for x in tokens], attention)


def _tokens(visual: Any, pixels_FCHW: Tensor, layers: Sequence[int]) -> list[Tensor]:
    out = visual.forward_intermediates(
        pixels_FCHW, indices=list(layers), output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
    )
    return [*map(joined, out["image_intermediates_prefix"], out["image_intermediates"])]


def _project(visual: Any, tokens: Tensor) -> Tensor:
    return tokens if visual.proj is None else tokens @ visual.proj.float()


def _pool_alone(visual: Any, tokens_W: Tensor) -> Tensor:
    """What the pooling makes of each token (..., W) with no other to attend to, which is the same for all queries."""
    attention = visual.attn_pool.attn
    weight, bias = _projections(attention)[2]
    value = nn.functional.linear(visual.attn_pool.ln_k(tokens_W), weight, bias)
    return _project(visual, visual.ln_post(attention.out_proj(value)))


def _pooling_attention(pool: Any, tokens_FMW: Tensor) -> Tensor:
    """Of the first query of open_clip's AttentionalPooler, mean over heads, (F, M) float32."""
    (query_weight, query_bias), (key_weight, key_bias), _ = _projections(pool.attn)
    with torch.autocast(tokens_FMW.device.type, enabled=False):
        query_1W = nn.functional.linear(pool.ln_q(pool.query[:1]).float(), query_weight, query_bias)
        key_FMW = nn.functional.linear(pool.ln_k(tokens_FMW).float(), key_weight, key_bias)
        return heads_attention(query_1W.expand(len(key_FMW), -1), key_FMW, pool.attn.num_heads)


def _projections(attention: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of queries, keys and values, float32, however torch keeps them."""
    weights: tuple[Tensor, ...] = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    if attention.in_proj_weight is not None:  # the tokens have the width of the queries
        weights = attention.in_proj_weight.chunk(3)
    return [(w.float(), b.float()) for w, b in zip(weights, attention.in_proj_bias.chunk(3), strict=True)]


def _resize(visual: Any, image_size: int) -> None:
    rows, columns = (image_size // side for side in visual.patch_size)
    table_1MW = resize_spatial(visual.positional_embedding.detach()[None], (rows, columns))
    visual.positional_embedding = nn.Parameter(table_1MW[0], requires_grad=False)
    visual.image_size, visual.grid_size = (image_size, image_size), (rows, columns)
