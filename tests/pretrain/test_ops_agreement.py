"""Every backend of the scan and the convolution against float64, on random odd sizes: values and every gradient.

A backend is a parameter here. One that does not run on this machine is skipped, and says why.
"""

import functools
import random

import pytest
import torch

from pretrain.ops import Direction, backends, bidirectional_conv1d, bidirectional_scan, causal_conv1d, selective_scan
from pretrain.ops.reference import sequential_scan
from tests.pretrain import conv_cases, scan_cases
from tests.pretrain.scan_cases import draw, run, worst_error

BACKENDS = ["reference", "cpu"]
LENGTHS, STATES = (1, 2, 3, 17, 257), (1, 8, 16, 32)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw_cases():
    """(batch, length, channels, state, D, z, delta_bias, softplus): all lengths and states, the rest at random."""
    rng = random.Random(20)
    for length in LENGTHS:
        for states in STATES:
            channels = rng.choice([5, 7, 24, 33, 40, 71])  # no multiple of 16; some of 8
            yield (rng.randint(1, 3), length, channels, states, *(rng.random() < 0.6 for _ in range(4)))


# and a number of states that no tile divides, and VideoMamba-Ti's own size
CASES = [*draw_cases(), *scan_cases.CASES[6:]]


@pytest.fixture(params=BACKENDS)
def backend(request):
    status = next(status for status in backends() if status.name == request.param)
    if not status.available:
        pytest.skip(status.reason)
    return request.param


def test_the_cases_cover_each_option_both_ways():
    for option in zip(*(case[4:] for case in CASES), strict=True):
        assert {True, False} == set(option)
    assert {case[1] for case in CASES} >= set(LENGTHS)
    assert {case[3] for case in CASES} >= set(STATES)


@functools.cache
def expected_scan(case, dtype, reverse):
    return run(sequential_scan, draw(*case, dtype), torch.float64, reverse, case[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "back"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scan(case, reverse, dtype, backend):
    """Inputs are rounded first for both, so that what is measured is the backend's own rounding."""
    softplus = case[-1]

    def ours(*arguments):
        return selective_scan(*arguments, return_last_state=True, backend=backend)

    got = run(ours, draw(*case, dtype), dtype, reverse, softplus)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32, "the state is not kept in float32"
    name, error = worst_error(got, expected_scan(case, dtype, reverse))
    assert error < ROUNDING[dtype], name


def as_leaves(inputs, dtype):
    """Leaves of one direction's scan; rows in `dtype`, the rest in float32, or all in float64."""
    rest = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = (dtype, dtype, rest, rest, rest, rest, dtype, rest)
    return [
        None if x is None else x.to(kind, copy=True).requires_grad_() for x, kind in zip(inputs, kinds, strict=True)
    ]


def run_both(scan, ahead, back, dtype):
    """y of scan(ahead, back, z) and the gradients of everything that enters."""
    leaves = [as_leaves(inputs, dtype) for inputs in (ahead, back)]
    directions = [Direction(u, delta, A, B, C, D, bias) for u, delta, A, B, C, D, _, bias in leaves]
    y = scan(*directions, leaves[0][6])
    y.backward(torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y.dtype))
    tensors = [*leaves[0], *(x for index, x in enumerate(leaves[1]) if index != 6)]
    return [y.detach(), *(x.grad for x in tensors if x is not None)]


def two_scans(ahead, back, z, softplus):
    """The definition, in the inputs' own type."""
    y = 0
    for (u, delta, A, B, C, D, bias), reverse in ((ahead, False), (back, True)):
        y = y + sequential_scan(u, delta, A, B, C, D, None, bias, softplus, reverse)[0]
    return y if z is None else y * torch.nn.functional.silu(z)


def draw_both(case, dtype):
    return draw(*case, dtype), [None if x is None else x.flip(0) for x in draw(*case, dtype)]


@functools.cache
def expected_both(case, dtype):
    return run_both(lambda *x: two_scans(*x, case[-1]), *draw_both(case, dtype), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bidirectional_scan(case, dtype, backend):
    def ours(ahead, back, z):
        return bidirectional_scan(ahead, back, z, case[-1], backend=backend)

    got = run_both(ours, *draw_both(case, dtype), dtype)
    assert got[0].dtype == dtype
    for index, (a, b) in enumerate(zip(got, expected_both(case, dtype), strict=True)):
        assert (a.double() - b).norm() <= ROUNDING[dtype] * b.norm() + 1e-30, index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize(
    "length, channels, taps", [(1, 5, 4), (2, 24, 4), (3, 33, 4), (17, 71, 4), (257, 7, 4), (9, 5, 3)]
)
def test_convolution(length, channels, taps, silu, dtype, backend):
    """One direction after the other, and both at once, against torch's grouped convolution."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, channels, generator=generator, dtype=torch.float64).to(dtype).double()
    ahead, back = (
        (torch.randn(channels, taps, generator=generator).double(), torch.randn(channels, generator=generator).double())
        for _ in range(2)
    )

    def check(got, expected):
        for a, b in zip(got, expected, strict=True):
            assert (a.double() - b).norm() <= ROUNDING[dtype] * b.norm() + 1e-30

    expected = []
    for filters, reverse in ((ahead, False), (back, True)):
        tensors = (x, *filters)
        expected.append(conv_cases.run(conv_cases.grouped_convolution, tensors, torch.float64, reverse, silu))
        check(conv_cases.run(causal_conv1d, tensors, dtype, reverse, silu, backend), expected[-1])

    wide = torch.cat([x, x * 2], -1).to(dtype).requires_grad_()
    leaves = [t.float().requires_grad_() for t in (*ahead, *back)]
    pair = bidirectional_conv1d(wide[..., :channels], *leaves, silu, backend)
    wave = torch.sin(torch.arange(x.numel(), dtype=torch.float64)).view_as(x).to(dtype)
    torch.autograd.backward(pair, [wave, wave])
    summed = expected[0][1] + expected[1][1]  # each direction's gradient of x
    wanted = [expected[0][0], expected[1][0], summed, *expected[0][2:], *expected[1][2:]]
    check([*pair, wide.grad, *(leaf.grad for leaf in leaves)], wanted)
