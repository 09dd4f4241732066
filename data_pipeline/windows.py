"""An epoch that goes through the shards of a corpus a few at a time, for shards that are fetched from afar.

The shards are permuted, and every `window` of them in that order form a window, whose samples are permuted among
themselves. So at any time a reader needs two windows of shards at most, and every sample still comes once.
Only the windows that are asked for are worked out: a position deep in a large epoch costs no more than an early one.

Letters: S shards, W windows.
"""

import numpy as np
import numpy.typing as npt

from data_pipeline.draws import derive, permutation_np

Int64Array = npt.NDArray[np.int64]

KEPT_WINDOWS = 2  # a batch lies in one window, or across an edge in two


class WindowedEpoch:
    """The samples of one epoch by their places in it; `shard_sizes` (S,) counts the samples of each shard."""

    def __init__(self, seed: int, shard_sizes: npt.NDArray[np.int64], window: int) -> None:
        self._seed = seed
        self._window = window
        self._sizes_S = shard_sizes
        self._first_S = np.cumsum(shard_sizes) - shard_sizes
        self._order_S = permutation_np(seed, "shards", len(shard_sizes))
        ends_S = np.cumsum(shard_sizes[self._order_S])
        self._ends_W = ends_S[np.minimum(np.arange(window, len(ends_S) + window, window), len(ends_S)) - 1]
        self._kept: dict[int, Int64Array] = {}

    def shards(self, window: int) -> Int64Array:
        """The shards of a window."""
        return self._order_S[window * self._window : (window + 1) * self._window]

    def at(self, places: Int64Array) -> Int64Array:
        """The samples at these places (each below the number of samples), in the same shape."""
        window_of = np.searchsorted(self._ends_W, places, side="right")
        samples = np.empty_like(places)
        for window in np.unique(window_of).tolist():
            here = window_of == window
            before = int(self._ends_W[window - 1]) if window else 0
            samples[here] = self._samples(window)[places[here] - before]
        return samples

    def _samples(self, window: int) -> Int64Array:
        kept = self._kept.get(window)
        if kept is None:
            shards = self.shards(window)
            inside = np.concatenate([self._first_S[s] + np.arange(self._sizes_S[s]) for s in shards])
            kept = inside[permutation_np(derive(self._seed, "window", window), "samples", len(inside))]
            for oldest in list(self._kept)[: len(self._kept) + 1 - KEPT_WINDOWS]:
                del self._kept[oldest]
            self._kept[window] = kept
        return kept
