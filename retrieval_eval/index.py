"""Exact inner-product search over one vector a video, by FAISS.

The dual score of a video and a text is the mean over frames of cosines, which is the text's unit vector
times the mean of the video's unit frame vectors. So one vector a video, not normalised again, in an
`IndexFlatIP` gives that score itself and not an approximation of it.

Legend: Q queries, V vectors held, E their width, K entries asked for.
"""

from functools import cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError

Vectors = NDArray[np.float32]
_QUERIES = 1024


@cache
def _faiss() -> Any:
    """FAISS, told to use matrix products from 20 queries on.

    As shipped it waits for 128,000 of them: 100 queries over 1M x 512 then take 15.3 s, and 1.07 s so.
    """
    import faiss

    faiss.cvar.distance_compute_blas_threshold = 20
    return faiss


class FlatIndex:
    """Vectors (V, E) searched by inner product, exactly."""

    def __init__(self, vectors_VE: Vectors) -> None:
        self.index = _faiss().IndexFlatIP(vectors_VE.shape[1])
        self.index.add(_ready(vectors_VE, "vectors"))

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def search(self, queries_QE: Vectors, k: int) -> tuple[Vectors, NDArray[np.int64]]:
        """The k best scores (Q, K) of each query, best first, and the positions (Q, K) they belong to."""
        scores_QK, positions_QK = self.index.search(_ready(queries_QE, "queries"), min(k, len(self)))
        return scores_QK, positions_QK

    def scores(self, queries_QE: Vectors) -> Vectors:
        """Every score (Q, V), in the order in which the vectors were added."""
        scores_QV = np.empty((len(queries_QE), len(self)), dtype=np.float32)
        for start in range(0, len(queries_QE), _QUERIES):
            found, positions = self.search(queries_QE[start : start + _QUERIES], len(self))
            np.put_along_axis(scores_QV[start : start + _QUERIES], positions, found, axis=1)
        return scores_QV

    def to_bytes(self) -> bytes:
        """The index in FAISS's own file format."""
        return bytes(_faiss().serialize_index(self.index))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The index that `to_bytes` wrote."""
        made = cls.__new__(cls)
        made.index = _faiss().deserialize_index(np.frombuffer(data, dtype=np.uint8))
        return made


def _ready(vectors: NDArray[Any], what: str) -> Vectors:
    ready: Vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    bad = int((~np.isfinite(ready)).any(axis=1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(ready)} {what} hold a number that is not finite.",
            "Look at the checkpoint's losses: the model that made them has diverged.",
            exit_code=1,
        )
    return ready
