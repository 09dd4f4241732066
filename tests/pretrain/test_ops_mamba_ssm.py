"""The adapter of mamba-ssm: against its own reference where it is installed, and against its signature everywhere."""

import functools
import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from pretrain.ops import mamba_ssm_adapter
from pretrain.ops.reference import sequential_scan
from tests.pretrain.scan_cases import CASES, draw, run, worst_error


def channels_first(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """The signature of mamba-ssm's `selective_scan_fn`, written for its layouts: (B, D, L) rows, (B, N, L) B and C."""
    assert u.shape == delta.shape == (len(u), len(A), u.shape[2])
    assert B.shape == C.shape == (len(u), A.shape[1], u.shape[2])
    assert all(x.is_contiguous() and x.dtype == u.dtype for x in (u, delta, B, C))
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    h, rows = torch.zeros(len(u), *A.shape, dtype=u.dtype), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[:, None, :, t]
        rows.append(torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    y = torch.stack(rows, 2) if D is None else torch.stack(rows, 2) + D[:, None] * u
    y = y if z is None else y * F.silu(z)
    return (y, h) if return_last_state else y


def without_state(scan):
    """The scan with a last state that says nothing, because mamba-ssm gives no gradient through it."""
    return lambda *arguments: (scan(*arguments)[0], torch.zeros(1, requires_grad=True))


def compare(function, case, reverse, dtype):
    adapted = without_state(functools.partial(mamba_ssm_adapter.scan, function))
    ours = run(adapted, draw(*case), dtype, reverse, case[-1])
    expected = run(without_state(sequential_scan), draw(*case), torch.float64, reverse, case[-1])
    name, error = worst_error(ours, expected)
    assert error < (1e-12 if dtype == torch.float64 else 1e-5), name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_layouts_go_there_and_back(case, reverse):
    compare(channels_first, case, reverse, torch.float64)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_last_state_comes_without_a_gradient(reverse):
    inputs = [x.requires_grad_() for x in draw(2, 5, 3, 2, True, True, True, True)]
    state = mamba_ssm_adapter.scan(channels_first, *inputs, True, reverse)[1]
    torch.testing.assert_close(state, sequential_scan(*inputs, True, reverse)[1])
    assert not state.requires_grad


@pytest.fixture(scope="module")
def selective_scan_ref():
    """mamba-ssm's reference, which its package lets one import only beside the compiled scan or something like it."""
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.skip("mamba-ssm is not installed; docs/dependencies.md says how, without a compiler")
    stands_in = importlib.util.find_spec("selective_scan_cuda") is None
    if stands_in:
        sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    finally:
        if stands_in:
            del sys.modules["selective_scan_cuda"]
    return selective_scan_ref


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_agrees_with_the_reference_of_mamba_ssm(case, reverse, selective_scan_ref):
    compare(selective_scan_ref, case, reverse, torch.float32)
