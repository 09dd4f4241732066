"""From scores to the numbers of a result, column by column, each under the name that says how it was made.

V clips, C captions (the queries), U different texts.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval_eval import metrics
from retrieval_eval.config import Control, RetrievalConfig
from retrieval_eval.embed import View
from retrieval_eval.index import Vectors

VIEWS: dict[Control, View] = {"shuffled": "clips-shuffled", "single": "clips-single"}
Rows = NDArray[np.int64]
Pair = tuple[NDArray[Any], NDArray[Any]]


class Scores(NamedTuple):
    """Scores (V, U) of clips and different texts: of the dual encoder, and after re-ranking, both ways.

    With a `temperature` the dual softmax is asked for.
    """

    dual_VU: Vectors
    t2v_VU: NDArray[np.float64] | None = None
    v2t_VU: NDArray[np.float64] | None = None
    pairs: int = 0
    temperature: float | None = None

    def columns(self) -> dict[str, Pair]:
        """Each scoring as two matrices (V, U): for text to video, and for video to text."""
        made: dict[str, Pair] = {"dual": (self.dual_VU, self.dual_VU)}
        if self.temperature is not None:
            made["dual_softmax"] = dual_softmax(self.dual_VU, self.temperature)
        if self.t2v_VU is not None and self.v2t_VU is not None:
            made["reranked"] = (self.t2v_VU, self.v2t_VU)
        return made


def dual_softmax(scores_VU: NDArray[Any], temperature: float) -> Pair:
    """Each score times how much of its gallery entry's softmax over all queries it is, both ways, float64.

    Text to video: score[v, u] * softmax over u of score[v, :] / temperature; video to text with softmax over v.
    It sees all queries at once, which a search cannot, and so it is a column of its own. Source: the dual softmax
    of CAMoE, arXiv 2109.04290.
    """
    scaled = scores_VU.astype(np.float64) / temperature
    return scores_VU * _softmax(scaled, axis=1), scores_VU * _softmax(scaled, axis=0)


def _softmax(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    powers = np.exp(values - values.max(axis=axis, keepdims=True))
    softmax: NDArray[np.float64] = powers / powers.sum(axis=axis, keepdims=True)
    return softmax


def columns(config: RetrievalConfig) -> dict[str, str]:
    """Every scoring by the name that stands beside its numbers."""
    named = {"dual": "dual encoder"}
    named |= {"dual_softmax": "dual encoder, dual softmax over all queries"} if config.dual_softmax else {}
    return named | ({"reranked": f"re-ranked, top {config.rerank.top}"} if config.rerank.top else {})


def tables(
    config: RetrievalConfig, scores: dict[View, Scores], text_of_C: Rows, owner_C: Rows, answer_V: Rows | None
) -> tuple[dict[str, Any], dict[str, metrics.Ranks]]:
    """`{"dual": {"t2v": ..., "v2t": ...}, "reranked": ..., "controls": {"shuffled": {"dual": ...}}}`, and the ranks
    behind all but the controls, by "scoring.direction". With `answer_V` each scoring is `{"choice": ...}` instead.
    """
    made = {view: _table(config, one, text_of_C, owner_C, answer_V) for view, one in scores.items()}
    controls = {control: made[VIEWS[control]][0] for control in config.controls}
    table, ranks = made["clips"]
    return {**table, "controls": controls}, ranks


def _table(
    config: RetrievalConfig, scores: Scores, text_of_C: Rows, owner_C: Rows, answer_V: Rows | None
) -> tuple[dict[str, Any], dict[str, metrics.Ranks]]:
    table: dict[str, Any] = {}
    ranks: dict[str, metrics.Ranks] = {}
    for scoring, (t2v_VU, v2t_VU) in scores.columns().items():
        if answer_V is not None:
            ranks_V = metrics.choice_ranks(v2t_VU[:, text_of_C], owner_C, answer_V)
            choice: dict[str, Any] = {"accuracy": metrics.summarise(ranks_V, 1, (1,))["R@1"], "n": len(ranks_V)}
            if config.bootstrap:
                intervals = metrics.bootstrap_intervals(ranks_V, config.bootstrap, config.seed, recalls=(1,))
                choice["interval_95"] = {"accuracy": intervals["R@1"]}
            table[scoring], ranks[f"{scoring}.choice"] = {"choice": choice}, ranks_V
            continue
        table[scoring], found = metrics.both_directions(
            t2v_VU[:, text_of_C], v2t_VU[:, text_of_C], owner_C, config.ties, config.bootstrap, config.seed
        )
        ranks |= {f"{scoring}.{direction}": ranks_Q for direction, ranks_Q in found.items()}
    return table, ranks


def chance(videos: int, owner_C: Rows) -> dict[str, dict[str, float]]:
    """What a random order reaches, both ways."""
    return {
        "t2v": metrics.chance(1, videos),
        "v2t": metrics.chance(len(owner_C) / videos, len(owner_C)),
    }
