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
from retrieval_eval.embed import TextStates
from retrieval_eval.index import FlatIndex, Vectors

Positions = NDArray[np.int64]


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
    tokens_VND: NDArray[np.float16],
    states: TextStates,
    scorer: PairScorer,
    batch: int = 256,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    tell: Callable[[int], None] = lambda _: None,
) -> Reranked:
    """Score every candidate pair, `batch` texts of one clip at a time; `tell` hears how many clips are done.

    Raises UserError if a score is not finite.
    """
    t2v_VU, v2t_VU = candidates.marked(*dual_VU.shape)
    wanted_VU = t2v_VU | v2t_VU
    match_VU = np.full(dual_VU.shape, np.nan, dtype=np.float32)
    kind = torch.device(device).type
    with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
        for place in range(len(dual_VU)):
            texts_M = np.flatnonzero(wanted_VU[place])
            if len(texts_M):
                clip = scorer.look(torch.from_numpy(np.array(tokens_VND[place])).to(device).float())
                match_VU[place, texts_M] = torch.cat(
                    [scorer.score(*states.take(part, device), clip) for part in _parts(texts_M, batch)]
                ).cpu()
            tell(place + 1)
    bad = int((~np.isfinite(match_VU[wanted_VU])).sum())
    if bad:
        raise UserError(f"{bad} match scores are not finite.", "Look at the losses of that checkpoint.", exit_code=1)
    return Reranked(in_order(dual_VU, match_VU, t2v_VU), in_order(dual_VU, match_VU, v2t_VU), int(wanted_VU.sum()))


def in_order(dual_VU: Vectors, match_VU: Vectors, chosen_VU: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Match scores where `chosen_VU`, and elsewhere dual scores moved below all of them, in float64."""
    if not chosen_VU.any():
        return dual_VU.astype(np.float64)
    below = float(match_VU[chosen_VU].min()) - float(dual_VU.max()) - 1.0
    return np.where(chosen_VU, match_VU, dual_VU.astype(np.float64) + below)


def _parts(texts_M: Positions, batch: int) -> Iterator[Positions]:
    for start in range(0, len(texts_M), batch):
        yield texts_M[start : start + batch]
