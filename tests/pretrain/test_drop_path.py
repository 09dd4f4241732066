"""What changes a training pass and no weight: drop path, and blocks that are computed again."""

import pytest
import torch

from pretrain.models.drop import keep_factors


@pytest.mark.parametrize(("depth", "rates"), [(1, [0.4]), (2, [0.0, 0.4]), (5, [0.0, 0.1, 0.2, 0.3, 0.4])])
def test_rates_rise_to_the_last_layers(small_vision, depth, rates):
    """As released: block i drops what came from block i - 1 by [0, *linspace(0, rate, depth)][i], the end by rate."""
    incoming = [0.0, *torch.linspace(0, 0.4, depth).tolist()]
    assert list(small_vision(depth=depth, drop_path=0.4).drop_rates) == pytest.approx([*incoming[1:depth], 0.4])
    assert list(small_vision(depth=depth, drop_path=0.4).drop_rates) == pytest.approx(rates)


def test_drop_path_belongs_to_the_sample(encoder, clip):
    model = encoder(drop_path=0.5, depth=6)
    still = model(clip).tokens_BLD
    model.train()
    seeds = torch.tensor([11, 12, 13])
    whole = model(clip, seeds_B=seeds).tokens_BLD
    torch.testing.assert_close(model(clip[1:2], seeds_B=seeds[1:2]).tokens_BLD, whole[1:2])
    assert not torch.allclose(whole, model(clip, seeds_B=seeds + 100).tokens_BLD)
    assert not torch.allclose(whole, still)
    factors = keep_factors(model.config.drop_rates, torch.empty(4000), "drop_path", torch.arange(4000))
    rates = torch.linspace(0, 0.5, 6)
    torch.testing.assert_close((factors == 0).float().mean(0), rates, atol=0.03, rtol=0)
    torch.testing.assert_close(factors.mean(0), torch.ones(6), atol=0.06, rtol=0)


def test_a_dropped_layer_adds_nothing_and_a_kept_one_more(encoder, clip):
    """Against the layers one by one, with the factors of each sample."""
    model = encoder(drop_path=0.5, depth=4).train()
    seeds = torch.tensor([1, 2, 3])
    factors = keep_factors(model.config.drop_rates, clip, "drop_path", seeds)
    assert (factors == 0).any()
    residual = model._embed(clip, None)[0]
    for index, block in enumerate(model.layers):
        residual = residual + factors[:, index, None, None] * block(residual)
    torch.testing.assert_close(model(clip, seeds_B=seeds).tokens_BLD, model.norm(residual))


def test_recomputing_blocks_changes_no_gradient(encoder, clip):
    gradients = []
    for again in (False, True):
        model = encoder(checkpoint_blocks=again, drop_path=0.3).train()
        model(clip, seeds_B=torch.arange(3)).tokens_BLD.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name])


def test_recomputing_blocks_needs_less_memory(encoder, clip, live_bytes):
    peaks = []
    for again in (False, True):
        model = encoder(depth=8, checkpoint_blocks=again).train()
        with live_bytes() as live:
            model(clip).tokens_BLD.sum().backward()
        peaks.append(live.peak)
    assert peaks[1] < peaks[0] / 2
