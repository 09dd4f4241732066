"""Resizing and augmentation of decoded frames, in uint8, the same for all frames of a clip.

Letters: B clips, T frames, C channels, H and W pixels, S the side of the square that comes out.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.draws import uniform_np
from data_pipeline.preprocess import Interpolation, ResizeRule

ATTEMPTS = 10  # as torchvision's RandomResizedCrop: then the largest centred crop of an allowed ratio

Boxes = npt.NDArray[np.int64]


def crop_boxes(
    seeds_B: npt.NDArray[Any],
    sizes_B2: npt.NDArray[Any],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Boxes:
    """(B, 4) top, left, height, width of one random crop a clip, for frames of `sizes_B2` (height, width).

    The share of the area is uniform in `scale`, the logarithm of width / height uniform in `ratio`.
    """
    height_B, width_B = np.asarray(sizes_B2, dtype=np.float64).T
    draws = uniform_np(seeds_B, "crop", 2 * ATTEMPTS + 2).astype(np.float64)
    area = (scale[0] + (scale[1] - scale[0]) * draws[:, :ATTEMPTS]) * (height_B * width_B)[:, None]
    low, high = np.log(ratio[0]), np.log(ratio[1])
    shape = np.exp(low + (high - low) * draws[:, ATTEMPTS : 2 * ATTEMPTS])
    tries_w = np.rint(np.sqrt(area * shape))
    tries_h = np.rint(np.sqrt(area / shape))
    fits = (tries_w >= 1) & (tries_h >= 1) & (tries_w <= width_B[:, None]) & (tries_h <= height_B[:, None])
    first = np.argmax(fits, axis=1)
    rows = np.arange(len(first))
    fallback_w = np.minimum(width_B, np.rint(height_B * ratio[1]))
    fallback_h = np.minimum(height_B, np.rint(width_B / ratio[0]))
    found = fits.any(axis=1)
    w = np.where(found, tries_w[rows, first], fallback_w)
    h = np.where(found, tries_h[rows, first], fallback_h)
    place = np.where(found[:, None], draws[:, 2 * ATTEMPTS :], 0.5)
    top = np.minimum(np.floor(place[:, 0] * (height_B - h + 1)), height_B - h)
    left = np.minimum(np.floor(place[:, 1] * (width_B - w + 1)), width_B - w)
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


def flips(seeds_B: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """(B,) whether each clip is mirrored: half of them."""
    return uniform_np(seeds_B, "flip", 1)[:, 0] < 0.5


def resize(frames_TCHW: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """uint8 (T, C, *size), anti-aliased; the frames themselves where nothing changes."""
    if frames_TCHW.shape[-2:] == size:
        return frames_TCHW
    return F.interpolate(frames_TCHW, size=size, mode=interpolation, antialias=True, align_corners=False)


def to_square(frames_TCHW: Tensor, size: int, rule: ResizeRule, interpolation: Interpolation) -> Tensor:
    """uint8 (T, C, S, S): stretched straight there, or by the short side and then the centre."""
    if rule == "stretch":
        return resize(frames_TCHW, (size, size), interpolation)
    height, width = frames_TCHW.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(frames_TCHW[..., top : top + side, left : left + side], (size, size), interpolation)


def crop_to_square(frames_TCHW: Tensor, box: npt.NDArray[Any], size: int, interpolation: Interpolation) -> Tensor:
    """uint8 (T, C, S, S): the box (top, left, height, width) of every frame, resized."""
    top, left, height, width = (int(value) for value in box)
    return resize(frames_TCHW[..., top : top + height, left : left + width], (size, size), interpolation)


def from_decoder(frames_THWC: npt.NDArray[np.uint8]) -> Tensor:
    """A (T, C, H, W) view of decoded RGB frames (T, H, W, C), channels last in memory, as the resizer likes it."""
    return torch.from_numpy(np.ascontiguousarray(frames_THWC)).permute(0, 3, 1, 2)
