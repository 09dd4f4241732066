"""The causal convolution against torch's own grouped convolution in float64."""

import pytest
import torch

from pretrain.ops import backends, causal_conv1d
from tests.pretrain.conv_cases import grouped_convolution, run


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "batch, length, channels, taps, silu",
    [(2, 1, 5, 4, True), (1, 2, 24, 4, True), (3, 3, 33, 4, False), (2, 17, 48, 4, True), (2, 40, 7, 3, True)],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_agrees_with_grouped_convolution(backend, reverse, batch, length, channels, taps, silu, dtype, tolerance):
    status = next(status for status in backends() if status.name == backend)
    if not status.available:
        pytest.skip(status.reason)
    draw = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, channels, generator=draw, dtype=torch.float64).to(dtype).double()
    weight = torch.randn(channels, taps, generator=draw, dtype=torch.float64)
    bias = torch.randn(channels, generator=draw, dtype=torch.float64)
    expected = run(grouped_convolution, (x, weight, bias), torch.float64, reverse, silu)
    ours = run(causal_conv1d, (x, weight, bias), dtype, reverse, silu, backend)
    assert ours[0].dtype == dtype
    for name, a, b in zip(("y", "x", "weight", "bias"), ours, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm(), name


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("reverse", [False, True])
def test_sees_one_side_only(backend, reverse):
    x, weight = torch.randn(1, 12, 8), torch.rand(8, 4) + 0.1
    changed = x.clone()
    changed[:, 6] += 1
    moved = (
        causal_conv1d(x, weight, None, reverse, backend=backend)
        != causal_conv1d(changed, weight, None, reverse, backend=backend)
    ).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == ([3, 4, 5, 6] if reverse else [6, 7, 8, 9])


def test_gradcheck():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(3, 4).double().requires_grad_(), torch.randn(3).double().requires_grad_()
    for reverse in (False, True):
        assert torch.autograd.gradcheck(
            lambda *t, r=reverse: causal_conv1d(*t, r, backend="reference"), (x, weight, bias)
        )


@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_nan_stays_visible(where):
    tensors = {"x": torch.randn(2, 9, 24), "weight": torch.randn(24, 4), "bias": torch.randn(24)}
    tensors[where].view(-1)[7] = float("nan")
    assert causal_conv1d(*tensors.values()).isnan().any()


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="weight has shape"):
        causal_conv1d(torch.zeros(1, 4, 8), torch.zeros(7, 4))
    with pytest.raises(ValueError, match="bias has shape"):
        causal_conv1d(torch.zeros(1, 4, 8), torch.zeros(8, 4), torch.zeros(4))
