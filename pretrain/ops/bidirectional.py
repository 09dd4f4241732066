"""Both directions of a mixer at once: two scans that share a gate, two convolutions that share their input.

Letters: B batch, L length, D channels, N state, K taps of the convolution.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.dispatch import causal_conv1d, selective_scan


class Direction(NamedTuple):
    """What one direction's scan reads; positions are those of the sequence, not of the walk, in either direction."""

    u_BLD: Tensor
    delta_BLD: Tensor
    A_DN: Tensor
    B_BLN: Tensor
    C_BLN: Tensor
    D_D: Tensor | None = None
    delta_bias_D: Tensor | None = None


def bidirectional_scan(
    ahead: Direction,
    back: Direction,
    z_BLD: Tensor | None = None,
    delta_softplus: bool = True,
    backend: str = "auto",
) -> Tensor:
    """(scan(ahead) + scan(back, reverse=True)) * SiLU(z): y (B, L, D) in u's type; the recurrence is float32.

    The rows (u, delta, z) may be views with adjacent channels, B and C any views. ValueError on shapes that disagree.
    """
    y_BLD = _one_scan(ahead, False, delta_softplus, backend) + _one_scan(back, True, delta_softplus, backend)
    if z_BLD is None:
        return y_BLD
    return (y_BLD * F.silu(z_BLD)).to(ahead.u_BLD.dtype)


def bidirectional_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    weight_b_DK: Tensor,
    bias_b_D: Tensor | None,
    silu: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The causal convolution of both directions, `causal_conv1d` with and without `reverse`: ahead, back (B, L, D)."""
    ahead_BLD = causal_conv1d(x_BLD, weight_DK, bias_D, False, silu, backend)
    return ahead_BLD, causal_conv1d(x_BLD, weight_b_DK, bias_b_D, True, silu, backend)


def _one_scan(direction: Direction, reverse: bool, delta_softplus: bool, backend: str) -> Tensor:
    u, delta, A, B, C, D, bias = direction
    return selective_scan(u, delta, A, B, C, D, None, bias, delta_softplus, reverse, backend=backend)
