"""The learning-rate schedule: linear warm-up, then a cosine, as a pure function of the step."""

import math


def warmup_cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """The factor on every base learning rate at `step` (0 is the first step of `steps`).

    Rises as (step + 1) / warmup, so that the first step already learns, then falls along half a cosine from 1
    towards `floor`, which step `steps` would reach. Unit: none; every group's rate is its base times this.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
