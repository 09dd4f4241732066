"""Two more forms of the scan in plain PyTorch, for where no kernel serves: one quick, one with a small graph.

Letters: B batch, L length, D channels, N state, S steps of a chunk.

`chunked_scan` is what runs without a compiler: the recurrence is one in-place operation a step, everything else is
done for a chunk of steps at once, and the backward pass recomputes a chunk from the state before it. `graph_scan` is
what torch.export and torch.compile see: the same chunks in torch's own loop operator, whose body stands in the graph
once whatever the length is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops import scan as loop  # its public name, torch.scan, is yet to come

from pretrain.ops.reference import full_precision, skip_and_gate, step_sizes, working_dtype

STEPS = 16
"""Steps worked on at once: enough to amortise the calls, few enough for the working set to stay in the cache."""


def chunked_scan(
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
    """The same result as `reference.sequential_scan`, several times as fast; differentiable once."""
    work = working_dtype(u_BLD.dtype)
    with full_precision(u_BLD.device.type):
        u, delta, A, B, C = (x.to(work) for x in (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN))
        delta = step_sizes(delta, delta_bias_D, delta_softplus)
        y_BLD, state_BDN = _ChunkedRecurrence.apply(u, delta, A, B, C, reverse)  # type: ignore[no-untyped-call]
        y_BLD = skip_and_gate(y_BLD, u, D_D, None if z_BLD is None else z_BLD.to(work))
    return y_BLD.to(u_BLD.dtype), state_BDN


def graph_scan(
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
    """The same result as `reference.sequential_scan`, in a graph of bounded size and, without gradients, memory."""
    work, length = working_dtype(u_BLD.dtype), u_BLD.shape[1]
    with full_precision(u_BLD.device.type):
        u, delta, A, B, C = (x.to(work) for x in (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN))
        delta = step_sizes(delta, delta_bias_D, delta_softplus)

        def chunks(x: Tensor) -> Tensor:
            """(chunks, B, S, ...) in the order of the walk; the zeros at its end are steps that change nothing."""
            walked = x.flip(1) if reverse else x
            whole: Tensor = F.pad(walked, (0, 0, 0, -length % STEPS)).unflatten(1, (-1, STEPS))
            return whole.movedim(1, 0)

        def walk_chunk(state: Tensor, chunk: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            u_BSD, delta_BSD, B_BSN, C_BSN = chunk
            factor = torch.exp(delta_BSD[..., None] * A)
            drive = (delta_BSD * u_BSD)[..., None] * B_BSN[:, :, None, :]
            states: list[Tensor] = []
            for k in range(STEPS):
                state = torch.addcmul(drive[:, k], factor[:, k], state)
                states.append(state)
            y_BSD = torch.matmul(torch.stack(states, 1), C_BSN[..., None]).squeeze(-1)
            return state.clone(), y_BSD

        start_BDN = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
        last_BDN, rows = loop(walk_chunk, start_BDN, tuple(chunks(x) for x in (u, delta, B, C)))
        y_BLD = rows.movedim(0, 1).flatten(1, 2)[:, :length]
        y_BLD = skip_and_gate(y_BLD.flip(1) if reverse else y_BLD, u, D_D, None if z_BLD is None else z_BLD.to(work))
    return y_BLD.to(u_BLD.dtype), last_BDN


class _ChunkedRecurrence(torch.autograd.Function):
    """y_t = C_t · h_t, h_t = exp(delta_t A) h + delta_t u_t B_t, and the last h."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        y_BLD = torch.empty_like(u, memory_format=torch.contiguous_format)
        state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
        starts: list[Tensor] = []
        for span in _spans(u.shape[1], reverse):
            starts.append(state)
            _, _, after = _run_chunk(u[:, span], delta[:, span], A, B[:, span], state, reverse)
            y_BLD[:, span] = torch.matmul(after.transpose(0, 1), C[:, span, :, None]).squeeze(-1)
            state = after[0 if reverse else -1].clone()
        ctx.save_for_backward(u, delta, A, B, C, *starts)
        ctx.reverse = reverse
        return y_BLD, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, *starts = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta, B, C)]
        grad_A = torch.zeros_like(A)
        spans = list(_spans(u.shape[1], ctx.reverse))
        for span, start in zip(reversed(spans), reversed(starts), strict=True):
            inputs = (u[:, span], delta[:, span], A, B[:, span], C[:, span])
            *chunk_grads, chunk_A, grad_state = _chunk_gradients(
                inputs, start, grad_y[:, span], grad_state, ctx.reverse
            )
            for whole, part in zip(grads, chunk_grads, strict=True):
                whole[:, span] = part
            grad_A += chunk_A
        grad_u, grad_delta, grad_B, grad_C = grads
        return grad_u, grad_delta, grad_A, grad_B, grad_C, None


def _spans(length: int, reverse: bool) -> list[slice]:
    """The chunks in the order in which the scan meets them."""
    spans = [slice(at, min(at + STEPS, length)) for at in range(0, length, STEPS)]
    return spans[::-1] if reverse else spans


def _run_chunk(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The factors, drive and states after each step of one chunk, (S, B, D, N) in the order of positions."""
    delta_SBD = delta.transpose(0, 1).contiguous()
    factor = torch.exp_(delta_SBD[..., None] * A)
    drive_SBD = delta_SBD * u.transpose(0, 1)
    after = drive_SBD[..., None] * B.transpose(0, 1)[:, :, None, :]
    steps = range(after.shape[0])
    for k in reversed(steps) if reverse else steps:
        after[k].addcmul_(factor[k], state)
        state = after[k]
    return factor, drive_SBD, after


def _chunk_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    start: Tensor,
    grad_y: Tensor,
    grad_state: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, B, C, A and of the state before the chunk, from those of y and of the state after it."""
    u, delta, A, B, C = inputs
    factor, drive_SBD, after = _run_chunk(u, delta, A, B, start, reverse)
    grad_y_SBD, B_SBN = grad_y.transpose(0, 1), B.transpose(0, 1)
    grad_C = torch.matmul(grad_y_SBD[:, :, None, :], after).squeeze(2)
    grad = grad_y_SBD[..., None] * C.transpose(0, 1)[:, :, None, :]  # of the states, once what comes after is added
    steps = range(after.shape[0])
    first = steps[-1] if reverse else 0
    grad[0 if reverse else -1] += grad_state
    for k in steps if reverse else reversed(steps):
        if k != first:
            grad[k + 1 if reverse else k - 1].addcmul_(factor[k], grad[k])
    grad_before = factor[first] * grad[first]
    grad_drive = torch.matmul(grad, B_SBN[..., None]).squeeze(-1)
    grad_B = torch.matmul(drive_SBD[:, :, None, :], grad).squeeze(2)
    before = torch.cat([after[1:], start[None]]) if reverse else torch.cat([start[None], after[:-1]])
    grad_log = factor.mul_(before).mul_(grad)  # of delta A
    grad_delta = (grad_log * A).sum(-1) + grad_drive * u.transpose(0, 1)
    grad_A = grad_log.mul_(delta.transpose(0, 1)[..., None]).sum((0, 1))  # einsum is twenty times as slow here
    grad_u = grad_drive * delta.transpose(0, 1)
    over_time = (x.transpose(0, 1) for x in (grad_u, grad_delta, grad_B, grad_C))
    return (*over_time, grad_A, grad_before)  # type: ignore[return-value]
