"""Both directions of a mixer at once: two scans that share a gate, two convolutions that share their input.

Letters: B batch, L length, D channels, N state, K taps of the convolution.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.bidirectional_operators import bidirectional_conv_forward, bidirectional_scan_forward
from pretrain.ops.dispatch import CPU_TAPS, causal_conv1d, check_scan, expect, selective_scan
from pretrain.ops.selection import choose_backend


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
    u_BLD = ahead.u_BLD
    expect("the u of back", back.u_BLD, tuple(u_BLD.shape))
    for u, delta, A, B, C, D, bias in (ahead, back):
        check_scan(u, delta, A, B, C, D, z_BLD, bias)
    if choose_backend(backend, u_BLD.device.type, u_BLD.dtype) == "cpu" and u_BLD.numel():
        return _kernel_scans(ahead, back, z_BLD, delta_softplus)
    y_BLD = _one_scan(ahead, False, delta_softplus, backend) + _one_scan(back, True, delta_softplus, backend)
    if z_BLD is None:
        return y_BLD
    return (y_BLD * F.silu(z_BLD)).to(u_BLD.dtype)


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
    for weight, bias in ((weight_DK, bias_D), (weight_b_DK, bias_b_D)):
        expect("weight", weight, (x_BLD.shape[2], weight_DK.shape[-1]))
        expect("bias", bias, (x_BLD.shape[2],))
    served = choose_backend(backend, x_BLD.device.type, x_BLD.dtype) == "cpu"
    if served and weight_DK.shape[1] == CPU_TAPS and x_BLD.numel():
        x, (bias, bias_b) = x_BLD.to(_row_type(x_BLD)), _floats(bias_D, bias_b_D)
        pair = bidirectional_conv_forward(x, weight_DK.float(), bias, weight_b_DK.float(), bias_b, silu)
        return pair[0].to(x_BLD.dtype), pair[1].to(x_BLD.dtype)
    ahead_BLD = causal_conv1d(x_BLD, weight_DK, bias_D, False, silu, backend)
    return ahead_BLD, causal_conv1d(x_BLD, weight_b_DK, bias_b_D, True, silu, backend)


def _one_scan(direction: Direction, reverse: bool, delta_softplus: bool, backend: str) -> Tensor:
    u, delta, A, B, C, D, bias = direction
    return selective_scan(u, delta, A, B, C, D, None, bias, delta_softplus, reverse, backend=backend)


def _kernel_scans(ahead: Direction, back: Direction, z: Tensor | None, delta_softplus: bool) -> Tensor:
    """Bring the inputs to the types that the kernels take, and store states only where a gradient will want them."""
    work = _row_type(ahead.u_BLD, ahead.delta_BLD, back.u_BLD, back.delta_BLD, z)
    tensors: list[Tensor | None] = []
    for u, delta, A, B, C, D, bias in (ahead, back):
        tensors += [u.to(work), delta.to(work), A.float(), B, C, *_floats(D, bias)]
    tensors.append(None if z is None else z.to(work))
    save_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y: Tensor = bidirectional_scan_forward(*tensors, delta_softplus, save_states)[0]
    return y.to(ahead.u_BLD.dtype)


def _floats(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.float() for x in vectors]


def _row_type(*rows: Tensor | None) -> torch.dtype:
    """The type in which the kernels read rows: theirs, where it is one that the kernels have."""
    types = {x.dtype for x in rows if x is not None}
    return types.pop() if types in ({torch.float32}, {torch.bfloat16}) else torch.float32
