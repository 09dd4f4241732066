"""The scan against what the published code's mathematics gives: outputs, last state and every gradient."""

import pytest
import torch
from safetensors.torch import load_file

from pretrain.ops import backends, selective_scan

INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
GRADIENT = 2e-5


def channel_last(tensor):
    return tensor.transpose(1, 2).contiguous() if tensor.dim() == 3 else tensor


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_scan(backend, golden_dir, errors):
    status = next(status for status in backends() if status.name == backend)
    if not status.available:
        pytest.skip(status.reason)
    golden = load_file(golden_dir / "selective_scan.safetensors")
    inputs = {name: channel_last(golden[name]).requires_grad_() for name in INPUTS}
    y, last_state = selective_scan(*inputs.values(), delta_softplus=True, return_last_state=True, backend=backend)
    grads = torch.autograd.grad(y, list(inputs.values()), channel_last(golden["dy"]))

    errors.check("y", y, channel_last(golden["y"]))
    errors.check("last_state", last_state, golden["last_state"])
    for name, grad in zip(INPUTS, grads, strict=True):
        errors.check(f"grad_{name}", grad, channel_last(golden[f"grad_{name}"]), GRADIENT)
