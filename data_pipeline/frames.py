"""Which frames of a clip are seen: pure rules from (number of frames, seconds, draws) to sorted indices.

A clip of n frames is cut into min(n, T) equal intervals as UMT and VideoMamba do (`linspace` rounded down);
"uniform" takes a random frame of each, "middle" its middle one. "dense" takes every stride-th frame from a random
start, "fps" so many a second from a random start. A clip shorter than what is asked gives what it has and repeats
its last frame. What the release does otherwise has names of its own (reference 2.6, 3.4, 5 and trap I):

    released_random  stage 2: as "uniform", but never the last frame of an interval, and where an interval holds one
                     frame alone, any min(n, T) different frames of the clip
    released_tsn     stage 1: T segments of n // T frames, what is left over at the end never seen; a clip shorter
                     than T gives its first frame T times
    released_sparse  fine-tuning: round(s i) to round(s (i + 1)), both included, s = (n - 1) / T
    released_fps     UMT's "fps": from the start, in the middles of equal times, rounded

Frames are slots of equal time here; decode.py knows which frame fills one (and so n counts slots).
Letters: T frames wanted, n frames there are, V views of a clip.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.config import FrameConfig
from data_pipeline.draws import derive, permutation_np
from data_pipeline.schema import LossReason, SampleError

Int64Array = npt.NDArray[np.int64]
Uniforms = npt.NDArray[Any]


def _require(n: int, T: int) -> None:
    if n < 1 or T < 1:
        raise ValueError(f"cannot choose {T} frames out of {n}")


def _interval_edges(n: int, T: int) -> Int64Array:
    _require(n, T)
    parts = min(n, T)
    # The release's own arithmetic: a few edges (n=30, T=22) lie one lower than exact division puts them.
    return np.linspace(0, n, parts + 1).astype(np.int64)


def _pad(indices: Int64Array, T: int) -> Int64Array:
    return np.concatenate([indices, np.full(T - len(indices), indices[-1])]) if len(indices) < T else indices


def within_seconds(n: int, seconds: float, limit: float | None) -> int:
    """How many of n frames, which last `seconds` (0: not known), begin before `limit` (None: all); at least 1."""
    if limit is None or seconds <= limit:
        return n
    return min(n, max(1, math.ceil(n * limit / seconds - 1e-9)))


def middle_indices(n: int, T: int) -> Int64Array:
    """(T,) the middle frame of each interval, floor((first + last) / 2), as the release evaluates."""
    return view_indices(n, T, 0, 1)


def view_indices(n: int, T: int, view: int, views: int) -> Int64Array:
    """(T,) view `view` of `views` temporal clips: the frame (2 view + 1) / (2 views) of the way into each interval."""
    edges = _interval_edges(n, T)
    return _pad(edges[:-1] + (np.diff(edges) - 1) * (2 * view + 1) // (2 * views), T)


def dense_view_indices(n: int, T: int, stride: int, view: int, views: int) -> Int64Array:
    """(T,) view `view` of `views`: every stride-th frame, the views' starts evenly spaced; one view lies centred."""
    _require(n, T)
    room = max(0, n - 1 - (T - 1) * stride)
    start = room // 2 if views == 1 else round(room * view / (views - 1))
    return np.minimum(start + stride * np.arange(T, dtype=np.int64), n - 1)


def released_sparse_view_indices(n: int, T: int, view: int, views: int) -> Int64Array:
    """(T,) the release's fine-tuning test clip `view` of `views`: round(s i) + floor(s / (views + 1) (view + 1))."""
    _require(n, T)
    segment = (n - 1) / T
    start = np.round(segment * np.arange(T)).astype(np.int64)
    return np.minimum(start + int(segment / (views + 1) * (view + 1)), n - 1)


def random_indices(n: int, T: int, uniforms_T: Uniforms) -> Int64Array:
    """(T,) a random frame of each interval, chosen by `uniforms_T` in [0, 1)."""
    edges = _interval_edges(n, T)
    return _pad(edges[:-1] + _below(np.diff(edges), uniforms_T), T)


def _below(count: npt.NDArray[Any] | int, uniforms: Uniforms) -> Int64Array:
    """Whole numbers below `count`, by uniforms in [0, 1) (as many as there are counts)."""
    counts = np.asarray(count, np.int64)
    drawn = (np.asarray(uniforms)[: counts.size].reshape(counts.shape) * counts).astype(np.int64)
    return np.minimum(drawn, counts - 1)


def single_indices(n: int, T: int, uniform: float) -> Int64Array:
    """(T,) one frame of the clip, chosen by `uniform` in [0, 1), repeated."""
    _require(n, T)
    return np.full(T, _below(n, np.array([uniform])), dtype=np.int64)


