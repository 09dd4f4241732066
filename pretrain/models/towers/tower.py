"""What the teacher reads of a visual tower, whatever its make.

F frames, N patches a frame, W the tower's width, C the width that it puts out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.errors import UserError

SUPPORTED = "a model that open_clip.list_models() names, such as ViT-B-16-quickgelu"


class Seen(NamedTuple):
    """Of frames, for each layer asked for: cls (F, W), or (F, C) where `Tower.pooled`; patches (F, N, W).

    attention (F, N) float32, softmaxed over all tokens with those that are no patches dropped; None without one.
    """

    cls: list[Tensor]
    patches: list[Tensor]
    attention: Tensor | None


@dataclass(frozen=True)
class Tower:
    """A visual tower: how many layers it can give, the pixels and patches of a frame, its final norm and projection.

    `see` looks at normalised frames (F, 3, H, W). `norm` maps (..., W) to itself and `project` to (..., C); a `pooled`
    cls has passed both. `attends`: it has a query whose attention over the patches can be read. `module` is
    open_clip's, `blocks` are its layers over tokens, of which a map has none.
    """

    module: nn.Module
    blocks: Sequence[nn.Module]
    depth: int
    size: tuple[int, int]
    grid: tuple[int, int]
    width: int
    see: Callable[[Tensor, Sequence[int]], Seen]
    norm: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]
    pooled: bool
    attends: bool


def pair(value: Any) -> tuple[int, int]:
    """(rows, columns) of what is one number or two."""
    return (int(value[0]), int(value[1])) if isinstance(value, Sequence) else (int(value), int(value))


def resize(own: tuple[int, int], step: tuple[int, int], image_size: int | None, change: Callable[[int], Any]) -> None:
    """change(image_size), where that is another size than its own; UserError unless `step` pixels divide it."""
    if image_size is None or own == (image_size, image_size):
        return
    if any(image_size % side for side in step):
        raise UserError(
            f"teacher.image_size {image_size} does not divide by the teacher's patches of {step[0]} pixels.",
            f"Use a multiple of {step[0]}, or leave it out for {own[0]}.",
        )
    change(image_size)


def joined(prefix_FPW: Tensor | None, patch_FNW: Tensor) -> Tensor:
    """All tokens of a layer, (F, P + N, W)."""
    return patch_FNW if prefix_FPW is None else torch.cat([prefix_FPW, patch_FNW], dim=1)
