"""Ranks and recalls of a score matrix, both directions, with several captions a video. Pure numpy.

Legend: V videos, C captions, Q queries, G gallery entries, S resamplings. `scores_VC[i, j]` says how well
caption j fits video i; `video_of_caption_C[j]` is the row of the video that caption j belongs to.

Text to video: every caption is a query with one right answer. Video to text: every video is a query, and
the best placed of its captions counts (the rule of the published code, reference/videomamba.md, 4).

Ties. `"expected"` (the default) gives the rank that breaking ties at random would give on average, so a
model that scores everything alike ends in the middle and not at the top. `"published"` reproduces
`np.argsort(row)[::-1]`, whose answer under ties is whatever the sort leaves. Ranks count from 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError

Ties = Literal["expected", "published"]
Ranks = NDArray[np.float64]
RECALLS = (1, 5, 10, 50)
_ROWS = 256
_DRAWN_AT_ONCE = 4_000_000


def text_to_video_ranks(
    scores_VC: NDArray[Any], video_of_caption_C: NDArray[np.int64], ties: Ties = "expected"
) -> Ranks:
    """The rank (C,) of each caption's own video among all videos."""
    _check(scores_VC, video_of_caption_C)
    relevant_CV = video_of_caption_C[:, None] == np.arange(scores_VC.shape[0])
    return best_ranks(np.ascontiguousarray(scores_VC.T), relevant_CV, ties)


def video_to_text_ranks(
    scores_VC: NDArray[Any], video_of_caption_C: NDArray[np.int64], ties: Ties = "expected"
) -> Ranks:
    """The rank (V,) of the best placed of each video's own captions among all captions."""
    _check(scores_VC, video_of_caption_C)
    relevant_VC = np.arange(scores_VC.shape[0])[:, None] == video_of_caption_C
    return best_ranks(scores_VC, relevant_VC, ties)


def best_ranks(scores_QG: NDArray[Any], relevant_QG: NDArray[np.bool_], ties: Ties = "expected") -> Ranks:
    """The rank (Q,) of the best placed relevant entry of each row, counted from 1.

    With g entries above the best relevant score, and m relevant among n entries that share it, the first
    relevant one stands on average at g + (n + 1) / (m + 1) when ties fall at random.
    """
    if not relevant_QG.any(axis=1).all():
        raise ValueError("every query needs at least one relevant entry")
    if ties == "published":
        return _published_ranks(scores_QG, relevant_QG)
    ranks_Q = np.empty(len(scores_QG), dtype=np.float64)
    for start in range(0, len(scores_QG), _ROWS):
        rows = slice(start, start + _ROWS)
        scores, relevant = scores_QG[rows], relevant_QG[rows]
        best_Q1 = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
        level = scores == best_Q1
        above = (scores > best_Q1).sum(axis=1)
        ranks_Q[rows] = above + (level.sum(axis=1) + 1) / ((level & relevant).sum(axis=1) + 1)
    return ranks_Q


def choice_ranks(scores_VC: NDArray[Any], video_of_caption_C: NDArray[np.int64], answer_V: NDArray[np.int64]) -> Ranks:
    """The rank (V,) of each video's right caption among its own captions: 1 where multiple choice is answered right.

    `answer_V` counts a video's captions from 0. A tie for the first place gives a mean above 1: wrong.
    """
    ranks_V = np.empty(len(answer_V), dtype=np.float64)
    for video, answer in enumerate(answer_V):
        own = scores_VC[video, video_of_caption_C == video]
        if not 0 <= answer < len(own):
            raise UserError(
                f"Video {video} has {len(own)} captions, and its answer is number {answer}.",
                "Count the captions from 0, and leave none out (data.captions=all).",
            )
        right = np.arange(len(own)) == answer
        ranks_V[video] = best_ranks(own[None], right[None])[0]
    return ranks_V


def _published_ranks(scores_QG: NDArray[Any], relevant_QG: NDArray[np.bool_]) -> Ranks:
    order = [np.argsort(row)[::-1] for row in scores_QG]
    first = [np.flatnonzero(relevant[found])[0] for found, relevant in zip(order, relevant_QG, strict=True)]
    return np.asarray(first, dtype=np.float64) + 1


