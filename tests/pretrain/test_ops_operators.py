"""The operators as torch.library sees them, and what they keep for the backward pass."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.ops import Direction, backends, bidirectional_conv1d, bidirectional_scan, causal_conv1d, selective_scan
from pretrain.ops.quick_reference import chunked_scan


@pytest.fixture(autouse=True)
def kernels():
    status = next(status for status in backends() if status.name == "cpu")
    if not status.available:
        pytest.skip(status.reason)


def scan_inputs(batch=2, length=19, channels=24, states=8, full=True):
    draw = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=draw).requires_grad_()

    A = (-torch.rand(channels, states, generator=draw)).requires_grad_()
    rows = [normal(batch, length, channels) for _ in range(3)]
    B, C = normal(batch, length, states), normal(batch, length, states)
    D, bias = (normal(channels), normal(channels)) if full else (None, None)
    return (rows[0], rows[1], A, B, C, D, rows[2] if full else None, bias)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("last_state", [False, True])
def test_scan_operator_keeps_the_contract(full, last_state):
    arguments = (*scan_inputs(full=full), True, not full, True, last_state)
    torch.library.opcheck(torch.ops.videomamba.scan_forward.default, arguments)


@pytest.mark.parametrize("bias", [False, True])
def test_conv_operator_keeps_the_contract(bias):
    x, weight = torch.randn(2, 9, 24, requires_grad=True), torch.randn(24, 4, requires_grad=True)
    offset = torch.randn(24, requires_grad=True) if bias else None
    torch.library.opcheck(torch.ops.videomamba.conv_forward.default, (x, weight, offset, bias, True))


@pytest.mark.parametrize("full", [False, True])
def test_bidirectional_operators_keep_the_contract(full):
    u, delta, A, B, C, D, z, bias = scan_inputs(full=full)
    direction = (u, delta, A, B, C, D, bias)
    arguments = (*direction, *(None if x is None else x.detach().clone().requires_grad_() for x in direction), z)
    torch.library.opcheck(torch.ops.videomamba.bidirectional_scan_forward.default, (*arguments, True, True))
    weights = [torch.randn(24, 4, requires_grad=True) for _ in range(2)]
    offsets = [torch.randn(24, requires_grad=True) if full else None for _ in range(2)]
    filters = (weights[0], offsets[0], weights[1], offsets[1])
    torch.library.opcheck(torch.ops.videomamba.bidirectional_conv_forward.default, (u, *filters, True))


class Calls(TorchDispatchMode):
    """Keeps what each of our operators is called with."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation.namespace == "videomamba":
            self.seen[operation] = arguments
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("full", [False, True])
def test_backward_operators_keep_the_contract(full):
    """With the arguments that a backward pass gives them; they are not differentiable themselves."""
    u, delta, A, B, C, D, z, bias = scan_inputs(full=full)
    weight, offset = torch.randn(24, 4), torch.randn(24) if full else None
    with Calls() as calls:
        selective_scan(u, delta, A, B, C, D, z, bias, True, full, backend="cpu").sum().backward()
        ahead = Direction(u, delta, A, B, C, D, bias)
        bidirectional_scan(ahead, ahead, z, backend="cpu").sum().backward()
        causal_conv1d(u, weight, offset, full, backend="cpu").sum().backward()
        pair = bidirectional_conv1d(u, weight, offset, weight, offset, backend="cpu")
        (pair[0] * pair[1]).sum().backward()
    backward = {operation: given for operation, given in calls.seen.items() if "backward" in str(operation)}
    assert len(calls.seen) == 2 * len(backward) == 8, "an operator that no test here calls"
    for operation, given in backward.items():
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
        torch.library.opcheck(operation, detached, test_utils=("test_schema", "test_faketensor"))


def test_states_are_stored_for_gradients_alone(monkeypatch):
    """Without a gradient to come nothing is kept; with one, a state every sixteen positions."""
    from pretrain.ops import dispatch

    stored = []

    def spy(*arguments):
        result = torch.ops.videomamba.scan_forward(*arguments)
        stored.append(result[2].shape)
        return result

    monkeypatch.setattr(dispatch, "scan_forward", spy)
    inputs = scan_inputs(length=40)
    selective_scan(*inputs, backend="cpu")
    with torch.no_grad():
        selective_scan(*inputs, backend="cpu")
    assert stored == [(2, 2, 8, 24), (0,)]


def test_gradient_through_the_last_state_alone():
    inputs = scan_inputs(full=False)
    leaves = [x for x in inputs if x is not None]

    def gradients(scan):
        return torch.autograd.grad(scan(*inputs, delta_softplus=True)[1].square().sum(), leaves, allow_unused=True)

    ours = gradients(lambda *x, **options: selective_scan(*x, **options, return_last_state=True, backend="cpu"))
    for a, b in zip(ours, gradients(chunked_scan), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
