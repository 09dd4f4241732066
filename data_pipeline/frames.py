"""Which frames of a clip are seen: pure rules from (number of frames, draws) to indices.

A clip of n frames is cut into min(n, T) equal intervals as UMT and VideoMamba do (`linspace` rounded down);
"uniform" takes a random frame of each, "middle" its middle one. The released random rule never takes the last
frame of an interval; ours can take every frame. A clip shorter than T gives all its frames and repeats the last.

Letters: T frames wanted, n frames there are, B clips.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.config import FrameRuleName
from data_pipeline.draws import derive, permutation_np

Int64Array = npt.NDArray[np.int64]


def _interval_edges(n: int, T: int) -> Int64Array:
    if n < 1 or T < 1:
        raise ValueError(f"cannot choose {T} frames out of {n}")
    parts = min(n, T)
    # The release's own arithmetic: a few edges (n=30, T=22) lie one lower than exact division puts them.
    return np.linspace(0, n, parts + 1).astype(np.int64)


def _pad(indices: Int64Array, T: int) -> Int64Array:
    return np.concatenate([indices, np.full(T - len(indices), indices[-1])]) if len(indices) < T else indices


def middle_indices(n: int, T: int) -> Int64Array:
    """(T,) the middle frame of each interval, floor((first + last) / 2), as the release evaluates."""
    edges = _interval_edges(n, T)
    return _pad((edges[:-1] + edges[1:] - 1) // 2, T)


def random_indices(n: int, T: int, uniforms_T: npt.NDArray[Any]) -> Int64Array:
    """(T,) a random frame of each interval, chosen by `uniforms_T` in [0, 1)."""
    edges = _interval_edges(n, T)
    width = np.diff(edges)
    offset = np.minimum((uniforms_T[: len(width)] * width).astype(np.int64), width - 1)
    return _pad(edges[:-1] + offset, T)


def single_indices(n: int, T: int, uniform: float) -> Int64Array:
    """(T,) one frame of the clip, chosen by `uniform` in [0, 1), repeated."""
    if n < 1 or T < 1:
        raise ValueError(f"cannot choose {T} frames out of {n}")
    return np.full(T, min(int(uniform * n), n - 1), dtype=np.int64)


def choose(rule: FrameRuleName, n: int, T: int, uniforms_T: npt.NDArray[Any]) -> Int64Array:
    """(T,) indices below n by the named rule; `uniforms_T` are the clip's draws in [0, 1) (unused by "middle")."""
    if rule == "middle":
        return middle_indices(n, T)
    if rule == "single":
        return single_indices(n, T, float(uniforms_T[0]))
    return random_indices(n, T, uniforms_T)


def spread_indices(n: int, most: int) -> Int64Array:
    """(min(n, most),) distinct, evenly spaced frames: what the frame cache keeps of a clip."""
    return middle_indices(n, min(n, most))


def shuffled_order(T: int, seed: int) -> Int64Array:
    """(T,) a random order of the frames that is not the given one (for T > 1): the shuffled control."""
    for attempt in range(64):
        order = permutation_np(derive(seed, "shuffled", attempt), "frames", T)
        if T == 1 or not np.array_equal(order, np.arange(T)):
            return order
    return np.roll(np.arange(T), 1)  # 64 identities in a row: unreachable in practice, and still shuffled
