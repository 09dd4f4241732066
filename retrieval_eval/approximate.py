"""Approximate indexes for collections too large for exact search, with their recall against it said beside them.

    hnsw    a graph of neighbours: about 0.1 ms a query whatever the size, 4 E + 8 M bytes a vector
    ivfpq   lists around centroids, vectors as product codes: `bytes` bytes a vector, lower recall

Inner product is not a metric: a vector's length counts. Both search the given vectors as they are, so a mean of unit
frame vectors (shorter where its frames differ) keeps its dual score. Legend: Q queries, V vectors, E their width.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from retrieval_eval.index import FlatIndex, VectorIndex, Vectors, load_faiss, prepared

Kind = Literal["flat", "hnsw", "ivfpq"]
NEIGHBOURS, BUILD_EFFORT, SEARCH_EFFORT = 32, 80, 128
LEAST_PER_LIST = 39
"""FAISS asks for this many training vectors a centroid."""


class Recall(NamedTuple):
    """The share of the exact index's first k that an approximate one finds too, in percent, over some queries."""

    k: int
    queries: int
    percent: float


def build(kind: Kind, vectors_VE: Vectors, code_bytes: int = 64) -> VectorIndex:
    """An index of the vectors; UserError where there are too few for the lists of ivfpq."""
    if kind == "flat":
        return FlatIndex(vectors_VE)
    faiss = load_faiss()
    count, width = vectors_VE.shape
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = BUILD_EFFORT, SEARCH_EFFORT
    else:
        lists = lists_for(count)
        if count < 256:
            raise UserError(
                f"{count} vectors are too few for product codes, which are learned from at least 256.", "Use flat."
            )
        code = max(c for c in range(1, min(code_bytes, width) + 1) if width % c == 0)
        index = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, lists, code, 8, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(1, lists // 8)
        index.train(prepared(vectors_VE, "vectors"))
    index.add(prepared(vectors_VE, "vectors"))
    return VectorIndex(index)


def lists_for(count: int) -> int:
    """How many lists V vectors are cut into: four times their root, as far as each list can be learned."""
    return max(1, min(int(4 * np.sqrt(count)), count // LEAST_PER_LIST))


def recall(index: VectorIndex, vectors_VE: Vectors, queries_QE: Vectors, k: int = 10) -> Recall:
    """How much of the exact answer an index gives."""
    _, exact_QK = FlatIndex(vectors_VE).search(queries_QE, k)
    _, found_QK = index.search(queries_QE, k)
    hits = [np.intersect1d(exact, found).size for exact, found in zip(exact_QK, found_QK, strict=True)]
    return Recall(exact_QK.shape[1], len(queries_QE), 100.0 * float(np.mean(hits)) / exact_QK.shape[1])


def sample_rows(count: int, most: int, seed: int = 0) -> NDArray[np.int64]:
    """Rows to measure recall with, drawn without replacement and sorted."""
    drawn = np.random.default_rng(seed).permutation(count)[:most]
    return np.sort(drawn).astype(np.int64)
