"""timm models behind open_clip's TimmModel that end in a map and its mean: ConvNeXt, FastViT (MobileCLIP), Swin.

F frames, N cells of the map (row by row), W its channels, C the width that the tower puts out.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from pretrain.models.towers.tower import SUPPORTED, Seen, Tower, pair, resize


def timm_map(visual: Any, image_size: int | None) -> Tower:
    """The tower of such a TimmModel; `image_size` pixels a side, or its own. One frame is run to see its map.

    UserError if it does not end in a map, or if its sizes do not allow `image_size`.
    """
    own = pair(visual.image_size)
    rows, columns, _ = _look(visual, own).shape[1:]
    resize(own, (own[0] // rows, own[1] // columns), image_size, visual.set_input_size)
    size = pair(visual.image_size)
    try:
        seen_1HWW = _look(visual, size)
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"The teacher's {type(visual.trunk).__name__} cannot look at {size[0]} pixels: {error}.",
            f"Leave teacher.image_size out for {own[0]}.",
        ) from error
    project = partial(_pool_alone, visual)
    return Tower(
        module=visual,
        blocks=(),
        depth=1,
        size=size,
        grid=(seen_1HWW.shape[1], seen_1HWW.shape[2]),
        width=project(seen_1HWW[0, 0].float()).shape[-1],
        see=partial(_see, visual),
        norm=nn.Identity(),
        project=project,
        pooled=True,
        attends=False,
    )


@torch.no_grad()
def _look(visual: Any, size: tuple[int, int]) -> Tensor:
    weight = next(visual.parameters())
    return _cells(visual.trunk, visual.trunk.forward_features(weight.new_zeros(1, 3, *size)))


def _see(visual: Any, pixels_FCHW: Tensor, _: Sequence[int]) -> Seen:
    features = visual.trunk.forward_features(pixels_FCHW)
    pooled: Tensor = visual.head(visual.trunk.forward_head(features))
    return Seen([pooled.float()], [_cells(visual.trunk, features).flatten(1, 2)], None)


def _channels_last(trunk: Any) -> bool:
    return str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")


def _cells(trunk: Any, features: Any) -> Tensor:
    """The map as (F, rows, columns, W)."""
    if not isinstance(features, Tensor) or features.dim() != 4:
        raise UserError(
            f"The teacher's visual tower is a {type(trunk).__name__} that ends in neither tokens nor a map.",
            f"Choose {SUPPORTED}.",
        )
    cells_FHWW: Tensor = features if _channels_last(trunk) else features.permute(0, 2, 3, 1)
    return cells_FHWW


def _pool_alone(visual: Any, cells_W: Tensor) -> Tensor:
    """What the tower would put out, (..., C), if each cell (..., W) were the whole map: norms and head, no pooling."""
    maps_FW = cells_W.flatten(0, -2)
    maps = maps_FW[:, None, None] if _channels_last(visual.trunk) else maps_FW[:, :, None, None]
    out_FC = visual.head(visual.trunk.forward_head(maps))
    out_C: Tensor = out_FC.unflatten(0, cells_W.shape[:-1])
    return out_C
