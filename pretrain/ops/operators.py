"""The operators `torch.ops.videomamba.*`: their schemas, shapes and gradients, whatever kernel stands behind them.

Letters: B batch, L length, D channels, N state, K taps of the convolution.

A kernel library registers itself for a device: the C++ one for CPU when it is loaded, Triton for CUDA, imported at the
first call. torch.compile keeps one graph around them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 16
"""Positions between two stored states; csrc/scan.h has the same number."""

NAMESPACE = "videomamba"

_SCAN_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
_CONV_INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool reverse, bool silu"
_SCHEMAS = (
    f"scan_forward({_SCAN_INPUTS}, bool delta_softplus, bool reverse, bool save_states, bool last_state)"
    " -> (Tensor y, Tensor last_state, Tensor states)",
    f"scan_backward(Tensor grad_y, Tensor? grad_last_state, Tensor states, {_SCAN_INPUTS},"
    " bool delta_softplus, bool reverse)"
    " -> (Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z, Tensor delta_bias)",
    f"conv_forward({_CONV_INPUTS}) -> Tensor",
    f"conv_backward(Tensor grad_y, {_CONV_INPUTS}) -> (Tensor x, Tensor weight, Tensor bias)",
)

_library = torch.library.Library(NAMESPACE, "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)


def dense(like: Tensor) -> Tensor:
    """An empty tensor of this one's shape, with nothing between its rows."""
    return like.new_empty(like.shape)


def or_nothing(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The same for a tensor that may not be there: then one of no elements, of the type of `like`."""
    return like.new_empty(0) if tensor is None else dense(tensor)


def _scan_forward_shapes(u: Tensor, _: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    save_states, last_state = rest[-2:]
    batch, length, channels = u.shape
    states = A.shape[1]
    stored = (batch, (length + CHUNK - 1) // CHUNK - 1, states, channels) if save_states else (0,)
    return dense(u), A.new_empty((batch, channels, states) if last_state else (0,)), A.new_empty(stored)


def _scan_backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    u, delta, A, B, C, D, z, delta_bias = arguments[3:11]
    always = tuple(dense(x) for x in (u, delta, A, B, C))
    return (*always, or_nothing(D, A), or_nothing(z, A), or_nothing(delta_bias, A))


def keep_scan_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """What a forward pass of the scan leaves for `scan_gradients`."""
    *tensors, ctx.delta_softplus, ctx.reverse, _, _ = inputs
    states = output[2]
    ctx.mark_non_differentiable(states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(states, *tensors)


def scan_gradients(
    ctx: Any,
    grad_y: Tensor | None,
    grad_last_state: Tensor | None,
    _: Tensor | None,
    backward: Callable[..., tuple[Tensor, ...]] = torch.ops.videomamba.scan_backward,
) -> tuple[Tensor | None, ...]:
    """The gradients of scan_forward's arguments, by the kernel `backward`."""
    states, *tensors = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    grads = backward(grad_y, grad_last_state, states, *tensors, ctx.delta_softplus, ctx.reverse)
    wanted = (None if tensor is None else grad for grad, tensor in zip(grads, tensors, strict=True))
    return (*wanted, None, None, None, None)


def _conv_forward_shapes(x: Tensor, *_: Any) -> Tensor:
    return dense(x)


def _conv_backward_shapes(_: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *__: Any) -> tuple[Tensor, ...]:
    return dense(x), dense(weight), or_nothing(bias, weight)


def keep_conv_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    """What a forward pass of the convolution leaves for `conv_gradients`."""
    x, weight, bias, ctx.reverse, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def conv_gradients(
    ctx: Any, grad_y: Tensor, backward: Callable[..., tuple[Tensor, ...]] = torch.ops.videomamba.conv_backward
) -> tuple[Tensor | None, ...]:
    """The gradients of conv_forward's arguments, by the kernel `backward`."""
    x, weight, bias = ctx.saved_tensors
    grads = backward(grad_y, x, weight, bias, ctx.reverse, ctx.silu)
    return grads[0], grads[1], None if bias is None else grads[2], None, None


_SHAPES: dict[str, Callable[..., Any]] = {
    "scan_forward": _scan_forward_shapes,
    "scan_backward": _scan_backward_shapes,
    "conv_forward": _conv_forward_shapes,
    "conv_backward": _conv_backward_shapes,
}
for _name, _shapes in _SHAPES.items():
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _shapes)
torch.library.register_autograd(f"{NAMESPACE}::scan_forward", scan_gradients, setup_context=keep_scan_inputs)
torch.library.register_autograd(f"{NAMESPACE}::conv_forward", conv_gradients, setup_context=keep_conv_inputs)


def _launch_triton(name: str) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        from pretrain.ops import triton_launch

        return getattr(triton_launch, name)(*arguments)

    return launch


for _name in ("scan_forward", "scan_backward", "conv_forward", "conv_backward"):
    _library.impl(_name, _launch_triton(_name), "CUDA")

scan_forward = torch.ops.videomamba.scan_forward
conv_forward = torch.ops.videomamba.conv_forward
