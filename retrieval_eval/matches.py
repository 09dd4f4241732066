"""Re-ranking as pieces of a store: which pairs, then their scores, clip by clip, in chunks that ranks share.

Every process reads the candidates that the first of them wrote, so that all mean the same pairs, whatever the last
digits of their dual scores. V clips, U texts, K candidates, M pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.loader import digest
from data_pipeline.sources import Part
from retrieval_eval.chunks import Chunks
from retrieval_eval.embed import EVERYTHING, View
from retrieval_eval.rerank import Candidates
from retrieval_eval.store import Store

CLIPS_UK, TEXTS_VK, MATCHES = "clips.npy", "texts.npy", "matches.npz"
Match = Callable[[int, NDArray[np.int64]], NDArray[np.float32]]
"""The scores (M,) of some texts with a clip."""


@dataclass(frozen=True)
class Reranking:
    """The pairs of one view that are re-ranked, (V, U) both ways, and where their scores are kept."""

    store: Store
    kind: str
    t2v_VU: NDArray[np.bool_]
    v2t_VU: NDArray[np.bool_]

    @classmethod
    def plan(cls, store: Store, view: View, choices: dict[str, Any], make: Callable[[], Candidates],
             shape: tuple[int, int]) -> "Reranking":  # fmt: skip
        """What the candidates of `choices` (whatever else decides them) are: those in the store, else made now."""
        name = f"{view}-{digest(choices)}"
        piece = f"candidates-{name}"
        if not store.has(piece, CLIPS_UK, TEXTS_VK):
            made = make()
            with store.writing(piece, replace=False) as folder:
                np.save(folder / CLIPS_UK, made.clips_UK.astype(np.int32))
                np.save(folder / TEXTS_VK, made.texts_VK.astype(np.int32))
        clips_UK, texts_VK = (np.load(store.path(piece, file)).astype(np.int64) for file in (CLIPS_UK, TEXTS_VK))
        return cls(store, f"matches-{name}", *Candidates(clips_UK, texts_VK).marked(*shape))

    @property
    def chunks(self) -> Chunks:
        """Of the clips."""
        return Chunks(len(self.t2v_VU), self.store.chunk)

    def score(self, match: Match, tell: Callable[[int, int], None], part: Part = EVERYTHING) -> None:
        """Write the chunks of scores that the store lacks, by `match`; with a `part` only that share of them."""
        chunks = self.chunks
        mine = [chunk for chunk in range(len(chunks)) if part.has_turn(chunk)]
        done, total = 0, sum(stop - start for start, stop in map(chunks.span, mine))
        for chunk in mine:
            clips = range(*chunks.span(chunk))
            piece = chunks.piece(self.kind, chunk)
            if self.store.has(piece, MATCHES):
                done += len(clips)
                tell(done, total)
                continue
            texts, matches = [], []
            for clip in clips:
                texts.append(np.flatnonzero(self.t2v_VU[clip] | self.v2t_VU[clip]))
                matches.append(match(clip, texts[-1]))
                done += 1
                tell(done, total)
            with self.store.writing(piece, replace=False) as folder:
                counts = np.array([len(one) for one in texts], dtype=np.int64)
                np.savez(folder / MATCHES, counts=counts, texts=np.concatenate(texts), matches=np.concatenate(matches))

    def read(self) -> NDArray[np.float32]:
        """All scores (V, U), not a number where a pair was not asked for; UserError where a chunk is missing."""
        match_VU = np.full(self.t2v_VU.shape, np.nan, dtype=np.float32)
        chunks = self.chunks
        for chunk, piece in enumerate(chunks.pieces(self.kind)):
            if not self.store.has(piece, MATCHES):
                raise UserError(
                    f"{self.store.folder / piece} is not there.",
                    "Run the evaluation without --only; what is there it takes.",
                )
            with np.load(self.store.path(piece, MATCHES)) as file:
                clips_M = np.repeat(np.arange(*chunks.span(chunk)), file["counts"])
                match_VU[clips_M, file["texts"]] = file["matches"]
        return match_VU
