"""The Triton kernels in Triton's interpreter, on CPU tensors; test_ops_triton.py runs this file in a process apart.

The interpreter has to be asked for before Triton is imported (TRITON_INTERPRET=1), and takes milliseconds for every
operation of every program: lengths are short, and the quick cases have chunks of four positions in place of sixteen,
so that several chunks, groups and a cut one are met all the same.
"""

import pytest
import torch

from pretrain.ops import backends, causal_conv1d, operators, selective_scan, triton_launch
from pretrain.ops.reference import sequential_scan
from tests.pretrain.conv_cases import grouped_convolution
from tests.pretrain.conv_cases import run as run_conv
from tests.pretrain.scan_cases import CASES, draw, run, worst_error

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# (batch, length, channels, state, D, z, delta_bias, softplus), element type, reverse
QUICK = [
    ((2, 1, 3, 1, True, True, True, True), torch.float32, True),
    ((1, 11, 5, 3, True, True, True, True), torch.float32, False),
    ((1, 10, 5, 3, True, True, True, True), torch.bfloat16, True),
    ((1, 6, 7, 8, False, False, False, False), torch.float16, True),
    ((1, 5, 33, 16, False, True, False, True), torch.float32, True),
    ((1, 4, 3, 8, True, False, True, True), torch.float32, False),
]


def triton_scan(*arguments):
    return selective_scan(*arguments, return_last_state=True, backend="triton")


def compare(case, dtype, reverse):
    softplus = case[-1]
    expected = run(sequential_scan, draw(*case, dtype), torch.float64, reverse, softplus)
    ours = run(triton_scan, draw(*case, dtype), dtype, reverse, softplus)
    assert ours[0].dtype == dtype
    assert ours[1].dtype == torch.float32
    name, error = worst_error(ours, expected)
    assert error < TOLERANCES[dtype], name
    return ours


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(operators, "CHUNK", 4)
    monkeypatch.setattr(triton_launch, "GROUP", 2)


@pytest.mark.parametrize("case, dtype, reverse", QUICK, ids=str)
def test_scan(case, dtype, reverse, small_chunks):
    compare(case, dtype, reverse)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], (1, 37, 40, 11, False, True, True, True)], ids=str)
def test_scan_with_whole_chunks(case, dtype, reverse):
    compare(case, dtype, reverse)


def test_the_same_twice(small_chunks):
    case = (2, 9, 40, 3, True, True, True, True)
    for first, second in zip(compare(case, torch.float32, False), compare(case, torch.float32, False), strict=True):
        assert torch.equal(first, second)


def test_views_are_read_in_place(small_chunks):
    wide, small, A = torch.randn(1, 6, 24), torch.randn(1, 6, 13), -torch.rand(6, 4)

    def loss(make, backend):
        a, b = wide.clone().requires_grad_(), small.clone().requires_grad_()
        u, delta, z, _ = (make(x) for x in a.chunk(4, dim=-1))
        y = selective_scan(u, delta, A, make(b[..., 1:5]), make(b[..., 9:]), None, z, None, True, backend=backend)
        y.sum().backward()  # a gradient with stride 0 in every dimension
        return y.detach(), a.grad, b.grad

    for ours, theirs in zip(loss(lambda x: x, "triton"), loss(torch.clone, "reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_extreme_step_sizes():
    delta = torch.tensor([-200.0, -80, -20, -1e-6, 0, 1e-6, 19.9, 20.1, 80, 200]).view(1, 10, 1).expand(1, 10, 5)
    u, B, C = torch.ones(1, 10, 5), torch.ones(1, 10, 4), torch.ones(1, 10, 4)
    A = -torch.logspace(-6, 4, 20).view(5, 4)
    theirs = selective_scan(*(x.double() for x in (u, delta, A, B, C)), delta_softplus=True)
    ours = selective_scan(u, delta, A, B, C, delta_softplus=True, backend="triton")
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize("poisoned", range(8))
def test_nan_stays_visible(poisoned):
    inputs = [x.float() for x in draw(1, 4, 3, 2, True, True, True, True)]
    inputs[poisoned].view(-1)[0] = float("nan")
    assert selective_scan(*inputs, True, backend="triton").isnan().any()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize(
    "batch, length, channels, taps, silu",
    [(2, 1, 5, 4, True), (1, 2, 24, 4, True), (3, 3, 33, 4, False), (1, 37, 70, 4, True), (1, 40, 7, 3, True)],
)
def test_conv(batch, length, channels, taps, silu, dtype, tolerance, reverse):
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, channels, generator=generator, dtype=torch.float64).to(dtype).double()
    weight = torch.randn(channels, taps, generator=generator, dtype=torch.float64)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    expected = run_conv(grouped_convolution, (x, weight, bias), torch.float64, reverse, silu)
    ours = run_conv(causal_conv1d, (x, weight, bias), dtype, reverse, silu, "triton")
    assert ours[0].dtype == dtype
    for name, a, b in zip(("y", "x", "weight", "bias"), ours, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm(), name


def test_it_is_listed():
    status = {s.name: s for s in backends()}["triton"]
    assert status.available
    assert not status.default
