"""The Triton kernels behind the operators of pretrain/ops/operators.py: outputs made, kernels started, sums added up.

Letters: B batch, L length, D channels, N state, K taps of the convolution.

CUDA tensors come here through `torch.ops.videomamba`. In Triton's interpreter (TRITON_INTERPRET=1 before Triton is
imported) the same functions take CPU tensors, and `interpreted_scan` and `interpreted_conv` give them their gradients.
"""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from pretrain.ops import operators
from pretrain.ops.triton_conv_kernels import conv_backward_kernel, conv_forward_kernel
from pretrain.ops.triton_scan_kernels import scan_backward_kernel, scan_forward_kernel

TILE = 512
"""States that one warp holds: sixteen registers a thread for each of the tiles that live at once."""
GROUP = 4
SPAN, CONV_BLOCK = 32, 64


def scan_forward(
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
    save_states: bool,
    last_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.videomamba.scan_forward`: y, the last state and the stored states, empty where not asked for."""
    batch, length, channels = u.shape
    given = _scan_inputs(u, delta, A, B, C, D, z, delta_bias)
    y = u.new_empty(u.shape)
    last = A.new_empty((batch, channels, A.shape[1]) if last_state else (0,))
    chunks = triton.cdiv(length, operators.CHUNK)
    states = A.new_empty((batch, chunks - 1, A.shape[1], channels) if save_states else (0,))
    sizes = _scan_sizes(A, delta_softplus, reverse)
    with _on(u):
        scan_forward_kernel[(batch * triton.cdiv(channels, sizes["BLOCK"]),)](
            *given, y, last if last_state else None, states if save_states else None,
            length, channels, *_scan_strides(given), **sizes,
        )  # fmt: skip
    return y, last, states


def scan_backward(
    grad_y: Tensor,
    grad_last_state: Tensor | None,
    states: Tensor,
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
) -> tuple[Tensor, ...]:
    """`torch.ops.videomamba.scan_backward`: the gradients of u, delta, A, B, C, D, z and delta_bias, or empty ones."""
    batch, length, channels = u.shape
    given, outer = _scan_inputs(u, delta, A, B, C, D, z, delta_bias), _rows(grad_y)
    sizes = _scan_sizes(A, delta_softplus, reverse)
    blocks = triton.cdiv(channels, sizes["BLOCK"])
    grad_u, grad_delta = u.new_empty(u.shape), u.new_empty(u.shape)
    grad_z = None if z is None else u.new_empty(u.shape)
    grad_A = A.new_empty((batch, *A.shape))
    grad_B, grad_C = (A.new_empty((blocks, batch, length, A.shape[1])) for _ in range(2))
    grad_D, grad_bias = (None if x is None else A.new_empty((batch, channels)) for x in (D, delta_bias))
    last = None if grad_last_state is None else grad_last_state.contiguous()
    with _on(u):
        scan_backward_kernel[(batch * blocks,)](
            outer, last, states, *given, grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias,
            length, channels, outer.stride(0), outer.stride(1), *_scan_strides(given), **sizes, GROUP=GROUP,
        )  # fmt: skip
    nothing = A.new_empty(0)
    vectors = [nothing if x is None else x.sum(0) for x in (grad_D, grad_bias)]
    coefficients = (grad_B.sum(0).to(B.dtype), grad_C.sum(0).to(C.dtype))
    return (
        grad_u,
        grad_delta,
        grad_A.sum(0),
        *coefficients,
        vectors[0],
        nothing if grad_z is None else grad_z,
        vectors[1],
    )


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool) -> Tensor:
    """`torch.ops.videomamba.conv_forward`: y like x."""
    x, weight = _rows(x), weight.contiguous()
    y = x.new_empty(x.shape)
    with _on(x):
        conv_forward_kernel[(_conv_programs(x),)](
            x, weight, None if bias is None else bias.contiguous(), y, *x.shape[1:], x.stride(0), x.stride(1),
            **_conv_sizes(weight, reverse, silu),
        )  # fmt: skip
    return y


def conv_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.videomamba.conv_backward`: the gradients of x, weight and bias, the last empty without one."""
    x, outer, weight = _rows(x), _rows(grad_y), weight.contiguous()
    batch, length, channels = x.shape
    programs = batch * triton.cdiv(length, SPAN)
    grad_x = x.new_empty(x.shape)
    grad_weight = weight.new_empty((programs, weight.shape[1], channels))
    grad_bias = None if bias is None else weight.new_empty((programs, channels))
    with _on(x):
        conv_backward_kernel[(_conv_programs(x),)](
            outer, x, weight, None if bias is None else bias.contiguous(), grad_x, grad_weight, grad_bias,
            length, channels, outer.stride(0), outer.stride(1), x.stride(0), x.stride(1),
            **_conv_sizes(weight, reverse, silu),
        )  # fmt: skip
    no_bias = weight.new_empty(0)
    return grad_x, grad_weight.sum(0).t().contiguous(), no_bias if grad_bias is None else grad_bias.sum(0)


class _InterpretedScan(torch.autograd.Function):
    """The operator's gradient rules around the functions of this file."""

    forward = staticmethod(scan_forward)
    setup_context = staticmethod(operators.keep_scan_inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y, grad_last_state, _ = grads
        return operators.scan_gradients(ctx, grad_y, grad_last_state, None, backward=scan_backward)


class _InterpretedConv(torch.autograd.Function):
    """As for the scan."""

    forward = staticmethod(conv_forward)
    setup_context = staticmethod(operators.keep_conv_inputs)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return operators.conv_gradients(ctx, grad_y, backward=conv_backward)


def interpreted_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`scan_forward` with gradients, for CPU tensors in Triton's interpreter."""
    result: tuple[Tensor, Tensor, Tensor] = _InterpretedScan.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def interpreted_conv(*arguments: Any) -> Tensor:
    """`conv_forward` with gradients, for CPU tensors in Triton's interpreter."""
    result: Tensor = _InterpretedConv.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _scan_inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> tuple[Any, ...]:
    vectors = [None if x is None else x.contiguous() for x in (D, delta_bias)]
    return _rows(u), _rows(delta), A.contiguous(), B, C, vectors[0], None if z is None else _rows(z), vectors[1]


def _scan_strides(given: tuple[Any, ...]) -> tuple[int, ...]:
    u, delta, _, B, C, _, z, _ = given
    rows = (u, delta, u if z is None else z)
    return (*(x.stride(i) for x in rows for i in range(2)), *B.stride(), *C.stride())


def _scan_sizes(A: Tensor, softplus: bool, reverse: bool) -> dict[str, Any]:
    padded = triton.next_power_of_2(A.shape[1])
    return {
        "STATES": A.shape[1],
        "PADDED": padded,
        "BLOCK": max(1, min(128, TILE // padded)),
        "CHUNK": operators.CHUNK,
        "SOFTPLUS": softplus,
        "REVERSE": reverse,
        "num_warps": 1,
    }


def _conv_programs(x: Tensor) -> int:
    batch, length, channels = x.shape
    programs: int = batch * triton.cdiv(length, SPAN) * triton.cdiv(channels, CONV_BLOCK)
    return programs


def _conv_sizes(weight: Tensor, reverse: bool, silu: bool) -> dict[str, Any]:
    return {"TAPS": weight.shape[1], "SPAN": SPAN, "BLOCK": CONV_BLOCK, "REVERSE": reverse, "SILU": silu}
