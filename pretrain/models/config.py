"""The models as values: sizes, options and the rules between them. No torch here, so a bad config fails at once."""

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from configs.loader import Frozen

Pool = Literal["cls", "avg", "cls+avg", "cls_cat_avg"]

SIZES: dict[str, tuple[int, int]] = {"tiny": (24, 192), "small": (24, 384), "middle": (32, 576), "base": (24, 768)}
"""The published encoders: name -> (depth, width)."""

STEM_STRIDE = 4
"""The convolutional stem sees squares of this many pixels before they are joined into a patch."""


class VisionConfig(Frozen):
    """A VideoMamba encoder. `name` stands for a published depth and width; anything else is given by hand.

    The defaults are ours where the release is wrong: `dt_init: released` and `align_source: released`
    give back what it does (a zero bias of the time step; an alignment feature taken before the last mixer).
    """

    name: Literal["tiny", "small", "middle", "base"] | None = None
    depth: int = Field(gt=0)
    width: int = Field(gt=0)
    patch_size: int = Field(default=16, gt=0)
    tubelet: int = Field(default=1, gt=0)
    frames: int = Field(default=8, gt=0)
    image_size: int = Field(default=224, gt=0)
    channels: int = Field(default=3, gt=0)
    d_state: int = Field(default=16, gt=0)
    expand: int = Field(default=2, gt=0)
    d_conv: int = Field(default=4, gt=0)
    dt_rank: int | Literal["auto"] = "auto"
    stem: Literal["linear", "conv"] = "linear"
    stem_width: int = Field(default=64, gt=0)
    scan_order: Literal["spatial_first"] = "spatial_first"
    dt_init: Literal["mamba", "released"] = "mamba"
    align_source: Literal["output", "released"] = "output"
    align_width: int = Field(default=0, ge=0)
    """Width of the teacher's features; 0 builds no alignment decoder."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    pool: Pool = "cls+avg"
    pool_norm: bool = False
    """A LayerNorm after pooling, as the joint model has."""
    classes: int = Field(default=0, ge=0)
    checkpoint_blocks: bool = False
    """Recompute each block in the backward pass: memory for time."""

    @model_validator(mode="before")
    @classmethod
    def _size_by_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") in SIZES:
            depth, width = SIZES[values["name"]]
            return {"depth": depth, "width": width} | values
        return values

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.name is not None and (self.depth, self.width) != SIZES[self.name]:
            raise ValueError(
                f"name '{self.name}' means depth and width {SIZES[self.name]}, not {(self.depth, self.width)}; "
                "leave `name` out for a size of your own"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} does not divide by patch_size {self.patch_size}")
        if self.frames % self.tubelet:
            raise ValueError(f"frames {self.frames} do not divide by tubelet {self.tubelet}")
        if self.stem == "conv" and self.patch_size % STEM_STRIDE:
            raise ValueError(f"stem 'conv' needs a patch_size that divides by {STEM_STRIDE}, not {self.patch_size}")
        return self

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token grid of a full clip: (frames / tubelet, rows, columns)."""
        side = self.image_size // self.patch_size
        return self.frames // self.tubelet, side, side

    @property
    def rank(self) -> int:
        """Rank of the time-step projection."""
        return math.ceil(self.width / 16) if self.dt_rank == "auto" else self.dt_rank


class TextConfig(Frozen):
    """A BERT split in two: `layers` read the text alone, `fusion_layers` attend to the video as well."""

    width: int = Field(default=768, gt=0)
    heads: int = Field(default=12, gt=0)
    layers: int = Field(default=9, ge=0)
    fusion_layers: int = Field(default=3, ge=0)
    intermediate: int = Field(default=3072, gt=0)
    vocab_size: int = Field(default=30522, gt=0)
    positions: int = Field(default=512, gt=0)
    max_tokens: int = Field(default=32, gt=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    attention: Literal["sdpa", "eager"] = "sdpa"
    init: str | None = None
    """A folder with a BERT (config.json and weights) or a hub name; null draws the weights at random."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by {self.heads} heads")
        if self.max_tokens > self.positions:
            raise ValueError(f"max_tokens {self.max_tokens} is more than the {self.positions} positions there are")
        return self


class JointConfig(Frozen):
    """The joint model of stage 2: both towers and the width of the space they meet in."""

    vision: VisionConfig
    text: TextConfig
    embed: int = Field(default=512, gt=0)
