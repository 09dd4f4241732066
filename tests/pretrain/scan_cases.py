"""Inputs of the scan on odd sizes, and one way to run and compare every form of it."""

import torch

NAMES = ("y", "last_state", "u", "delta", "A", "B", "C", "D", "z", "delta_bias")
# (batch, length, channels, state, D, z, delta_bias, softplus): every value the kernels have a path of their own for
CASES = [
    (2, 1, 5, 1, True, True, True, True),
    (3, 2, 24, 8, True, False, True, True),
    (2, 3, 33, 16, False, True, False, True),
    (2, 17, 33, 32, True, True, True, False),
    (3, 17, 5, 8, False, False, False, False),
    (2, 257, 24, 1, True, False, False, True),
    (1, 257, 384, 16, True, True, True, True),
    (2, 33, 24, 11, False, True, True, True),
]


def draw(batch, length, channels, states, has_D, has_z, has_bias, softplus, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length * 1000 + channels)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    u, z = normal(batch, length, channels), normal(batch, length, channels)
    delta = normal(batch, length, channels) - 1.0
    delta = delta if softplus else delta.exp() * 0.5
    A = -torch.exp(normal(channels, states))
    B, C = normal(batch, length, states), normal(batch, length, states)
    D, bias = normal(channels), normal(channels).abs() * 0.3
    u, delta, z = (x.to(dtype).double() for x in (u, delta, z))
    return [u, delta, A, B, C, D if has_D else None, z if has_z else None, bias if has_bias else None]


def run(scan, inputs, row_type, reverse, softplus):
    """y, last state and the gradients of a loss that both enter, inputs (B, L, D) in the row type."""
    as_given = []
    for index, x in enumerate(inputs):
        if x is None:
            as_given.append(None)
            continue
        kind = row_type if index in (0, 1, 6) else torch.float64 if row_type == torch.float64 else torch.float32
        as_given.append(x.to(kind).requires_grad_())
    y, state = scan(*as_given, softplus, reverse)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, state)]
    torch.autograd.backward([y, state], [w.to(x.dtype) for w, x in zip(weights, (y, state), strict=True)])
    return [y, state, *(None if x is None else x.grad for x in as_given)]


def worst_error(ours, theirs):
    errors = {}
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        if b is None:
            assert a is None, name
            continue
        a, b = torch.zeros_like(b) if a is None else a.detach().double(), b.detach()
        assert a.shape == b.shape
        # A gradient that is zero by construction (A's at length 1) has no relative error.
        errors[name] = ((a - b).norm() / b.norm()).item() if b.norm() > 0 else a.norm().item()
    return max(errors.items(), key=lambda item: item[1])
