"""The scan and the convolution as a model calls them, sent to whichever backend serves.

Letters: B batch, L length, D channels, N state, K taps of the convolution.
"""

import functools
import time
from typing import Literal, overload

import torch
from torch import Tensor

from pretrain.ops import quick_reference, reference
from pretrain.ops.operators import conv_forward, scan_forward
from pretrain.ops.selection import choose_backend, require_backend

CPU_TAPS = 4


@overload
def selective_scan(
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
    return_last_state: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def selective_scan(
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
    *,
    return_last_state: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
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
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Mamba with skip, gate and step sizes fused; see `reference.sequential_scan` for its sense.

    y (B, L, D) in u's type; with `return_last_state` also the state after the last step (B, D, N), float32 (float64
    for float64). `reverse` runs from the last position to the first. u, delta and z may be views with adjacent
    channels; B and C any views. The recurrence is float32 whatever the inputs are. ValueError on shapes that disagree.
    """
    _check_scan(u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, z_BLD, delta_bias_D)
    arguments = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, z_BLD, delta_bias_D, delta_softplus, reverse)
    chosen = choose_backend(backend, u_BLD.device.type, u_BLD.dtype)
    if chosen == "cpu" and u_BLD.numel():
        y_BLD, state_BDN = _kernel_scan(*arguments, return_last_state)
    elif backend == "reference":
        y_BLD, state_BDN = reference.sequential_scan(*arguments)
    elif torch.compiler.is_compiling():
        y_BLD, state_BDN = quick_reference.doubling_scan(*arguments)
    else:
        y_BLD, state_BDN = quick_reference.chunked_scan(*arguments)
    return (y_BLD, state_BDN) if return_last_state else y_BLD


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    reverse: bool = False,
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution over the K - 1 positions before each one (`reverse`: after), then SiLU; y (B, L, D).

    x may be a view with adjacent channels, such as one half of a projection. See `reference.causal_conv1d`.
    """
    _expect("weight", weight_DK, (x_BLD.shape[2], weight_DK.shape[-1]))
    _expect("bias", bias_D, (x_BLD.shape[2],))
    chosen = choose_backend(backend, x_BLD.device.type, x_BLD.dtype)
    if chosen == "cpu" and weight_DK.shape[1] == CPU_TAPS and x_BLD.numel():
        x = x_BLD.float() if x_BLD.dtype == torch.float16 else x_BLD
        bias = None if bias_D is None else bias_D.float()
        y_BLD: Tensor = conv_forward(x, weight_DK.float(), bias, reverse, silu)
        return y_BLD.to(x_BLD.dtype)
    return reference.causal_conv1d(x_BLD, weight_DK, bias_D, reverse, silu)


def speed_check(backend: str, budget_S: float = 2.0) -> float:
    """Median seconds of a forward and backward scan at (batch, length, channels) = (2, 257, 384), state 16.

    "reference" is measured in the form that "auto" falls back to. Takes about `budget_S` seconds at most.
    """
    draw = torch.Generator().manual_seed(0)
    u, delta = (torch.randn(2, 257, 384, generator=draw, requires_grad=True) for _ in range(2))
    B, C = (torch.randn(2, 257, 16, generator=draw, requires_grad=True) for _ in range(2))
    A = -torch.rand(384, 16, generator=draw)
    scan = quick_reference.chunked_scan if backend == "reference" else functools.partial(_kernel_scan, last_state=False)
    require_backend(backend)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_S / 2 and len(times) < 50):
        began = time.perf_counter()
        y = scan(u, delta, A, B, C, None, None, None, True, False)[0]
        torch.autograd.grad(y.sum(), [u, delta, B, C])
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def _kernel_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    last_state: bool,
) -> tuple[Tensor, Tensor]:
    """Bring the inputs to the types that the kernels take, and store states only where a gradient will want them."""
    rows = [x for x in (u, delta, z) if x is not None]
    work = u.dtype if u.dtype != torch.float16 and all(x.dtype == u.dtype for x in rows) else torch.float32
    vectors = [None if x is None else x.float() for x in (D, delta_bias)]
    tensors = (u.to(work), delta.to(work), A.float(), B, C, vectors[0], None if z is None else z.to(work), vectors[1])
    save_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y, state, _ = scan_forward(*tensors, delta_softplus, reverse, save_states, last_state)
    return y.to(u.dtype), state


def _check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"expected u as (B, L, D) and A as (D, N), got {tuple(u.shape)} and {tuple(A.shape)}")
    batch, length, channels = u.shape
    states = A.shape[1]
    _expect("A", A, (channels, states))
    for name, rows in (("delta", delta), ("z", z)):
        _expect(name, rows, (batch, length, channels))
    for name, coefficients in (("B", B), ("C", C)):
        _expect(name, coefficients, (batch, length, states))
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        _expect(name, vector, (channels,))


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
