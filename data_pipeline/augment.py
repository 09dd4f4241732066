"""What makes clips more various, in uint8 and the same for all frames of a clip: drawn from the sample's own seed.

The order is crop, mirror, colour jitter, RandAugment, erasing: on frames of the final size, so that an operation
costs what the model's input costs and not what the camera's does. (timm and the release put RandAugment first, on
the decoded frames.) Operations that look at a whole picture (contrast, equalize, autocontrast) look at each frame.
torchvision does what it does as Pillow does; turning and shearing are ours, because Pillow's borders are not its.

Letters: T frames, C channels, H and W pixels.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.config import AugmentConfig
from data_pipeline.draws import uniform_np
from data_pipeline.preprocess import Triple
from data_pipeline.rand_policy import RandAugment, erased_box
from data_pipeline.torchvision_shim import ensure_torchvision

Matrix = tuple[float, float, float, float, float, float]


@lru_cache(maxsize=1)
def _functional() -> Any:
    ensure_torchvision()
    from torchvision.transforms.v2 import functional

    return functional


def augment(frames_TCHW: Tensor, config: AugmentConfig, seed: int, mean: Triple, std: Triple) -> Tensor:
    """uint8 frames with everything of `config` but the crop; `mean` and `std` (of 0..1) fill what becomes empty."""
    if any(config.color_jitter):
        frames_TCHW = color_jitter(frames_TCHW, config.color_jitter, seed)
    if config.rand_augment is not None:
        fill = tuple(round(255 * part) for part in mean)
        for operation, value in RandAugment.parse(config.rand_augment).draw(seed):
            frames_TCHW = operate(frames_TCHW, operation, value, fill)
    return erase(frames_TCHW, config.erase, seed, mean, std) if config.erase else frames_TCHW


def color_jitter(frames_TCHW: Tensor, strength: tuple[float, float, float, float], seed: int) -> Tensor:
    """Brightness, contrast, saturation (factors within 1 - s to 1 + s) and hue (within -s to s turns), in any order."""
    tools = _functional()
    steps: list[Callable[[Tensor, float], Tensor]] = [
        tools.adjust_brightness, tools.adjust_contrast, tools.adjust_saturation, tools.adjust_hue,
    ]  # fmt: skip
    draws = uniform_np(seed, "color_jitter", 8)[0].astype(np.float64)
    for place in np.argsort(draws[4:], kind="stable").tolist():
        width, middle = strength[place], 0.0 if place == 3 else 1.0
        if width:
            low = middle - width if place == 3 else max(0.0, middle - width)
            frames_TCHW = steps[place](frames_TCHW, low + (middle + width - low) * float(draws[place]))
    return frames_TCHW


def operate(frames_TCHW: Tensor, operation: str, value: float, fill: tuple[int, ...]) -> Tensor:
    """One of rand_policy.OPERATIONS with its argument; geometry leaves `fill` (RGB) where no pixel comes from."""
    height, width = frames_TCHW.shape[-2:]
    geometry: dict[str, Callable[[], Matrix]] = {
        "rotate": lambda: turned(value, height, width),
        "shear_x": lambda: (1, value, 0, 0, 1, 0),
        "shear_y": lambda: (1, 0, 0, value, 1, 0),
        "translate_x": lambda: (1, 0, value * width, 0, 1, 0),
        "translate_y": lambda: (1, 0, 0, 0, 1, value * height),
    }
    if operation in geometry:
        return affine(frames_TCHW, geometry[operation](), fill)
    if operation == "solarize_add":
        return torch.where(frames_TCHW < 128, frames_TCHW.clamp(max=255 - int(value)) + int(value), frames_TCHW)
    if (operation == "solarize" and value > 255) or (operation == "posterize" and value >= 8):
        return frames_TCHW
    tools = _functional()
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "autocontrast": tools.autocontrast,
        "equalize": tools.equalize,
        "invert": tools.invert,
        "posterize": lambda frames: tools.posterize(frames, int(value)),
        "solarize": lambda frames: tools.solarize(frames, value),
        "color": lambda frames: tools.adjust_saturation(frames, value),
        "contrast": lambda frames: tools.adjust_contrast(frames, value),
        "brightness": lambda frames: tools.adjust_brightness(frames, value),
        "sharpness": lambda frames: tools.adjust_sharpness(frames, value),
    }
    return plain[operation](frames_TCHW)


def turned(degrees: float, height: int, width: int) -> Matrix:
    """The matrix of `affine` that turns frames counter-clockwise about their centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


def affine(frames_TCHW: Tensor, matrix: Matrix, fill: tuple[int, ...]) -> Tensor:
    """Pixel (x, y) of the result comes from (a x + b y + c, d x + e y + f), bilinear; outside of the frame, `fill`.

    As Pillow's Image.transform(AFFINE, BILINEAR), pixels being squares whose centres lie at halves, but rounded to
    the nearest level, which Pillow is not.
    """
    height, width = frames_TCHW.shape[-2:]
    a, b, c, d, e, f = matrix
    x_W, y_H1 = torch.arange(width) + 0.5, (torch.arange(height) + 0.5)[:, None]
    x_HW, y_HW = a * x_W + b * y_H1 + c, d * x_W + e * y_H1 + f
    inside_HW = (x_HW >= 0) & (x_HW < width) & (y_HW >= 0) & (y_HW < height)
    grid_HW2 = torch.stack([x_HW * (2 / width) - 1, y_HW * (2 / height) - 1], dim=-1)
    flat_1NHW = frames_TCHW.flatten(0, 1)[None].float()
    moved = F.grid_sample(flat_1NHW, grid_HW2[None], mode="bilinear", padding_mode="border", align_corners=False)
    moved_TCHW = (moved[0] + 0.5).to(torch.uint8).view_as(frames_TCHW)
    return torch.where(inside_HW, moved_TCHW, torch.tensor(fill, dtype=torch.uint8)[:, None, None])


def erase(frames_TCHW: Tensor, probability: float, seed: int, mean: Triple, std: Triple) -> Tensor:
    """One box of noise over all frames with this probability: normal in the normalised pixels, cut to 0..255."""
    height, width = frames_TCHW.shape[-2:]
    box = erased_box(uniform_np(seed, "erase", 41)[0].astype(np.float64), height, width, probability)
    if box is None:
        return frames_TCHW
    top, left, h, w = box
    drawn_2N = uniform_np(seed, "erase.noise", 6 * h * w)[0].astype(np.float64).reshape(2, -1)
    noise_CHW = (np.sqrt(-2 * np.log1p(-drawn_2N[0])) * np.cos(2 * np.pi * drawn_2N[1])).reshape(3, h, w)
    pixels_CHW = 255 * (np.array(mean)[:, None, None] + np.array(std)[:, None, None] * noise_CHW)
    erased_TCHW = frames_TCHW.clone()
    noise = torch.from_numpy(pixels_CHW.round().clip(0, 255).astype(np.uint8))
    erased_TCHW[..., top : top + h, left : left + w] = noise
    return erased_TCHW
