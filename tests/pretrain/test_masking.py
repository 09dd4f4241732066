"""The five masks: exact counts, order, what each hides together, and that a mask is its sample's own."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import MaskKind
from pretrain.masking import visible_count, visible_indices

KINDS = list(get_args(MaskKind))
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


@given(
    kind=st.sampled_from(KINDS),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)),
    ratio=st.floats(0, 0.95),
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3),
)
def test_any_grid_ratio_and_seed(kind, grid, ratio, seeds):
    """Images (one frame), frames that are no squares, and tubelets, whose frames are fewer, are grids like others."""
    T, H, W = grid
    hidden = {
        "random": int(ratio * T * H * W), "tube": T * int(ratio * H * W), "attention": T * int(ratio * H * W),
        "clip_row": T * int(ratio * H) * W, "frame_row": T * int(ratio * H) * W,
    }[kind]  # fmt: skip
    index = draw(kind, seeds, grid, ratio)
    assert index.shape == (len(seeds), 1 + T * H * W - hidden)
    assert not index[:, 0].any()
    assert (index.diff(dim=1) > 0).all()
    assert index.max() <= T * H * W
    seen = patches(kind, seeds, grid, ratio)
    if kind == "tube":
        assert (seen == seen[:, :1]).all()
    if kind.endswith("row"):
        assert (seen == seen[..., :1]).all()
    if kind in ("frame_row", "attention", "tube"):
        counts = seen.sum((2, 3))
        assert (counts == counts[:, :1]).all()


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


def test_attention_draws_as_the_released_sampler_does():
    """How often each patch is seen, beside torch.multinomial without replacement; every frame by its own weights."""
    weight = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) ** 3
    ours = patches("attention", range(8000), (3, 4, 5), 0.7, weight.expand(8000, -1, -1)).flatten(2).float().mean(0)
    generator = torch.Generator().manual_seed(1)
    for frame in range(3):
        chosen = torch.multinomial(weight[frame].expand(8000, -1), 6, generator=generator)
        theirs = torch.zeros(8000, 20).scatter(1, chosen, 1.0).mean(0)
        assert (ours[frame] - theirs).abs().max() < 0.03  # five standard deviations of the difference
        assert theirs.max() - theirs.min() > 0.5


def test_only_the_proportions_of_attention_matter():
    weight = torch.rand(4, 2, 16, generator=torch.Generator().manual_seed(0))
    assert draw("attention", range(4), (2, 4, 4), 0.5, weight).equal(
        draw("attention", range(4), (2, 4, 4), 0.5, weight * 1024)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_the_device_does_not_matter(kind):
    weight = torch.rand(64, 8, 196, generator=torch.Generator().manual_seed(0))
    seeds = torch.arange(64)
    given_weight = weight if kind == "attention" else None
    there = None if given_weight is None else given_weight.cuda()
    found = visible_indices(kind, seeds.cuda(), GRID, 0.8, there)
    assert found.device.type == "cuda"
    assert found.cpu().equal(visible_indices(kind, seeds, GRID, 0.8, given_weight))


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
