"""Inner-product search over one vector a video, by FAISS: exact here, approximate in approximate.py.

The dual score of a video and a text is the mean over frames of cosines, which is the text's unit vector
times the mean of the video's unit frame vectors. So one vector a video, not normalised again, in an
`IndexFlatIP` gives that score itself and not an approximation of it.

On a GPU, FAISS searches there if its GPU build is the one installed; otherwise torch does the same product in slices.

Legend: Q queries, V vectors held, E their width, K entries asked for.
"""

from functools import cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError

Vectors = NDArray[np.float32]


@cache
def load_faiss() -> Any:
    """FAISS, told to use matrix products from 20 queries on.

    As shipped it waits for 128,000 of them: 100 queries over 1M x 512 then take 15.3 s, and 1.07 s so.
    """
    import faiss

    faiss.cvar.distance_compute_blas_threshold = 20
    return faiss


class VectorIndex:
    """Vectors (V, E) behind any FAISS index of inner products."""

    def __init__(self, index: Any) -> None:
        self.index = index

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def search(self, queries_QE: Vectors, k: int) -> tuple[Vectors, NDArray[np.int64]]:
        """The k best scores (Q, K) of each query, best first, and the positions (Q, K) they belong to."""
        scores_QK, positions_QK = self.index.search(prepared(queries_QE, "queries"), min(k, len(self)))
        return scores_QK, positions_QK

    def to_bytes(self) -> bytes:
        """The index in FAISS's own file format."""
        return bytes(load_faiss().serialize_index(self.index))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The index that `to_bytes` wrote."""
        made = cls.__new__(cls)
        made.index = load_faiss().deserialize_index(np.frombuffer(data, dtype=np.uint8))
        return made


class FlatIndex(VectorIndex):
    """Vectors (V, E) searched by inner product, exactly."""

    def __init__(self, vectors_VE: Vectors) -> None:
        super().__init__(load_faiss().IndexFlatIP(vectors_VE.shape[1]))
        self.index.add(prepared(vectors_VE, "vectors"))

    def scores(self, queries_QE: Vectors) -> Vectors:
        """Every score (Q, V), in the order in which the vectors were added: a product with the vectors held.

        A search for all V would sort every row as well, which takes ten times as long at V = 4,917.
        """
        held = load_faiss().rev_swig_ptr(self.index.get_xb(), len(self) * self.index.d)
        scores_QV: Vectors = prepared(queries_QE, "queries") @ held.reshape(len(self), self.index.d).T
        return scores_QV


class DeviceIndex:
    """Exact search on another device by torch, `slice_rows` vectors at a time, for where FAISS has no GPU build."""

    def __init__(self, vectors_VE: Vectors, device: str = "cuda", slice_rows: int = 1_000_000) -> None:
        import torch

        self.vectors_VE = torch.from_numpy(prepared(vectors_VE, "vectors")).to(device)
        self.slice_rows = slice_rows

    def __len__(self) -> int:
        return len(self.vectors_VE)

    def search(self, queries_QE: Vectors, k: int) -> tuple[Vectors, NDArray[np.int64]]:
        """As `VectorIndex.search`; of equal scores the earlier vector comes first only within a slice's own order."""
        import torch

        queries = torch.from_numpy(prepared(queries_QE, "queries")).to(self.vectors_VE.device)
        best: list[Any] = []
        for start in range(0, len(self), self.slice_rows):
            part = self.vectors_VE[start : start + self.slice_rows]
            scores, rows = (queries @ part.T).topk(min(k, len(part)), dim=1)
            best.append((scores, rows + start))
        scores, rows = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
        top = scores.topk(min(k, len(self)), dim=1)
        return top.values.cpu().numpy(), rows.gather(1, top.indices).cpu().numpy()


def open_index(vectors_VE: Vectors, device: str = "auto") -> VectorIndex | DeviceIndex:
    """An exact index on the device that serves it: "cpu", "cuda", or "auto" for the GPU where there is one."""
    if device == "cpu":
        return FlatIndex(vectors_VE)
    faiss = load_faiss()
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        flat = FlatIndex(vectors_VE)
        return VectorIndex(faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, flat.index))
    import torch

    if torch.cuda.is_available():
        return DeviceIndex(vectors_VE)
    if device == "cuda":
        raise UserError("There is no GPU that torch or FAISS can use.", "Give device=cpu or auto.")
    return FlatIndex(vectors_VE)


def prepared(vectors: NDArray[Any], what: str) -> Vectors:
    """Contiguous float32 rows; UserError where one is not finite."""
    ready: Vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    bad = int((~np.isfinite(ready)).any(axis=1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(ready)} {what} hold a number that is not finite.",
            "Look at the checkpoint's losses: the model that made them has diverged.",
            exit_code=1,
        )
    return ready