def dense_indices(n: int, T: int, stride: int, uniform: float) -> Int64Array:
    """(T,) every stride-th frame from a start chosen by `uniform` among those that fit."""
    _require(n, T)
    start = _below(max(1, n - (T - 1) * stride), np.array([uniform]))
    indices: Int64Array = start + stride * np.arange(T, dtype=np.int64)
    return indices.clip(0, n - 1)


def fps_indices(n: int, T: int, seconds: float, fps: float, uniform: float) -> Int64Array:
    """(T,) the frames in the middles of T spells of 1 / fps seconds, from a start chosen among those that fit."""
    _require(n, T)
    start = uniform * max(0.0, seconds - T / fps)
    times = start + (np.arange(T) + 0.5) / fps
    indices: Int64Array = (times * (n / _known(seconds))).astype(np.int64)
    return indices.clip(0, n - 1)


def released_fps_indices(n: int, T: int, seconds: float, fps: float) -> Int64Array:
    """(T,) the first T frames in the middles of spells of 1 / fps seconds, rounded to the nearest frame."""
    _require(n, T)
    times = np.arange(0.5 / fps, _known(seconds) + 0.5 / fps, 1 / fps)
    indices = np.around(times * (n / seconds)).astype(np.int64)
    indices = indices[indices < n][:T]
    return _pad(indices if len(indices) else np.array([n - 1]), T)


def _known(seconds: float) -> float:
    if seconds <= 0:
        raise SampleError(LossReason.DECODE_ERROR, "it tells no times, which the frame rule needs")
    return seconds


def released_random_indices(n: int, T: int, uniforms_T: Uniforms) -> Int64Array:
    """(T,) a random frame of each interval but its last one; see the module's head for intervals of one frame."""
    edges = _interval_edges(n, T)
    width = np.diff(edges)
    if width.min() > 1:
        return _pad(edges[:-1] + _below(width - 1, uniforms_T), T)
    left = np.arange(n)
    for place, other in enumerate(np.arange(len(width)) + _below(n - np.arange(len(width)), uniforms_T)):
        left[[place, other]] = left[[other, place]]
    return _pad(np.sort(left[: len(width)]), T)


def released_tsn_indices(n: int, T: int, uniforms_T: Uniforms) -> Int64Array:
    """(T,) a random frame of each of T segments of n // T frames; all 0 for a clip shorter than T."""
    _require(n, T)
    length = n // T
    if length == 0:
        return np.zeros(T, np.int64)
    return np.arange(T, dtype=np.int64) * length + _below(np.full(T, length), uniforms_T)


def released_sparse_indices(n: int, T: int, uniforms_T: Uniforms) -> Int64Array:
    """(T,) a random frame between round(s i) and round(s (i + 1)), both included, s = (n - 1) / T."""
    _require(n, T)
    edges = np.round((n - 1) / T * np.arange(T + 1)).astype(np.int64)
    return edges[:-1] + _below(np.diff(edges) + 1, uniforms_T)


_RULES: dict[str, Callable[[FrameConfig, int, float, int, Uniforms], Int64Array]] = {
    "uniform": lambda _, n, __, T, u: random_indices(n, T, u),
    "middle": lambda _, n, __, T, ___: middle_indices(n, T),
    "single": lambda _, n, __, T, u: single_indices(n, T, float(u[0])),
    "dense": lambda rule, n, _, T, u: dense_indices(n, T, rule.stride, float(u[0])),
    "fps": lambda rule, n, seconds, T, u: fps_indices(n, T, seconds, rule.fps, float(u[0])),
    "released_random": lambda _, n, __, T, u: released_random_indices(n, T, u),
    "released_tsn": lambda _, n, __, T, u: released_tsn_indices(n, T, u),
    "released_sparse": lambda _, n, __, T, u: released_sparse_indices(n, T, u),
    "released_fps": lambda rule, n, seconds, T, _: released_fps_indices(n, T, seconds, rule.fps),
}


def choose(rule: FrameConfig, n: int, seconds: float, T: int, uniforms_T: Uniforms) -> Int64Array:
    """(T,) indices below n by the rule; `uniforms_T` are the clip's draws in [0, 1) (unused by "middle").

    `seconds` is what the n frames last, 0 where that is not known: then there is no limit of seconds, and the rules
    that count frames a second raise SampleError. A single frame (an image) needs no time.
    """
    if n == 1:
        return np.zeros(T, np.int64)
    seen = within_seconds(n, seconds, rule.first_seconds)
    return _RULES[rule.rule](rule, seen, seconds * seen / n, T, uniforms_T)


def middle_of(n: int, seconds: float, T: int, first_seconds: float | None) -> Int64Array:
    """(T,) what an evaluation sees: the middles of the clip's intervals, or of those of its first seconds."""
    return middle_indices(within_seconds(n, seconds, first_seconds), T)


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
