"""Re-ranking: the first `top` of every query, both ways, scored again by the cross-modal decoder.

The pairs of both directions are joined and grouped by clip, so that each is scored once and each clip's patch
tokens are read once. A score is the match logit of class 1, in float32, and is not mixed with the dual score.
What is not re-ranked keeps its order by the dual score, behind everything that is (the published code gives it
-100 there, which leaves its order to chance; recalls up to `top` are the same).

V clips, U texts, K candidates, N patch tokens, L words, D widths, M pairs.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import UserError
from retrieval_eval.decoder import PairScorer
from retrieval_eval.index import FlatIndex, Vectors
from retrieval_eval.texts import Rows, TextStates

Positions = NDArray[np.int64]
WORDS = 8192
"""Words of a clip's texts that are scored at once: what bounds the memory, and changes no score but by rounding."""


class Reranked(NamedTuple):
    """Scores (V, U) whose order is final: each column of `t2v_VU`, each row of `v2t_VU`; float64."""

    t2v_VU: NDArray[np.float64]
    v2t_VU: NDArray[np.float64]
    pairs: int


class Candidates(NamedTuple):
    """The first K of each query by the dual score."""

    clips_UK: Positions
    texts_VK: Positions

    @classmethod
    def by_dual(cls, clips_VE: Vectors, texts_UE: Vectors, top: int) -> "Candidates":
        """The first `top` clips of every text and texts of every clip, by inner product."""
        _, clips_UK = FlatIndex(clips_VE).search(texts_UE, top)
        _, texts_VK = FlatIndex(texts_UE).search(clips_VE, top)
        return cls(clips_UK, texts_VK)

    @classmethod
    def own(cls, text_of_C: Positions, owner_C: Positions, clips: int) -> "Candidates":
        """Each clip's own captions, and nothing else: what multiple choice asks. A shorter row repeats its last."""
        rows = [text_of_C[owner_C == clip] for clip in range(clips)]
        longest = max(len(row) for row in rows)
        texts_VK = np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in rows])
        return cls(np.empty((int(text_of_C.max()) + 1, 0), dtype=np.int64), texts_VK)

    def marked(self, clips: int, texts: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which entries (V, U) are candidates, text to video and video to text."""
        t2v_VU, v2t_VU = np.zeros((clips, texts), dtype=bool), np.zeros((clips, texts), dtype=bool)
        np.put_along_axis(t2v_VU, self.clips_UK.T, True, axis=0)
        np.put_along_axis(v2t_VU, self.texts_VK, True, axis=1)
        return t2v_VU, v2t_VU


def rerank(
    dual_VU: Vectors,
    candidates: Candidates,
    tokens_VND: Rows,
    states: TextStates,
    scorer: PairScorer,
    words: int = WORDS,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    tell: Callable[[int], None] = lambda _: None,
) -> Reranked:
    """Score every candidate pair, `words` words of one clip's texts at a time; `tell` hears how many clips are done.

    Raises UserError if a score is not finite.
    """
    t2v_VU, v2t_VU = candidates.marked(*dual_VU.shape)
    match_VU = np.full(dual_VU.shape, np.nan, dtype=np.float32)
    for clip, wanted_U in enumerate(t2v_VU | v2t_VU):
        texts_M = np.flatnonzero(wanted_U)
        match_VU[clip, texts_M] = match_clip(tokens_VND, clip, texts_M, states, scorer, words, device, precision)
        tell(clip + 1)
    return joined(dual_VU, match_VU, t2v_VU, v2t_VU)


def match_clip(
    tokens_VND: Rows,
    clip: int,
    texts_M: Positions,
    states: TextStates,
    scorer: PairScorer,
    words: int = WORDS,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> Vectors:
    """Match scores (M,) of some texts with one clip, whose tokens are read, and keys and values made, once.

    The texts are taken by their length, as many at once as `words` words hold, so that little padding is computed.
    """
    match_M = np.empty(len(texts_M), dtype=np.float32)
    if not len(texts_M):
        return match_M
    order_M = np.argsort(states.lengths_U[texts_M], kind="stable")
    kind = torch.device(device).type
    with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
        seen = scorer.look(torch.from_numpy(np.array(tokens_VND[clip])).to(device).float())
        for part in _parts(order_M, states.lengths_U[texts_M], words):
            match_M[part] = scorer.score(*states.take(texts_M[part], device), seen).cpu().numpy()
    bad = int((~np.isfinite(match_M)).sum())
    if bad:
        raise UserError(f"{bad} match scores are not finite.", "Look at the losses of that checkpoint.", exit_code=1)
    return match_M


def joined(dual_VU: Vectors, match_VU: Vectors, t2v_VU: NDArray[np.bool_], v2t_VU: NDArray[np.bool_]) -> Reranked:
    """The final scores of both directions, each with its own candidates."""
    pairs = int((t2v_VU | v2t_VU).sum())
    return Reranked(in_order(dual_VU, match_VU, t2v_VU), in_order(dual_VU, match_VU, v2t_VU), pairs)


def in_order(dual_VU: Vectors, match_VU: Vectors, chosen_VU: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Match scores where `chosen_VU`, and elsewhere dual scores moved below all of them, in float64."""
    if not chosen_VU.any():
        return dual_VU.astype(np.float64)
    below = float(match_VU[chosen_VU].min()) - float(dual_VU.max()) - 1.0
    return np.where(chosen_VU, match_VU, dual_VU.astype(np.float64) + below)


def _parts(order_M: Positions, lengths_M: Positions, words: int) -> Iterator[Positions]:
    """`order_M`, by growing length, cut where the longest times their number would pass `words`."""
    start = 0
    for stop in range(1, len(order_M) + 1):
        if stop == len(order_M) or (stop + 1 - start) * lengths_M[order_M[stop]] > words:
            yield order_M[start:stop]
            start = stop
