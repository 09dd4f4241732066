"""The five masks: exact counts, order, what each hides together, and that a mask is its sample's own."""

import pytest
import torch

from pretrain.masking import visible_count, visible_indices

KINDS = ["random", "tube", "clip_row", "frame_row", "attention"]
GRID = (8, 14, 14)
COUNTS = {"random": 314, "tube": 320, "clip_row": 336, "frame_row": 336, "attention": 320}


def draw(kind, seeds, grid=GRID, ratio=0.8, attention=None):
    T, H, W = grid
    if kind == "attention" and attention is None:
        attention = torch.rand(len(seeds), T, H * W, generator=torch.Generator().manual_seed(3))
    return visible_indices(kind, torch.as_tensor(seeds), grid, ratio, attention if kind == "attention" else None)


def patches(kind, seeds, grid=GRID, ratio=0.8, attention=None):
    """Boolean (B, T, H, W) of what is visible."""
    index = draw(kind, seeds, grid, ratio, attention)
    seen = torch.zeros(len(seeds), 1 + grid[0] * grid[1] * grid[2], dtype=torch.bool).scatter(1, index, True)
    return seen[:, 1:].view(len(seeds), *grid)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_order_and_cls(kind):
    index = draw(kind, [1, 2, 3])
    assert visible_count(kind, GRID, 0.8) == COUNTS[kind]
    assert index.shape == (3, 1 + COUNTS[kind])
    assert index.dtype == torch.int64
    assert not index[:, 0].any()
    assert (index.diff(dim=1) > 0).all()
    assert index.max() <= 8 * 14 * 14


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(1, 14, 14), (2, 4, 4), (3, 5, 7)])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_any_grid(kind, grid, ratio):
    index = draw(kind, [7, 8], grid, ratio)
    assert index.shape == (2, 1 + visible_count(kind, grid, ratio))
    assert (index.diff(dim=1) > 0).all()
    assert index.max() <= grid[0] * grid[1] * grid[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_belongs_to_its_seed(kind):
    attention = torch.rand(4, 8, 196)
    together = draw(kind, [5, 6, 7, 5], attention=attention)
    alone = draw(kind, [6], attention=attention[1:2])
    assert alone.equal(together[1:2])
    assert not together[0].equal(together[1])
    if kind != "attention":
        assert together[0].equal(together[3])


def test_what_each_kind_hides_together():
    seeds = list(range(6))
    tube = patches("tube", seeds)
    assert (tube == tube[:, :1]).all()
    assert not (tube[0, 0] == tube[1, 0]).all()
    for kind in ("clip_row", "frame_row"):
        rows = patches(kind, seeds)
        assert (rows == rows[..., :1]).all()
    frame_rows = patches("frame_row", seeds)[..., 0].sum(-1)
    assert (frame_rows == 3).all()
    clip_rows = patches("clip_row", seeds)[..., 0].sum(-1)
    assert (clip_rows.sum(1) == 24).all()
    assert not (clip_rows == 3).all()
    assert not (patches("frame_row", seeds)[:, 0] == patches("frame_row", seeds)[:, 1]).all()
    assert (patches("attention", seeds).sum((2, 3)) == 40).all()


@pytest.mark.parametrize("kind", ["random", "tube", "clip_row", "frame_row"])
def test_every_patch_is_equally_likely(kind):
    share = patches(kind, range(3000), (2, 4, 4), 0.5).float().mean(0)
    assert (share - 0.5).abs().max() < 0.05


def test_attention_draws_without_replacement_in_proportion():
    weight = torch.tensor([0.5, 0.3, 0.15, 0.05]).repeat(4000, 1, 1)
    one = patches("attention", range(4000), (1, 2, 2), 0.75, weight).flatten(1).float().mean(0)
    assert torch.allclose(one, weight[0, 0], atol=0.03)
    # Two of them: P(i) = w_i + sum over j of w_j w_i / (1 - w_j)
    w = weight[0, 0]
    expected = torch.stack([w[i] + sum(w[j] * w[i] / (1 - w[j]) for j in range(4) if j != i) for i in range(4)])
    two = patches("attention", range(4000), (1, 2, 2), 0.5, weight).flatten(1).float().mean(0)
    assert torch.allclose(two, expected, atol=0.03)


def test_patches_without_attention_come_last():
    weight = torch.zeros(50, 2, 16)
    weight[:, :, :4] = 1e-6
    seen = patches("attention", range(50), (2, 4, 4), 0.5, weight).flatten(2)
    assert seen[..., :4].all()
    assert (seen.sum(-1) == 8).all()


def test_wrong_requests_say_so():
    with pytest.raises(ValueError, match="there is no mask 'rows'"):
        visible_count("rows", GRID, 0.5)
    with pytest.raises(ValueError, match="hides every patch"):
        draw("tube", [1], (2, 2, 2), 1.0)
    with pytest.raises(ValueError, match=r"needs attention of \(1, 8, 196\), got None"):
        visible_indices("attention", torch.tensor([1]), GRID, 0.8)
