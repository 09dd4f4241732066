"""The scan: its forms in PyTorch, views, types, extremes and shapes. Backends against float64: test_ops_agreement."""

import pytest
import torch

from pretrain.ops import backends, selective_scan
from pretrain.ops.quick_reference import chunked_scan
from pretrain.ops.reference import sequential_scan
from tests.pretrain.scan_cases import CASES, draw, run, worst_error


def need_cpu_kernels():
    status = next(status for status in backends() if status.name == "cpu")
    if not status.available:
        pytest.skip(status.reason)


@pytest.fixture
def kernels():
    need_cpu_kernels()


def kernel(*arguments):
    return selective_scan(*arguments, return_last_state=True, backend="cpu")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", [*CASES[:6], CASES[7]], ids=str)
def test_the_quick_form_agrees(case, reverse):
    softplus = case[-1]
    expected = run(sequential_scan, draw(*case), torch.float64, reverse, softplus)
    name, error = worst_error(run(chunked_scan, draw(*case), torch.float64, reverse, softplus), expected)
    assert error < 1e-12, name


@pytest.mark.parametrize("form", [sequential_scan, chunked_scan])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(form, reverse):
    inputs = [x.requires_grad_() for x in draw(2, 5, 3, 2, True, True, True, True)]
    assert torch.autograd.gradcheck(lambda *x: form(*x, True, reverse), inputs)


def test_scan_by_hand():
    """One channel, one state: h = 0.5 h + 2 u, y = 3 h."""
    u = torch.tensor([1.0, 0.0, 4.0]).view(1, 3, 1)
    delta, two, three = torch.ones(1, 3, 1), torch.full((1, 3, 1), 2.0), torch.full((1, 3, 1), 3.0)
    A = torch.tensor([[0.5]]).log()
    y, state = selective_scan(u, delta, A, two, three, return_last_state=True)
    torch.testing.assert_close(y.flatten(), torch.tensor([6.0, 3.0, 25.5]))
    torch.testing.assert_close(state.flatten(), torch.tensor([8.5]))
    backwards = selective_scan(u, delta, A, two, three, reverse=True)
    torch.testing.assert_close(backwards.flatten(), torch.tensor([12.0, 12.0, 24.0]))


@pytest.mark.parametrize("backend", ["reference", "cpu", "auto"])
def test_reverse_is_a_scan_of_the_flipped(backend, kernels):
    u, delta, A, B, C, D, z, bias = draw(2, 19, 24, 16, True, True, True, True)
    rows = [x.float() for x in (u, delta, B, C, z)]
    u, delta, B, C, z = rows
    A, D, bias = A.float(), D.float(), bias.float()
    ours = selective_scan(u, delta, A, B, C, D, z, bias, True, reverse=True, backend=backend)
    u, delta, B, C, z = (x.flip(1) for x in rows)
    flipped = selective_scan(u, delta, A, B, C, D, z, bias, True, backend=backend).flip(1)
    torch.testing.assert_close(ours, flipped, rtol=0, atol=1e-6 if backend == "reference" else 0)


def test_views_are_read_in_place(kernels):
    """u, delta and z as parts of wider projections, B and C as columns of another: values and gradients."""
    wide = torch.randn(2, 9, 80)
    small = torch.randn(2, 9, 37)
    A = -torch.rand(20, 16)

    def loss(make, backend):
        a, b = wide.clone().requires_grad_(), small.clone().requires_grad_()
        u, delta, z, _ = (make(x) for x in a.chunk(4, dim=-1))
        B, C = make(b[..., 5:21]), make(b[..., 21:])
        y = selective_scan(u, delta, A, B, C, None, z, None, True, backend=backend)
        y.sum().backward()  # a gradient with stride 0 in every dimension
        return y.detach(), a.grad, b.grad

    for ours, theirs in zip(loss(lambda x: x, "cpu"), loss(lambda x: x.contiguous(), "reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("poisoned", range(8))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(poisoned, bad, kernels):
    inputs = [x.float() for x in draw(2, 20, 24, 16, True, True, True, True)]
    inputs[poisoned].view(-1)[inputs[poisoned].numel() // 2] = bad
    assert not torch.isfinite(selective_scan(*inputs, True, backend="cpu")).all()
    if poisoned != 2:
        inputs[poisoned].nan_to_num_(0, 0, 0)
        assert torch.isfinite(selective_scan(*inputs, True, backend="cpu")).all()


def test_extreme_step_sizes(kernels):
    """Softplus and the exponential at both ends: no overflow where PyTorch has none."""
    delta = torch.tensor([-200.0, -80, -20, -1e-6, 0, 1e-6, 19.9, 20.1, 80, 200]).view(1, 10, 1).expand(1, 10, 17)
    u, B, C = torch.ones(1, 10, 17), torch.ones(1, 10, 16), torch.ones(1, 10, 16)
    A = -torch.logspace(-6, 4, 17 * 16).view(17, 16)
    theirs = selective_scan(*(x.double() for x in (u, delta, A, B, C)), delta_softplus=True)
    ours = selective_scan(u, delta, A, B, C, delta_softplus=True, backend="cpu")
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=1e-37)


def test_mixed_types_and_autocast(kernels):
    """bfloat16 rows beside float32 step sizes, half precision, and autocast around the call."""
    u, delta, A, B, C, *_ = (None if x is None else x.float() for x in draw(2, 9, 24, 16, *[False] * 3, True))
    exact = selective_scan(u.bfloat16().float(), delta, A, B, C, delta_softplus=True)
    mixed = selective_scan(u.bfloat16(), delta, A, B, C, delta_softplus=True)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, exact.bfloat16())
    assert selective_scan(u.half(), delta.half(), A, B, C, delta_softplus=True).dtype == torch.float16
    plain = [selective_scan(u, delta, A, B, C, delta_softplus=True, backend=name) for name in ("cpu", "reference")]
    with torch.autocast("cpu", torch.bfloat16):
        for backend, expected in zip(("cpu", "reference"), plain, strict=True):
            inside = selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)
            assert torch.equal(inside, expected)


def test_number_of_threads_changes_rounding_only(kernels):
    inputs = draw(1, 40, 100, 16, True, True, True, True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(kernel, inputs, torch.float32, False, True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert worst_error(results[0], [x.double() for x in results[1]])[1] < 1e-6


def test_empty_input():
    y = selective_scan(torch.zeros(0, 4, 8), torch.zeros(0, 4, 8), torch.zeros(8, 2), *[torch.zeros(0, 4, 2)] * 2)
    assert y.shape == (0, 4, 8)


@pytest.mark.parametrize(
    "index, shape, named",
    [(1, (2, 3, 5), "delta"), (2, (5, 2), "A"), (3, (2, 3, 5), "B"), (5, (3,), "D"), (6, (2, 4, 4), "z")],
)
def test_wrong_shapes_are_named(index, shape, named):
    inputs = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(4, 2), *[torch.zeros(2, 3, 2)] * 2]
    inputs += [torch.zeros(4), torch.zeros(2, 3, 4)]
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"{named} has shape"):
        selective_scan(*inputs)
