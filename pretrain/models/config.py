"""The models as values: sizes, options and the rules between them. No torch here, so a bad config fails at once."""

import math
from typing import Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from configs.loader import Frozen

Pool = Literal["cls", "avg", "cls+avg", "cls_cat_avg"]
ScanOrder = Literal["spatial_first", "temporal_first", "st_half", "st_full"]

SIZES: dict[str, tuple[int, int]] = {"tiny": (24, 192), "small": (24, 384), "middle": (32, 576), "base": (24, 768)}
"""The published encoders: name -> (depth, width)."""

STEM_STRIDE = 4
"""The convolutional stem sees squares of this many pixels before they are joined into a patch."""


class VisionConfig(Frozen):
    """A VideoMamba encoder. `name` stands for a published depth and width; anything else is given by hand.

    `frames: 1` is an image model: it has no temporal embedding and takes no clips. The defaults are ours where
    the release is wrong: `dt_init: released` and `align_source: released` give back what it does (a zero bias of
    the time step; an alignment feature taken before the last mixer).
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
    scan_order: ScanOrder | tuple[ScanOrder, ...] = "spatial_first"
    """One order for all layers, or a list: one for each, or a shorter pattern that repeats and divides the depth."""
    dt_init: Literal["mamba", "released"] = "mamba"
    align_source: Literal["output", "released"] = "output"
    align_width: int = Field(default=0, ge=0)
    """Width of the teacher's features; 0 builds no alignment decoder."""
    align_layers: int = Field(default=1, gt=0)
    """How many layers are aligned, counted back from the last one."""
    align_interval: float = Field(default=1.0, ge=1)
    """Layers from one aligned layer to the next; fractions are rounded down, layer by layer."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """The last layer's rate; earlier ones rise to it from 0 in equal steps."""
    pool: Pool = "cls+avg"
    pool_norm: bool = False
    """A LayerNorm after pooling, as the joint model has."""
    classes: int = Field(default=0, ge=0)
    """Outputs of the classification head; 0 builds none."""
    head_pool: Literal["cls", "avg", "cls+avg"] = "cls"
    """What the classification head reads; the release reads cls."""
    head_dropout: float = Field(default=0.0, ge=0, lt=1)
    checkpoint_blocks: bool = False
    """Recompute each block in the backward pass: memory for time."""

    @model_validator(mode="before")
    @classmethod
    def _size_by_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") in SIZES:
            depth, width = SIZES[values["name"]]
            return {"depth": depth, "width": width} | values
        return values

    @field_validator("scan_order", mode="before")
    @classmethod
    def _known_orders(cls, value: Any) -> Any:
        orders = value if isinstance(value, (list, tuple)) else [value]
        for order in orders:
            if order not in get_args(ScanOrder):
                raise ValueError(f"there is no scan order {order!r}; use one of {', '.join(get_args(ScanOrder))}")
        return value

    @model_validator(mode="after")
    def _layers_are_there(self) -> Self:
        if isinstance(self.scan_order, tuple) and (not self.scan_order or self.depth % len(self.scan_order)):
            raise ValueError(
                f"scan_order lists {len(self.scan_order)} orders for {self.depth} layers; "
                f"list {self.depth}, or a pattern whose length divides {self.depth}"
            )
        if self.aligned[0] < 0:
            raise ValueError(
                f"align_layers {self.align_layers} at align_interval {self.align_interval} reach back further "
                f"than {self.depth} layers; lower one of them"
            )
        return self

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
    def orders(self) -> tuple[ScanOrder, ...]:
        """The scan order of each layer."""
        pattern = self.scan_order if isinstance(self.scan_order, tuple) else (self.scan_order,)
        return pattern * (self.depth // len(pattern))

    @property
    def aligned(self) -> tuple[int, ...]:
        """The layers whose output is aligned to the teacher, first to last (reference 2.1)."""
        back = range(self.align_layers - 1, -1, -1)
        return tuple(self.depth - 1 - int(k * self.align_interval) for k in back)

    @property
    def drop_rates(self) -> tuple[float, ...]:
        """The drop path rate of each layer's output; the last one is `drop_path` at any depth (reference 1.3)."""
        last = self.depth - 1
        return (*(self.drop_path * i / last for i in range(last)), self.drop_path)

    @property
    def rank(self) -> int:
        """Rank of the time-step projection."""
        return math.ceil(self.width / 16) if self.dt_rank == "auto" else self.dt_rank


BERTS: dict[str, dict[str, int]] = {
    "base": {"width": 768, "heads": 12, "layers": 9, "fusion_layers": 3, "intermediate": 3072},
    "large": {"width": 1024, "heads": 16, "layers": 19, "fusion_layers": 5, "intermediate": 4096},
}
"""The published text towers: name -> sizes, each split where the release splits it."""


class TextConfig(Frozen):
    """A BERT split in two: `layers` read the text alone, `fusion_layers` attend to the video as well.

    `name` stands for a published size, of which any part may be given otherwise (`layers` and `fusion_layers` to
    split it elsewhere); without it the sizes are those of BERT-base.
    """

    name: Literal["base", "large"] | None = None
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
    checkpoint_layers: bool = False
    """Recompute each layer in the backward pass, as the release does: memory for time."""

    @model_validator(mode="before")
    @classmethod
    def _size_by_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") in BERTS:
            return BERTS[values["name"]] | values
        return values

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
