"""The scan and the convolution as a model calls them, sent to whichever backend serves.

Letters: B batch, L length, D channels, N state, K taps of the convolution.
"""

import functools
import time
from typing import Literal, overload

import torch
from torch import Tensor

from pretrain.ops import mamba_ssm_adapter, quick_reference, reference
from pretrain.ops.operators import conv_forward, scan_forward
from pretrain.ops.selection import choose_backend, require_backend, scan_device

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
    channels; B and C any views. The recurrence is float32 whatever the inputs are. ValueError on shapes that disagree,
    and for a gradient through the last state from mamba_ssm, which has none.
    """
    check_scan(u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, z_BLD, delta_bias_D)
    arguments = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, z_BLD, delta_bias_D, delta_softplus, reverse)
    chosen = choose_backend(backend, u_BLD.device.type, u_BLD.dtype)
    if chosen != "reference" and u_BLD.numel():
        y_BLD, state_BDN = _kernel_scan(chosen, *arguments, last_state=return_last_state)
    elif backend == "reference":
        y_BLD, state_BDN = reference.sequential_scan(*arguments)
    elif torch.compiler.is_compiling():
        y_BLD, state_BDN = quick_reference.graph_scan(*arguments)
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
    expect("weight", weight_DK, (x_BLD.shape[2], weight_DK.shape[-1]))
    expect("bias", bias_D, (x_BLD.shape[2],))
    chosen = choose_backend(backend, x_BLD.device.type, x_BLD.dtype)
    serves = chosen == "triton" or (chosen == "cpu" and weight_DK.shape[1] == CPU_TAPS)  # mamba_ssm has none
    if not serves or not x_BLD.numel():
        return reference.causal_conv1d(x_BLD, weight_DK, bias_D, reverse, silu)
    x = x_BLD.float() if chosen == "cpu" and x_BLD.dtype == torch.float16 else x_BLD
    weight, bias = weight_DK.float(), None if bias_D is None else bias_D.float()
    if chosen == "triton" and not x.is_cuda:
        from pretrain.ops.triton_launch import interpreted_conv

        return interpreted_conv(x, weight, bias, reverse, silu)
    y_BLD: Tensor = conv_forward(x, weight, bias, reverse, silu)
    return y_BLD.to(x_BLD.dtype)


def speed_check(backend: str, budget_S: float = 2.0, device: str | None = None) -> float:
    """Median seconds of a forward and backward scan at (batch, length, channels) = (2, 257, 384), state 16.

    "reference" is measured in the form that "auto" falls back to. Takes about `budget_S` seconds at most, a first run
    apart, which may compile. On `device`, else on the one that `scan_device` gives.
    """
    require_backend(backend)
    device = device or scan_device(backend)
    draw = torch.Generator().manual_seed(0)
    wide, small = ((2, 257, 384), (2, 257, 16))
    leaves = [torch.randn(shape, generator=draw).to(device).requires_grad_() for shape in (wide, wide, small, small)]
    A = -torch.rand(384, 16, generator=draw).to(device)
    kernel = functools.partial(_kernel_scan, backend, last_state=False)
    scan = quick_reference.chunked_scan if backend == "reference" else kernel

    def once() -> float:
        began = time.perf_counter()
        y = scan(leaves[0], leaves[1], A, leaves[2], leaves[3], None, None, None, True, False)[0]
        grads = torch.autograd.grad(y.sum(), leaves)
        grads[0].flatten()[0].item()  # waits for a GPU
        return time.perf_counter() - began

    once()
    times = [once()]
    while sum(times) < budget_S / 2 and len(times) < 50:
        times.append(once())
    return sorted(times)[len(times) // 2]


def _kernel_scan(
    backend: str,
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
    half = u.dtype != torch.float16 or backend != "cpu"
    work = u.dtype if half and all(x.dtype == u.dtype for x in rows) else torch.float32
    vectors = [None if x is None else x.float() for x in (D, delta_bias)]
    tensors = (u.to(work), delta.to(work), A.float(), B, C, vectors[0], None if z is None else z.to(work), vectors[1])
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if backend == "mamba_ssm":
        if last_state and wants_gradient:
            raise ValueError("mamba_ssm gives no gradient through the last state; use another backend, or no_grad")
        y, state = mamba_ssm_adapter.scan(mamba_ssm_adapter.selective_scan_fn(), *tensors, delta_softplus, reverse)
    elif u.is_cuda or backend == "cpu":
        y, state, _ = scan_forward(*tensors, delta_softplus, reverse, wants_gradient, last_state)
    else:
        from pretrain.ops.triton_launch import interpreted_scan

        y, state, _ = interpreted_scan(*tensors, delta_softplus, reverse, wants_gradient, last_state)
    return y.to(u.dtype), state


def check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """ValueError where the shapes of a scan's inputs disagree."""
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"expected u as (B, L, D) and A as (D, N), got {tuple(u.shape)} and {tuple(A.shape)}")
    batch, length, channels = u.shape
    states = A.shape[1]
    expect("A", A, (channels, states))
    for name, rows in (("delta", delta), ("z", z)):
        expect(name, rows, (batch, length, channels))
    for name, coefficients in (("B", B), ("C", C)):
        expect(name, coefficients, (batch, length, states))
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        expect(name, vector, (channels,))


def expect(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor, where there is one, has this shape."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
