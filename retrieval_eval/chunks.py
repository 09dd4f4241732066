"""Long lists cut into chunks, each a piece of a store, by a rule that knows neither ranks nor what was done before.

So the same numbers come out, bit for bit, whoever computes which chunk and however often that was interrupted.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_eval.store import read_rows

MOST = 1024
"""Chunks of one list; the list of a large collection is cut into larger ones."""
_OPEN = 64


class Chunks:
    """`count` things, `size` at a time, or more where that would make more than MOST chunks."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, max(size, -(-count // MOST))

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def span(self, chunk: int) -> tuple[int, int]:
        """The first of a chunk, and the one after its last."""
        return chunk * self.size, min((chunk + 1) * self.size, self.count)

    def batches(self, chunk: int, batch: int) -> list[tuple[int, int]]:
        """The spans of at most `batch` that a chunk is worked through in."""
        start, stop = self.span(chunk)
        return [(first, min(first + batch, stop)) for first in range(start, stop, batch)]

    def piece(self, kind: str, chunk: int) -> str:
        """The name of a chunk of that kind, as a piece of a store."""
        return f"{kind}/{chunk:06d}"

    def pieces(self, kind: str) -> list[str]:
        """The names of all chunks of that kind."""
        return [self.piece(kind, chunk) for chunk in range(len(self))]


class ChunkRows:
    """The rows of several RowWriter files as one sequence, mapped into memory, a bounded number of files at a time."""

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]) -> None:
        self.paths = paths
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._opened = lru_cache(_OPEN)(read_rows)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, row: int) -> NDArray[Any]:
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        found: NDArray[Any] = self._opened(self.paths[file])[row - self.starts[file]]
        return found
