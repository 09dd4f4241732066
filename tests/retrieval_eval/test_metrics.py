"""The metrics against naive loops, on hand-made and random matrices, ties included."""

import itertools

import numpy as np
import pytest

from configs.errors import UserError
from retrieval_eval import metrics


def naive_rank(row: np.ndarray, relevant: set[int]) -> float:
    """The mean, over every order that ties allow, of the place of the first relevant entry."""
    groups: dict[float, list[int]] = {}
    for position, score in enumerate(row):
        groups.setdefault(float(score), []).append(position)
    place = 0
    for score in sorted(groups, reverse=True):
        members = groups[score]
        if relevant & set(members):
            orders = list(itertools.permutations(members))
            firsts = [next(i for i, member in enumerate(order) if member in relevant) for order in orders]
            return place + 1 + sum(firsts) / len(firsts)
        place += len(members)
    raise AssertionError("nothing relevant")


@pytest.mark.parametrize("levels", [2, 3, 1000])
def test_ranks_equal_the_mean_over_all_orders_of_ties(levels: int) -> None:
    generator = np.random.default_rng(levels)
    scores_VC = generator.integers(0, levels, (5, 6)).astype(np.float32)
    owner_C = np.array([0, 1, 2, 3, 4, 2])
    t2v = metrics.text_to_video_ranks(scores_VC, owner_C)
    v2t = metrics.video_to_text_ranks(scores_VC, owner_C)
    assert t2v == pytest.approx([naive_rank(scores_VC[:, c], {int(owner_C[c])}) for c in range(6)])
    assert v2t == pytest.approx([naive_rank(scores_VC[v], set(np.flatnonzero(owner_C == v))) for v in range(5)])


def test_a_model_that_scores_everything_alike_stands_in_the_middle() -> None:
    ranks = metrics.text_to_video_ranks(np.zeros((9, 9), dtype=np.float32), np.arange(9))
    assert (ranks == 5).all()
    assert metrics.summarise(ranks, 9)["R@1"] == 0


def test_published_order_is_argsort_reversed() -> None:
    scores_VC = np.random.default_rng(0).integers(0, 3, (7, 7)).astype(np.float32)
    ranks = metrics.video_to_text_ranks(scores_VC, np.arange(7), "published")
    assert ranks.tolist() == [float(np.where(np.argsort(row)[::-1] == i)[0][0] + 1) for i, row in enumerate(scores_VC)]


def test_hand_made_matrix() -> None:
    scores_VC = np.array([[0.9, 0.1, 0.8], [0.5, 0.2, 0.3], [0.95, 0.3, 0.1]])
    owner_C = np.array([0, 1, 2])
    table, ranks = metrics.both_directions(scores_VC, scores_VC, owner_C, samples=0)
    assert ranks["t2v"].tolist() == [2, 2, 3]
    assert ranks["v2t"].tolist() == [1, 3, 3]
    assert table["v2t"]["R@1"] == pytest.approx(100 / 3)
    assert table["v2t"]["R@5"] == 100
    assert table["v2t"]["MedR"] == 3
    assert table["t2v"]["MeanR"] == pytest.approx(7 / 3)
    assert (table["t2v"]["n"], table["t2v"]["gallery"]) == (3, 3)


def test_chance_equals_counting() -> None:
    assert metrics.chance(1, 400, (1, 5)) == pytest.approx({"R@1": 0.25, "R@5": 1.25})
    subsets = list(itertools.combinations(range(6), 2))  # the first two places of an order of six, three relevant
    assert metrics.chance(3, 6, (2,))["R@2"] == pytest.approx(100 * np.mean([min(s) < 3 for s in subsets]))


def test_bootstrap_is_seeded_and_covers_the_truth() -> None:
    ranks = np.where(np.random.default_rng(1).random(400) < 0.5, 1.0, 20.0)
    first = metrics.bootstrap_intervals(ranks, samples=400, seed=3)
    assert first == metrics.bootstrap_intervals(ranks, samples=400, seed=3)
    assert first != metrics.bootstrap_intervals(ranks, samples=400, seed=4)
    low, high = first["R@1"]
    assert low < 100 * (ranks == 1).mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 100 * np.sqrt(0.25 / 400), rel=0.25)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="1 of 4 scores"):
        metrics.text_to_video_ranks(np.array([[0.0, np.nan], [1.0, 2.0]]), np.arange(2))


def test_every_measure_of_both_directions_equals_a_loop() -> None:
    generator = np.random.default_rng(5)
    scores_VC = np.round(generator.standard_normal((60, 150)), 1)  # rounded, so that ties happen
    owner_C = np.concatenate([np.arange(60), generator.integers(0, 60, 90)])
    table, _ = metrics.both_directions(scores_VC, scores_VC, owner_C, samples=0)

    def expected(row: np.ndarray, relevant: np.ndarray) -> float:
        """One relevant among n that tie stands in the middle of them; of m, the first at (n + 1) / (m + 1)."""
        best = max(row[i] for i in range(len(row)) if relevant[i])
        above, level, mine = 0, 0, 0
        for i, score in enumerate(row):
            above, level = above + (score > best), level + (score == best)
            mine += score == best and relevant[i]
        return above + (level + 1) / (mine + 1)

    ranks = {
        "t2v": [expected(scores_VC[:, c], np.arange(60) == owner_C[c]) for c in range(150)],
        "v2t": [expected(scores_VC[v], owner_C == v) for v in range(60)],
    }
    for way, values in ranks.items():
        for k in (1, 5, 10, 50):
            assert table[way][f"R@{k}"] == pytest.approx(100 * sum(rank <= k for rank in values) / len(values))
        ordered = sorted(values)
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        assert table[way]["MedR"] == pytest.approx(middle)
        assert table[way]["MeanR"] == pytest.approx(sum(values) / len(values))
