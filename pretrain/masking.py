"""Which tokens of a clip the student sees: the five masks of VideoMamba as sorted visible indices.

B batch, T token frames, H x W patches of a frame, N = H * W, R = T * H rows, V visible tokens with cls.

    random     any patches of the clip                                 of T N, int(ratio T N) hidden
    tube       the same patches of every frame                         of N, int(ratio N) hidden
    clip_row   whole rows anywhere in the clip ("random_row")          of T H, T int(ratio H) hidden
    frame_row  whole rows, equally many of every frame ("tube_row")    of H a frame, int(ratio H) hidden
    attention  patches drawn by the teacher's cls attention            of N a frame, int(ratio N) hidden

Every draw belongs to its sample's seed, so a mask does not depend on the batch around it or on the device.
A count is `int(ratio * n)` as released. Source: reference 2.4; arXiv 2403.06977, figure 4 and table 5.
"""

from typing import get_args

import torch
from torch import Tensor

from data_pipeline import draws
from pretrain.config import MaskKind

Grid = tuple[int, int, int]
TINY = 1e-20


def visible_count(kind: MaskKind, grid: Grid, ratio: float) -> int:
    """Visible patches of a clip of (T, H, W) patches, cls not counted."""
    T, H, W = grid
    if kind == "random":
        return T * H * W - int(ratio * T * H * W)
    if kind in ("tube", "attention"):
        return T * (H * W - int(ratio * H * W))
    if kind in ("clip_row", "frame_row"):
        return T * (H - int(ratio * H)) * W
    raise ValueError(f"there is no mask '{kind}'; use one of {', '.join(get_args(MaskKind))}")


def visible_indices(
    kind: MaskKind, seeds_B: Tensor, grid: Grid, ratio: float, attention_BTN: Tensor | None = None
) -> Tensor:
    """Sorted indices (B, V) int64 of the tokens to see, 0 (cls) first; patch p of the clip is index 1 + p.

    `seeds_B` (int64) and the result are on one device. "attention" needs the weights `attention_BTN` (not
    negative, any scale): patches are drawn without replacement, each time in proportion to their weight.
    """
    count = visible_count(kind, grid, ratio)
    if count == 0:
        raise ValueError(f"mask '{kind}' at ratio {ratio} hides every patch of a grid of {grid}")
    T, H, W = grid
    N = H * W
    if kind == "random":
        patch_BP = _smallest(draws.uniform(seeds_B, "mask", T * N), count)
    elif kind == "tube":
        within_BM = _smallest(draws.uniform(seeds_B, "mask", N), count // T)
        patch_BP = _spread(within_BM[:, None].expand(-1, T, -1), N)
    elif kind == "clip_row":
        row_BR = _smallest(draws.uniform(seeds_B, "mask", T * H), count // W)
        patch_BP = _columns(row_BR, W)
    elif kind == "frame_row":
        within_BTM = _smallest(draws.uniform(seeds_B, "mask", T, H), count // (T * W))
        patch_BP = _columns(_spread(within_BTM, H), W)
    else:
        if attention_BTN is None or attention_BTN.shape != (len(seeds_B), T, N):
            seen = None if attention_BTN is None else tuple(attention_BTN.shape)
            raise ValueError(f"an attention mask needs attention of {(len(seeds_B), T, N)}, got {seen}")
        patch_BP = _spread(_smallest(_waiting_times(seeds_B, attention_BTN), count // T), N)
    first_B1 = patch_BP.new_zeros(len(patch_BP), 1)
    return torch.cat([first_B1, 1 + patch_BP.sort(dim=1).values], dim=1)


def _waiting_times(seeds_B: Tensor, attention_BTN: Tensor) -> Tensor:
    """Exponential times with the weights as rates, (B, T, N): the first to arrive are a draw without replacement.

    A patch without weight comes after every patch with some, in random order.
    """
    uniform_BTN = draws.uniform(seeds_B, "mask", *attention_BTN.shape[1:]).double()
    return (-torch.log1p(-uniform_BTN)).clamp(min=TINY) / attention_BTN.double().clamp(min=TINY)


def _smallest(key: Tensor, count: int) -> Tensor:
    """Positions of the `count` smallest keys along the last axis; ties go to the earlier one on every device."""
    return key.argsort(dim=-1, stable=True)[..., :count]


def _spread(within_BTM: Tensor, size: int) -> Tensor:
    """Positions within each frame to positions within the clip, (B, T * M), for frames of `size`."""
    offset_T1 = torch.arange(within_BTM.shape[1], device=within_BTM.device)[:, None] * size
    return (within_BTM + offset_T1).flatten(1)


def _columns(row_BR: Tensor, width: int) -> Tensor:
    """Every patch of the rows, (B, R * width)."""
    column_W = torch.arange(width, device=row_BR.device)
    return (row_BR[..., None] * width + column_W).flatten(1)
