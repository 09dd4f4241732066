"""The preprocessing that travels with the weights: one value for pixels, one for text, each with a digest.

They are stored in every checkpoint, index and export, and a mismatch is refused by comparing digests.
The student, the teacher and the text tower each have their own. Importing this file needs no torch.

Letters: B clips, C channels (RGB), T frames, H and W pixels.
"""

import re
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from configs.errors import UserError
from configs.loader import Frozen, digest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)

ResizeRule = Literal["stretch", "crop"]
Interpolation = Literal["bicubic", "bilinear"]


_LATER: dict[str, object] = {"first_seconds": None}  # fields younger than the first exports, and their defaults


class VisualPreprocess(Frozen):
    """How a clip becomes the tensor a vision tower sees.

    `resize` is "stretch" (straight to a square, as the release tests) or "crop" (short side, then the centre);
    `mean` and `std` are those of pixels in 0..1. `first_seconds` looks no further into a clip (null: all of it).
    """

    frames: int = Field(8, ge=1)
    image_size: int = Field(224, ge=1)
    resize: ResizeRule = "stretch"
    interpolation: Interpolation = "bicubic"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    first_seconds: float | None = Field(None, gt=0)

    @property
    def digest(self) -> str:
        """16 hex digits that name this value; fields that came later count where they are set, so old names stay."""
        tree = self.model_dump(mode="json")
        return digest({key: value for key, value in tree.items() if key not in _LATER or value != _LATER[key]})

    def normalise(self, frames_BCTHW: "Tensor", dtype: "torch.dtype | None" = None) -> "Tensor":
        """uint8 pixels (B, C, T, H, W) to normalised floats of `dtype` (float32 by default), on the same device."""
        return normalise(frames_BCTHW, self.mean, self.std, dtype)


def normalise(frames_BCTHW: "Tensor", mean: Triple, std: Triple, dtype: "torch.dtype | None" = None) -> "Tensor":
    """(pixel / 255 - mean) / std for uint8 `frames_BCTHW`, computed in float32 and returned as `dtype`."""
    import torch

    scale = torch.tensor([1 / (255 * s) for s in std], device=frames_BCTHW.device).view(3, 1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=frames_BCTHW.device).view(3, 1, 1, 1)
    pixels = torch.addcmul(shift, frames_BCTHW.to(torch.float32), scale)
    return pixels if dtype is None else pixels.to(dtype)


TextRule = Literal["released", "lower", "none"]

_DROPPED = re.compile(r"[,.'!?\"()*#:;~]")


def clean_caption(text: str, rule: TextRule = "released") -> str:
    """A caption as the text tower sees it, before tokens.

    "released" is UMT's `pre_text`: lower case, `,.'!?"()*#:;~` dropped, `-` and `/` to spaces, `<person>` to
    `person`; "lower" only lowers; "none" keeps the letters. All collapse runs of white space and strip the ends.
    """
    if rule != "none":
        text = text.lower()
    if rule == "released":
        text = _DROPPED.sub("", text).replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(text.split())


class TextPreprocess(Frozen):
    """How a caption becomes tokens: the cleaning rule and the number of tokens, [CLS] and [SEP] included."""

    max_tokens: int = Field(32, ge=3)
    clean: TextRule = "released"

    @property
    def digest(self) -> str:
        """16 hex digits that name this value."""
        return digest(self)

    def clean_caption(self, text: str) -> str:
        """`text` cleaned by this value's rule."""
        return clean_caption(text, self.clean)


def require_same(
    expected: VisualPreprocess | TextPreprocess, found: VisualPreprocess | TextPreprocess, where: str
) -> None:
    """UserError naming the fields that differ, if `found` (of `where`) is not the preprocessing `expected`."""
    if expected == found:
        return
    ours, theirs = expected.model_dump(), found.model_dump()
    differ = ", ".join(
        f"{key} is {theirs.get(key)} there and {ours.get(key)} here"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    )
    raise UserError(
        f"{where} was made with another preprocessing ({differ or 'another kind'}).",
        "Use the same preprocessing, or make it again with this one.",
    )
