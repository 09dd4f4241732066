"""Resizing and augmentation of decoded frames, in uint8, the same for all frames of a clip.

Letters: T frames, C channels, H and W pixels, S the side of the square that comes out,
K draws.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.preprocess import Interpolation, ResizeRule

ATTEMPTS = 10  # as torchvision's RandomResizedCrop: then the largest centred crop of an allowed ratio
CROP_DRAWS = 2 * ATTEMPTS + 2

Box = tuple[int, int, int, int]


def crop_box(
    uniforms_K: Sequence[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """(top, left, height, width) of a random crop of a height x width frame, from CROP_DRAWS numbers in [0, 1).

    The share of the area is uniform in `scale`, the logarithm of width / height uniform in `ratio`.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(ATTEMPTS):
        area = (scale[0] + (scale[1] - scale[0]) * uniforms_K[attempt]) * height * width
        shape = math.exp(low + (high - low) * uniforms_K[ATTEMPTS + attempt])
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 1 <= w <= width and 1 <= h <= height:
            return int(uniforms_K[-2] * (height - h + 1)), int(uniforms_K[-1] * (width - w + 1)), h, w
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


MULTI_SCALES = (1.0, 0.875, 0.75, 0.66)


def multi_scale_box(uniforms_2: Sequence[float], height: int, width: int, size: int) -> Box:
    """(top, left, height, width) of TSN's multi-scale crop, from two numbers in [0, 1): a size and a place.

    Both sides are one of MULTI_SCALES of the short side, at most one step apart; a side within two pixels of `size`
    becomes it. The 13 places are the corners, the centre, the middles of the sides and of the quarters.
    Source: reference 2.6; Wang et al., "Temporal Segment Networks", GroupMultiScaleCrop.
    """
    sides = [int(min(height, width) * scale) for scale in MULTI_SCALES]
    sides = [size if abs(side - size) < 3 and size <= min(height, width) else max(1, side) for side in sides]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    h, w = pairs[int(uniforms_2[0] * len(pairs))]
    y, x = (height - h) // 4, (width - w) // 4
    quarters = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3)]
    down, right = quarters[int(uniforms_2[1] * len(quarters))]
    return down * y, right * x, h, w


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


def three_crops(frames_TCHW: Tensor, size: int, interpolation: Interpolation) -> Tensor:
    """uint8 (3, T, C, S, S): the short side resized to S, then the first, middle and last square of the long side."""
    height, width = frames_TCHW.shape[-2:]
    short = min(height, width)
    whole = resize(frames_TCHW, (round(height * size / short), round(width * size / short)), interpolation)
    room_y, room_x = whole.shape[-2] - size, whole.shape[-1] - size
    places = [(room_y * view // 2, room_x * view // 2) for view in range(3)]
    return torch.stack([whole[..., y : y + size, x : x + size] for y, x in places])


def crop_to_square(frames_TCHW: Tensor, box: Box, size: int, interpolation: Interpolation) -> Tensor:
    """uint8 (T, C, S, S): the box (top, left, height, width) of every frame, resized."""
    top, left, height, width = box
    return resize(frames_TCHW[..., top : top + height, left : left + width], (size, size), interpolation)


def from_decoder(frames_THWC: npt.NDArray[np.uint8]) -> Tensor:
    """A (T, C, H, W) view of decoded RGB frames (T, H, W, C), channels last in memory, as the resizer likes it."""
    return torch.from_numpy(np.ascontiguousarray(frames_THWC)).permute(0, 3, 1, 2)
