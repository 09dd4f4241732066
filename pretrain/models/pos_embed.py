"""Position embeddings: resizing the learned ones to another grid or length, and the fixed sin-cos table.

M = 1 + rows * columns positions of a frame (cls first), T frames, D width.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def resize_spatial(pos_1MD: Tensor, grid: tuple[int, int]) -> Tensor:
    """The spatial table (1, 1 + side², D) for a grid of (rows, columns): cls kept, patches resized bicubically.

    The stored grid is square, as in every release; bicubic without antialias (reference 1.8).
    """
    cls_11D, patch_1ND = pos_1MD[:, :1], pos_1MD[:, 1:]
    side = math.isqrt(patch_1ND.shape[1])
    if side * side != patch_1ND.shape[1]:
        raise ValueError(f"a spatial table of {patch_1ND.shape[1]} patches is not a square grid")
    if (side, side) == grid:
        return pos_1MD
    square = patch_1ND.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([cls_11D, resized.flatten(2).transpose(1, 2).to(pos_1MD.dtype)], dim=1)


def resize_temporal(pos_1TD: Tensor, frames: int) -> Tensor:
    """The temporal table (1, T, D) for another number of token frames, by linear interpolation."""
    if pos_1TD.shape[1] == frames:
        return pos_1TD
    along = pos_1TD.float().transpose(1, 2)
    resized = F.interpolate(along, size=frames, mode="linear", align_corners=False)
    return resized.transpose(1, 2).to(pos_1TD.dtype)


def sincos_table(length: int, width: int) -> Tensor:
    """The fixed table (length, D): sin in even columns, cos in odd ones, of pos / 10000^(2 floor(j / 2) / D).

    Computed in float64 and then cast: float32 is off by 1e-4 at 1,569 positions.
    """
    column = torch.arange(width, dtype=torch.float64)
    rate = 10000.0 ** (-2 * torch.floor(column / 2) / width)
    angle_LD = torch.arange(length, dtype=torch.float64)[:, None] * rate
    return torch.where(column % 2 == 0, angle_LD.sin(), angle_LD.cos()).float()
