import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.draws import (
    derive,
    derive_torch,
    permutation_np,
    randint,
    randint_np,
    random_order,
    uniform,
    uniform_np,
)

SEEDS = np.array([0, 1, 2, -1, 2**62, -(2**63), 2**63 - 1], dtype=np.int64)


def test_numpy_and_torch_give_the_same_numbers():
    seeds = torch.from_numpy(SEEDS)
    assert np.array_equal(uniform_np(SEEDS, "frames", 24), uniform(seeds, "frames", 2, 3, 4).reshape(7, 24).numpy())
    assert np.array_equal(randint_np(SEEDS, "x", -5, 7, 33), randint(seeds, "x", -5, 7, 33).numpy())
    assert np.array_equal(derive(SEEDS, "a", 3, -9), derive_torch(seeds, "a", 3, -9).numpy())
    assert np.array_equal(derive(SEEDS, "a", SEEDS[::-1]), derive_torch(seeds, "a", seeds.flip(0)).numpy())
    for row, seed in enumerate(SEEDS):
        assert np.array_equal(permutation_np(int(seed), "p", 50), random_order(seeds, "p", 50)[row].numpy())


def test_the_numbers_never_change():
    """A change here changes the order of every run: only a new major version may do that."""
    golden = json.loads((Path(__file__).parent / "golden" / "draws.json").read_text())
    assert derive(7, "epoch", 2, 3) == golden["derive"]
    assert uniform_np(7, "frames", 4)[0].tolist() == golden["uniform"]
    assert randint_np(7, "frames", 0, 1000, 4)[0].tolist() == golden["randint"]
    assert permutation_np(7, "epoch", 10).tolist() == golden["permutation"]


def test_seeds_beyond_63_bits_wrap():
    assert derive(7, 2**63 + 5) == derive(7, 5 - 2**63)


def test_a_prefix_does_not_depend_on_how_many_are_drawn_nor_on_the_neighbours():
    assert np.array_equal(uniform_np(SEEDS, "s", 100)[:, :7], uniform_np(SEEDS, "s", 7))
    assert np.array_equal(uniform_np(SEEDS, "s", 7)[3], uniform_np(int(SEEDS[3]), "s", 7)[0])


def test_derive_is_a_plain_int_for_plain_arguments_and_minds_their_order():
    assert isinstance(derive(3, "a", 1), int)
    assert derive(np.array([3]), "a", 1).tolist() == [derive(3, "a", 1)]
    seen = {
        derive(s, *parts)
        for s in range(20)
        for parts in [("a",), ("b",), (1,), (2,), ("a", 1), (1, "a"), (1, 2), (2, 1)]
    }
    assert len(seen) == 20 * 8


def test_uniforms_are_uniform_within_and_between_neighbouring_seeds():
    """Chi-square over 64 bins with 63 degrees of freedom: beyond 120 has a probability under 2e-5."""

    def chi2(values):
        counts = np.histogram(values, 64, (0, 1))[0]
        return ((counts - values.size / 64) ** 2 / (values.size / 64)).sum()

    drawn = uniform_np(np.arange(2000), "any", 50)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.dtype == np.float32
    assert chi2(drawn.ravel()) < 120
    assert chi2(drawn[:, 0]) < 120  # across consecutive seeds
    assert chi2((drawn[1:] - drawn[:-1]).ravel() % 1) < 120  # neighbours do not move together
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.1
    assert abs(np.corrcoef(drawn[:, 0], uniform_np(np.arange(2000), "other", 1)[:, 0])[0, 1]) < 0.1


def test_every_bit_of_a_seed_moves_half_of_the_bits():
    base = np.int64(0x0123456789ABCDEF)
    flipped = np.array([base ^ np.int64(1 << bit if bit < 63 else -(1 << 63)) for bit in range(64)])
    changed = derive(flipped, "x") ^ derive(np.array([base]), "x")
    ones = np.array([bin(int(value) & (2**64 - 1)).count("1") for value in changed])
    assert ones.min() > 12
    assert 28 < ones.mean() < 36


def test_permutations_reach_every_order_alike():
    orders = random_order(torch.arange(6000), "p", 3)
    assert torch.equal(orders.sort(1).values, torch.arange(3).expand(6000, 3))
    counts = torch.bincount(orders @ torch.tensor([9, 3, 1]), minlength=27)
    assert sorted(counts[counts > 0].tolist())[0] > 850
    assert (counts > 0).sum() == 6


def test_randint_covers_its_range_and_refuses_an_empty_one():
    drawn = randint_np(np.arange(500), "r", -2, 3, 20)
    assert np.unique(drawn).tolist() == [-2, -1, 0, 1, 2]
    assert np.bincount(drawn.ravel() + 2).min() > 1800
    with pytest.raises(ValueError, match="low 3 and high 3"):
        randint_np(1, "r", 3, 3, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_gives_the_same_numbers():
    seeds = torch.from_numpy(SEEDS)
    assert torch.equal(uniform(seeds.cuda(), "g", 1000).cpu(), uniform(seeds, "g", 1000))
    assert torch.equal(random_order(seeds.cuda(), "g", 300).cpu(), random_order(seeds, "g", 300))
