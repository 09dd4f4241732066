"""CLIP's ResNets: open_clip's ModifiedResNet, whose last map is pooled by attention.

F frames, N cells of the map (row by row), W its channels, C the width that it puts out.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.pos_embed import resize_spatial
from pretrain.models.towers.attention import heads_attention
from pretrain.models.towers.tower import Seen, Tower, pair, resize

STRIDE = 32


def clip_resnet(visual: Any, image_size: int | None) -> Tower:
    """The tower of a ModifiedResNet; `image_size` pixels a side, or its own."""
    resize(pair(visual.image_size), (STRIDE, STRIDE), image_size, partial(_resize, visual))
    size, pool = pair(visual.image_size), visual.attnpool
    return Tower(
        module=visual,
        blocks=(),
        depth=1,
        size=size,
        grid=(size[0] // STRIDE, size[1] // STRIDE),
        width=pool.c_proj.out_features,
        see=partial(_see, visual),
        norm=nn.Identity(),
        project=nn.Sequential(pool.v_proj, pool.c_proj),
        pooled=True,
        attends=True,
    )


def _see(visual: Any, pixels_FCHW: Tensor, _: Sequence[int]) -> Seen:
    map_FWHW = visual.stem(pixels_FCHW)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        map_FWHW = layer(map_FWHW)
    pool = visual.attnpool
    cell_FNW = map_FWHW.flatten(2).transpose(1, 2).float()
    token_FMW = torch.cat([cell_FNW.mean(1, keepdim=True), cell_FNW], dim=1) + pool.positional_embedding.float()
    with torch.autocast(pixels_FCHW.device.type, enabled=False):
        attention = heads_attention(pool.q_proj(token_FMW[:, 0]), pool.k_proj(token_FMW), pool.num_heads)
    return Seen([pool(map_FWHW).float()], [token_FMW[:, 1:]], attention[:, 1:])


def _resize(visual: Any, image_size: int) -> None:
    side = image_size // STRIDE
    table_1MW = resize_spatial(visual.attnpool.positional_embedding.detach()[None], (side, side))
    visual.attnpool.positional_embedding = nn.Parameter(table_1MW[0], requires_grad=False)
    visual.image_size = image_size
