"""RandAugment by the name that timm gives it, and what it does to one clip: operations and their strengths, pure.

"rand-m7-n4-mstd0.5-inc1": 4 operations in turn (n), each drawn from 15 and then done with probability 0.5 (p), at
magnitude 7 of 10 (m) give or take 0.5 (mstd: a normal deviate; above 100, uniform from 0 to m), where a larger
magnitude always changes more (inc). `mmax` is the largest magnitude that a deviate may reach. Source: timm,
data/auto_augment.py; Cubuk et al., "RandAugment", 2020. Importing this needs no torch.

The draws are the sample's own: 5 numbers an operation (which, whether, two for the deviate, which way).
"""

import math
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAGNITUDES = 10.0
TRANSLATE = 0.45  # of the side, at magnitude 10
DRAWS = 5

OPERATIONS = (
    "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
_EITHER_WAY = {"rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, "translate_x": TRANSLATE, "translate_y": TRANSLATE}
_ENHANCE = ("color", "contrast", "brightness", "sharpness")
_PART = re.compile(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class RandAugment:
    """The parts of a name."""

    m: float = MAGNITUDES
    n: int = 2
    mstd: float = 0.0
    mmax: float = MAGNITUDES
    p: float = 0.5
    inc: bool = False

    @classmethod
    def parse(cls, name: str) -> Self:
        """The value of a name such as "rand-m7-n4-mstd0.5-inc1"; ValueError says what in it is not understood."""
        head, *parts = name.split("-")
        if head != "rand":
            raise ValueError(f"'{name}' is no RandAugment. Write it as rand-m7-n4-mstd0.5-inc1.")
        kinds = {field.name: field.type for field in fields(cls)}
        given: dict[str, float] = {}
        for part in parts:
            found = _PART.fullmatch(part)
            if found is None or found[1] in given:
                raise ValueError(
                    f"'{part}' in '{name}' is not understood. Use m, n, mstd, mmax, p and inc, each once, "
                    "as in rand-m7-n4-mstd0.5-inc1."
                )
            given[found[1]] = float(found[2])
        value = cls(**{key: (int if kinds[key] is int else bool if kinds[key] is bool else float)(number)
                       for key, number in given.items()})  # type: ignore[arg-type]  # fmt: skip
        if not 0 <= value.p <= 1 or value.n < 1 or not 0 <= value.m <= value.mmax <= MAGNITUDES:
            raise ValueError(f"'{name}' leaves its range: 0 <= m <= mmax <= 10, n >= 1, 0 <= p <= 1.")
        return value

    def draw(self, seed: int) -> list[tuple[str, float]]:
        """The operations on the clip of this seed, in turn, each with its argument (see `argument`)."""
        from data_pipeline.draws import uniform_np  # here, as configs are read before numpy is imported

        drawn_NK = uniform_np(seed, "rand_augment", self.n * DRAWS)[0].reshape(self.n, DRAWS).astype("float64")
        steps = []
        for which, whether, radius, angle, way in drawn_NK.tolist():
            if whether >= self.p:
                continue
            operation = OPERATIONS[int(which * len(OPERATIONS))]
            steps.append((operation, argument(operation, self._magnitude(radius, angle), self.inc, way < 0.5)))
        return steps

    def _magnitude(self, radius: float, angle: float) -> float:
        if self.mstd > 100:
            return radius * self.m
        deviate = math.sqrt(-2 * math.log(1 - radius)) * math.cos(2 * math.pi * angle)
        return min(max(self.m + self.mstd * deviate, 0.0), self.mmax)


def argument(operation: str, magnitude: float, inc: bool, negative: bool) -> float:
    """What an operation at a magnitude of 0..10 is told: degrees, a shear, a share of the side, a factor, bits, a
    threshold or a sum; `negative` turns what can go either way."""
    level = magnitude / MAGNITUDES
    if operation in _EITHER_WAY:
        return _EITHER_WAY[operation] * level * (-1 if negative else 1)
    if operation in _ENHANCE:
        return max(0.1, 1 + 0.9 * level * (-1 if negative else 1)) if inc else 0.1 + 1.8 * level
    if operation == "posterize":
        return max(1, 4 - int(4 * level) if inc else int(4 * level))  # Pillow, too, keeps a bit or refuses
    if operation == "solarize":
        return 256 - min(256, int(256 * level)) if inc else min(256, int(256 * level))
    return min(128, int(110 * level)) if operation == "solarize_add" else 0.0


def erased_box(
    uniforms_K: "npt.NDArray[np.float64]", height: int, width: int, probability: float
) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) to erase in frames of height x width, by 1 + 4 x 10 numbers in [0, 1), or None.

    A share of 1/50 to 1/3 of the area, its aspect logarithmic in 0.3 to 1 / 0.3, ten attempts (timm's RandomErasing).
    """
    if uniforms_K[0] >= probability:
        return None
    for area_draw, shape, y, x in uniforms_K[1:].reshape(-1, 4).tolist():
        area = (0.02 + (1 / 3 - 0.02) * area_draw) * height * width
        aspect = math.exp(math.log(0.3) * (1 - 2 * shape))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= h < height and 1 <= w < width:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    return None