def summarise(ranks_Q: Ranks, gallery: int, recalls: Sequence[int] = RECALLS) -> dict[str, float]:
    """Recalls in percent, median and mean rank, the number of queries `n` and of gallery entries."""
    summary = {name: float(values[0]) for name, values in measures(ranks_Q[None], recalls).items()}
    return summary | {"n": len(ranks_Q), "gallery": gallery}


def chance(relevant_per_query: float, gallery: int, recalls: Sequence[int] = RECALLS) -> dict[str, float]:
    """What a random order reaches, in percent: for one relevant entry among n, 100 k / n.

    For several relevant entries (`relevant_per_query`, a mean) it is the chance that at least one of them
    falls within the first k, 1 - prod over the first k places of (1 - relevant / places left).
    """
    levels = {}
    for k in recalls:
        places = gallery - np.arange(min(k, gallery))
        levels[f"R@{k}"] = 100.0 * float(1 - np.prod(np.clip(1 - relevant_per_query / places, 0, 1)))
    return levels


def bootstrap_intervals(
    ranks_Q: Ranks, samples: int = 1000, seed: int = 0, level: float = 0.95, recalls: Sequence[int] = RECALLS
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of every number of `summarise`, from resampling the queries with replacement.

    The same seed draws the same queries, so that two results on the same queries can be paired.
    """
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[Ranks]] = {}
    step = max(1, _DRAWN_AT_ONCE // len(ranks_Q))
    for start in range(0, samples, step):
        ranks_SQ = ranks_Q[generator.integers(0, len(ranks_Q), (min(step, samples - start), len(ranks_Q)))]
        for name, values_S in measures(ranks_SQ, recalls).items():
            drawn.setdefault(name, []).append(values_S)
    edges = [100 * (1 - level) / 2, 100 * (1 + level) / 2]
    intervals = {name: np.percentile(np.concatenate(parts), edges) for name, parts in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in intervals.items()}


def measures(ranks_SQ: Ranks, recalls: Sequence[int] = RECALLS) -> dict[str, Ranks]:
    """Recalls in percent, median and mean rank of each row, (S,)."""
    found = {f"R@{k}": 100.0 * (ranks_SQ <= k).mean(axis=1) for k in recalls}
    return found | {"MedR": np.median(ranks_SQ, axis=1), "MeanR": ranks_SQ.mean(axis=1)}


def both_directions(
    scores_t2v_VC: NDArray[Any],
    scores_v2t_VC: NDArray[Any],
    video_of_caption_C: NDArray[np.int64],
    ties: Ties = "expected",
    samples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Any]], Mapping[str, Ranks]]:
    """`{"t2v": {...}, "v2t": {...}}` with intervals, and the ranks they were made from.

    The two matrices are one for a dual encoder, and two after re-ranking, where each direction has its
    own candidates.
    """
    videos, captions = scores_t2v_VC.shape
    ranks = {
        "t2v": text_to_video_ranks(scores_t2v_VC, video_of_caption_C, ties),
        "v2t": video_to_text_ranks(scores_v2t_VC, video_of_caption_C, ties),
    }
    gallery = {"t2v": videos, "v2t": captions}
    table = {}
    for direction, ranks_Q in ranks.items():
        summary: dict[str, Any] = dict(summarise(ranks_Q, gallery[direction]))
        if samples:
            summary["interval_95"] = bootstrap_intervals(ranks_Q, samples, seed)
        table[direction] = summary
    return table, ranks


def _check(scores_VC: NDArray[Any], video_of_caption_C: NDArray[np.int64]) -> None:
    if scores_VC.ndim != 2 or scores_VC.shape[1] != len(video_of_caption_C):
        raise ValueError(f"scores {scores_VC.shape} do not fit {len(video_of_caption_C)} captions")
    bad = int(np.isnan(scores_VC).sum())
    if bad:
        raise UserError(
            f"{bad} of {scores_VC.size} scores are not numbers, so they have no order.",
            "Look at the checkpoint's losses: the model that made them has diverged.",
            exit_code=1,
        )
