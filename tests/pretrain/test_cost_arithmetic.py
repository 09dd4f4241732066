"""The scan's operations counted in the loop as it is written, Muon's and the tower's against torch's counter."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.cost import arithmetic
from pretrain.cost.measure import allocated, counted_flops
from pretrain.ops.reference import sequential_scan
from pretrain.optim import orthogonalise

STATES, CHANNELS, LENGTH, BATCH = 16, 24, 12, 2
MOVES = ("copy", "clone", "empty", "zeros", "new_", "select", "slice", "view", "expand", "unsqueeze", "detach", "stack",
         "ones", "fill", "transpose", "alias", "t.default", "_to_copy", "as_strided", "squeeze")  # fmt: skip


class Pointwise(TorchDispatchMode):
    """Counts an operation for every value of a state that an operator reads into a sum, or else writes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = str(function)
        if isinstance(out, torch.Tensor) and not any(word in name for word in MOVES):
            size = args[0].numel() if "sum" in name else out.numel()
            if size >= BATCH * CHANNELS * STATES:  # of a state's size; what is a channel's is not counted
                self.count += size
        return out


def test_the_scan_is_counted_as_the_recurrence_is_written():
    draw = torch.Generator().manual_seed(0)
    u, delta = (torch.rand(BATCH, LENGTH, CHANNELS, generator=draw).requires_grad_() for _ in range(2))
    B, C = (torch.rand(BATCH, LENGTH, STATES, generator=draw).requires_grad_() for _ in range(2))
    A = (-torch.rand(CHANNELS, STATES, generator=draw)).requires_grad_()
    with Pointwise() as forward:
        y, _ = sequential_scan(u, delta, A, B, C)
    with Pointwise() as backward:
        y.sum().backward()
    values = BATCH * LENGTH * CHANNELS * STATES
    assert forward.count / values == pytest.approx(arithmetic.SCAN_FORWARD, abs=0.2)
    # the sums over states and channels of a step's gradients may be fused with what makes them
    assert backward.count / values == pytest.approx(arithmetic.SCAN_BACKWARD, rel=0.15)


@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32)])
def test_muons_products(shape):
    counted = counted_flops(lambda: orthogonalise(torch.randn(1, *shape)))
    assert arithmetic.orthogonalise(*shape) == sum(counted.values())


def test_allocated_tells_the_peak_from_what_is_kept():
    kept = []

    def run():
        kept.append(torch.ones(1000, 250))  # 1 MB
        torch.ones(1000, 500)  # 2 MB, gone at once

    found = allocated(run)
    assert found.peak == pytest.approx(3e6, rel=0.01)
    assert found.kept == pytest.approx(1e6, rel=0.01)
