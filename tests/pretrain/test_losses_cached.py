"""The cached form against one graph, in float64: value and every gradient, in any number of parts."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.losses import Cached, cached_gradients, contrastive_loss, replay

SAMPLES = 6
IDENTITY = torch.tensor([1, 2, 3, 1, 5, 2])


@pytest.fixture
def towers():
    torch.manual_seed(0)
    return [torch.nn.Linear(5, 4, dtype=torch.float64) for _ in range(2)]


def features(towers, rows):
    return [F.normalize(tower(row).tanh(), dim=-1) for tower, row in zip(towers, rows, strict=True)]


def loss_of(video, text, temp):
    return contrastive_loss(video, text, video, text, temp, IDENTITY, IDENTITY)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_equals_one_graph(towers, parts):
    rows = [torch.randn(SAMPLES, 5, dtype=torch.float64) for _ in towers]
    temp = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    parameters = [temp, *(p for tower in towers for p in tower.parameters())]
    whole = loss_of(*features(towers, rows), temp)
    expected = torch.autograd.grad(whole, parameters)

    cuts = torch.arange(SAMPLES).chunk(parts)
    with torch.no_grad():
        seen = [features(towers, [row[cut] for row in rows]) for cut in cuts]
        video, text = (torch.cat(column) for column in zip(*seen, strict=True))
        cached = cached_gradients(loss_of, video, text, temp)
    assert cached.value.item() == pytest.approx(whole.item(), rel=1e-12)
    assert all(p.grad is None for p in parameters)
    values = []
    for number, cut in enumerate(cuts):
        about = Cached(cached.value, tuple(gradient[cut] for gradient in cached.gradients[:2]))
        value = replay(about, features(towers, [row[cut] for row in rows]))
        if number == 0:  # the temperature belongs to no part: its gradient is given once
            value = value + replay(Cached(torch.zeros(()), cached.gradients[2:]), [temp])
        value.backward()
        values.append(value.item())
    assert values == pytest.approx([whole.item()] * len(cuts), rel=1e-12)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


def test_what_the_loss_does_not_read_has_a_gradient_of_zero():
    used, unused = torch.ones(3), torch.ones(2)
    cached = cached_gradients(lambda a, b: a.sum() * 2, used, unused)
    assert [g.tolist() for g in cached.gradients] == [[2, 2, 2], [0, 0]]
    with pytest.raises(ValueError, match=r"a gradient of \(3,\) for a tensor of \(2,\)"):
        replay(cached, [unused, used])
