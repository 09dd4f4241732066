"""Every backend of the scan and the convolution on its own device, against float64 on the CPU."""

import pytest
import torch

from pretrain.models.config import VisionConfig
from pretrain.models.videomamba import VideoMamba
from pretrain.ops import causal_conv1d, selective_scan
from pretrain.ops.reference import sequential_scan
from tests.pretrain.conv_cases import grouped_convolution
from tests.pretrain.conv_cases import run as run_conv
from tests.pretrain.scan_cases import CASES, draw, run, worst_error

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def away(function, device, **options):
    """The function on tensors of another device; what goes in and comes out, gradients too, is on the CPU."""

    def call(*arguments):
        found = function(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments), **options)
        return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()

    return call


def scan_of(backend, device):
    """y and the last state; mamba-ssm has no gradient for the latter, so there it says nothing."""
    if backend != "mamba_ssm":
        return away(selective_scan, device, return_last_state=True, backend=backend)
    return lambda *given: (away(selective_scan, device, backend=backend)(*given), torch.zeros(1, requires_grad=True))


def reference_of(backend):
    if backend != "mamba_ssm":
        return sequential_scan
    return lambda *given: (sequential_scan(*given)[0], torch.zeros(1, requires_grad=True))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5], CASES[7]], ids=str)
def test_scan(backend, case, reverse, dtype):
    softplus = case[-1]
    expected = run(reference_of(backend[0]), draw(*case, dtype), torch.float64, reverse, softplus)
    name, error = worst_error(run(scan_of(*backend), draw(*case, dtype), dtype, reverse, softplus), expected)
    assert error < TOLERANCES[dtype], name


def test_the_same_twice(backend):
    name, _ = backend
    if name == "mamba_ssm":
        pytest.skip("mamba-ssm adds the gradients of B and C atomically")
    case = (3, 70, 130, 16, True, True, True, True)
    first, second = (run(scan_of(*backend), draw(*case), torch.float32, False, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("length, channels, taps", [(1, 5, 4), (37, 70, 4), (100, 33, 3)])
def test_conv(backend, length, channels, taps, dtype, reverse):
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, channels, generator=generator, dtype=torch.float64).to(dtype).double()
    weight = torch.randn(channels, taps, generator=generator, dtype=torch.float64)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    expected = run_conv(grouped_convolution, (x, weight, bias), torch.float64, reverse, True)
    ours = run_conv(away(causal_conv1d, backend[1], backend=backend[0]), (x, weight, bias), dtype, reverse, True)
    for name, a, b in zip(("y", "x", "weight", "bias"), ours, expected, strict=True):
        assert (a.double() - b).norm() <= TOLERANCES[dtype] * b.norm(), name


def encoder():
    torch.manual_seed(0)
    sizes = {"depth": 2, "width": 24, "patch_size": 8, "tubelet": 2, "frames": 4, "image_size": 32}
    return VideoMamba(VisionConfig(**sizes)).train()


def training_step(call, model, device, dtype):
    """Tokens and the gradients of every parameter, on the CPU in float64."""
    clips = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.to(device, dtype).zero_grad()
    tokens = call(clips.to(device, dtype)).tokens_BLD
    (tokens * torch.linspace(-1, 1, tokens.numel(), device=device, dtype=dtype).view_as(tokens)).sum().backward()
    return {"tokens": tokens.detach().cpu().double(), **{n: p.grad.cpu().double() for n, p in model.named_parameters()}}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_training_step_of_the_encoder(device, compiled):
    model = encoder()
    expected = training_step(model, model, "cpu", torch.float64)
    call = torch.compile(model, fullgraph=True) if compiled else model
    ours = training_step(call, model, device, torch.float32)
    for name, value in expected.items():
        assert (ours[name] - value).norm() <= 1e-3 * value.norm() + 1e-9, name
