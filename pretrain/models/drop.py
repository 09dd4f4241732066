"""Dropping by rate, each sample by its own seed: drop path and the dropout before a head.

B batch, X things to drop.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline import draws


def keep_factors(rates_X: Sequence[float], like: Tensor, stream: str, seeds_B: Tensor | None = None) -> Tensor:
    """Factors (B, X) for the samples of `like`: 0 where a thing is dropped, 1 / (1 - rate) elsewhere.

    `seeds_B` (int64) draws each sample's from its own `stream`; None takes torch's generator.
    """
    B, X, device = like.shape[0], len(rates_X), like.device
    uniform_BX = torch.rand(B, X, device=device) if seeds_B is None else draws.uniform(seeds_B, stream, X).to(device)
    rate_X = torch.tensor(rates_X, device=device)
    return (uniform_BX >= rate_X).float() / (1 - rate_X)
