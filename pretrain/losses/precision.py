"""Losses are computed in float32 at the least, whatever autocast rounds around them."""

import torch
from torch import Tensor


def exact(value: Tensor) -> Tensor:
    """float32 of a narrower tensor; float32 and float64 stay what they are."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()
