"""The operators of both directions at once, `torch.ops.videomamba.bidirectional_*`: schemas, shapes and gradients.

Letters: B batch, L length, D channels, N state, K taps of the convolution.

What comes with the suffix `_b` belongs to the direction that runs back.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain.ops.operators import CHUNK, NAMESPACE, dense, or_nothing

_DIRECTION = "Tensor u{0}, Tensor delta{0}, Tensor A{0}, Tensor B{0}, Tensor C{0}, Tensor? D{0}, Tensor? delta_bias{0}"
_SCAN_INPUTS = f"{_DIRECTION.format('')}, {_DIRECTION.format('_b')}, Tensor? z, bool delta_softplus"
_CONV_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor weight_b, Tensor? bias_b, bool silu"
_SCHEMAS = (
    f"bidirectional_scan_forward({_SCAN_INPUTS}, bool save_states) -> (Tensor y, Tensor states, Tensor states_b)",
    f"bidirectional_scan_backward(Tensor grad_y, Tensor states, Tensor states_b, {_SCAN_INPUTS}) -> Tensor[]",
    f"bidirectional_conv_forward({_CONV_INPUTS}) -> (Tensor ahead, Tensor back)",
    f"bidirectional_conv_backward(Tensor grad_ahead, Tensor grad_back, {_CONV_INPUTS})"
    " -> (Tensor x, Tensor weight, Tensor bias, Tensor weight_b, Tensor bias_b)",
)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _schema in _SCHEMAS:
    _library.define(_schema)


def _stored(u: Tensor, A: Tensor, save_states: bool) -> Tensor:
    """The states kept for the backward pass: after every chunk but the last."""
    batch, length, channels = u.shape
    chunks = (length + CHUNK - 1) // CHUNK
    return A.new_empty((batch, chunks - 1, A.shape[1], channels) if save_states else (0,))


def _scan_forward_shapes(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, A, u_b, A_b, save_states = inputs[0], inputs[2], inputs[7], inputs[9], inputs[16]
    return dense(u), _stored(u, A, save_states), _stored(u_b, A_b, save_states)


def _scan_backward_shapes(*arguments: Any) -> list[Tensor]:
    A, tensors = arguments[5], arguments[3:18]
    return [or_nothing(x, A) for x in tensors]


def _keep_scan_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *tensors)


def _scan_gradients(ctx: Any, grad_y: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    states, states_b, *tensors = ctx.saved_tensors
    grads = torch.ops.videomamba.bidirectional_scan_backward(grad_y, states, states_b, *tensors, ctx.delta_softplus)
    wanted = (None if tensor is None else grad for grad, tensor in zip(grads, tensors, strict=True))
    return (*wanted, None, None)


def _conv_forward_shapes(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return dense(x), dense(x)


def _conv_backward_shapes(_: Tensor, __: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    x, weight, bias, weight_b, bias_b, _silu = inputs
    offsets = (or_nothing(bias, weight), or_nothing(bias_b, weight))
    return dense(x), dense(weight), offsets[0], dense(weight_b), offsets[1]


def _keep_conv_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _conv_gradients(ctx: Any, grad_ahead: Tensor, grad_back: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = torch.ops.videomamba.bidirectional_conv_backward(grad_ahead, grad_back, *tensors, ctx.silu)
    return (*(None if tensor is None else grad for grad, tensor in zip(grads, tensors, strict=True)), None)


torch.library.register_fake(f"{NAMESPACE}::bidirectional_scan_forward", _scan_forward_shapes)
torch.library.register_fake(f"{NAMESPACE}::bidirectional_scan_backward", _scan_backward_shapes)
torch.library.register_fake(f"{NAMESPACE}::bidirectional_conv_forward", _conv_forward_shapes)
torch.library.register_fake(f"{NAMESPACE}::bidirectional_conv_backward", _conv_backward_shapes)
torch.library.register_autograd(
    f"{NAMESPACE}::bidirectional_scan_forward", _scan_gradients, setup_context=_keep_scan_inputs
)
torch.library.register_autograd(
    f"{NAMESPACE}::bidirectional_conv_forward", _conv_gradients, setup_context=_keep_conv_inputs
)

bidirectional_scan_forward = torch.ops.videomamba.bidirectional_scan_forward
bidirectional_conv_forward = torch.ops.videomamba.bidirectional_conv_forward
