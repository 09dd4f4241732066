"""The selective scan and the causal depthwise convolution in plain PyTorch: what every kernel is measured against.

Letters: B batch, L length, D channels, N state, K taps of the convolution.

Source: Mamba (arXiv 2312.00752), equations 2 and 4 with the simplified discretisation of its code (B̄ = Δ·B).
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that the recurrence is computed in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device: str) -> contextlib.AbstractContextManager[object]:
    """Autocast off. In a graph to be exported nothing, because torch.export.save knows no such block."""
    return contextlib.nullcontext() if torch.compiler.is_exporting() else torch.autocast(device, enabled=False)


def step_sizes(delta_BLD: Tensor, delta_bias_D: Tensor | None, delta_softplus: bool) -> Tensor:
    """Step sizes: delta plus its bias, through softplus if asked."""
    if delta_bias_D is not None:
        delta_BLD = delta_BLD + delta_bias_D
    return F.softplus(delta_BLD) if delta_softplus else delta_BLD


def skip_and_gate(y_BLD: Tensor, u_BLD: Tensor, D_D: Tensor | None, z_BLD: Tensor | None) -> Tensor:
    """y + D u, then times SiLU(z)."""
    if D_D is not None:
        y_BLD = y_BLD + u_BLD * D_D
    return y_BLD if z_BLD is None else y_BLD * F.silu(z_BLD)


def sequential_scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None = None,
    z_BLD: Tensor | None = None,
    delta_bias_D: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence as written, one position after another.

        h = exp(delta_t A) h + delta_t B_t u_t ;  y_t = (C_t · h + D u_t) SiLU(z_t)

    from the first position to the last, or with `reverse` from the last to the first. Returns y (B, L, D) in
    u's type and the last state (B, D, N) in the working type. Any device, any float type, differentiable twice.
    """
    work = working_dtype(u_BLD.dtype)
    with full_precision(u_BLD.device.type):
        u, delta, A, B, C = (x.to(work) for x in (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN))
        delta = step_sizes(delta, _cast(delta_bias_D, work), delta_softplus)
        state_BDN = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
        length = u.shape[1]
        rows: list[Tensor] = [state_BDN] * length
        for t in reversed(range(length)) if reverse else range(length):
            decay_BDN = torch.exp(delta[:, t, :, None] * A)
            state_BDN = decay_BDN * state_BDN + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
            rows[t] = (state_BDN * C[:, t, None, :]).sum(-1)
        y_BLD = skip_and_gate(torch.stack(rows, 1), u, _cast(D_D, work), _cast(z_BLD, work))
    return y_BLD.to(u_BLD.dtype), state_BDN


def causal_conv1d(
    x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None = None, reverse: bool = False, silu: bool = True
) -> Tensor:
    """Depthwise convolution that sees the K - 1 positions before (with `reverse`: after) each one, then SiLU.

        y_t = SiLU(bias + sum_k weight[:, k] x[t - (K - 1) + k])

    with zeros outside; reversed, t + (K - 1) - k. Written as shift and add: F.conv1d is slower for this on a CPU.
    """
    work = working_dtype(x_BLD.dtype)
    taps, length = weight_DK.shape[1], x_BLD.shape[1]
    with full_precision(x_BLD.device.type):
        before, after = (0, taps - 1) if reverse else (taps - 1, 0)
        padded = F.pad(x_BLD.to(work), (0, 0, before, after))
        weight_DK = weight_DK.to(work)
        y_BLD = _cast(bias_D, work)
        for k in range(taps):
            start = taps - 1 - k if reverse else k
            term = padded[:, start : start + length] * weight_DK[:, k]
            y_BLD = term if y_BLD is None else y_BLD + term
        assert y_BLD is not None
        y_BLD = F.silu(y_BLD) if silu else y_BLD
    return y_BLD.to(x_BLD.dtype)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
