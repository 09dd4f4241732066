import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import FrameConfig
from data_pipeline.draws import uniform_np
from data_pipeline.frames import (
    choose,
    dense_indices,
    dense_view_indices,
    fps_indices,
    middle_indices,
    middle_of,
    random_indices,
    released_fps_indices,
    released_random_indices,
    released_sparse_indices,
    released_sparse_view_indices,
    released_tsn_indices,
    shuffled_order,
    single_indices,
    spread_indices,
    view_indices,
    within_seconds,
)
from data_pipeline.schema import SampleError

COUNT, WANTED = st.integers(1, 400), st.integers(1, 40)


def released_intervals(n, T):
    """UMT's rule, written as there: linspace rounded down, an interval's last frame included."""
    parts = min(T, n)
    edges = np.linspace(start=0, stop=n, num=parts + 1).astype(int)
    return [(edges[i], edges[i + 1] - 1) for i in range(parts)]


@given(COUNT, WANTED)
@settings(deadline=None)
def test_middle_is_the_released_middle_with_the_last_repeated(n, T):
    middles = [(first + last) // 2 for first, last in released_intervals(n, T)]
    assert middle_indices(n, T).tolist() == middles + [middles[-1]] * (T - len(middles))


@given(COUNT, WANTED, st.integers(0, 2**40))
@settings(deadline=None)
def test_random_stays_in_its_interval_sorted_and_padded(n, T, seed):
    chosen = random_indices(n, T, uniform_np(seed, "frames", T)[0])
    assert len(chosen) == T
    assert (np.diff(chosen) >= 0).all()
    intervals = released_intervals(n, T)
    for frame, (first, last) in zip(chosen, intervals, strict=False):
        assert first <= frame <= last
    assert (chosen[len(intervals) :] == chosen[len(intervals) - 1]).all()


def test_every_frame_can_be_drawn_the_last_of_an_interval_too():
    seen = {int(f) for s in range(400) for f in random_indices(20, 4, uniform_np(s, "frames", 4)[0])}
    assert seen == set(range(20))


def test_a_draw_just_below_one_stays_inside():
    almost = np.full(4, np.float32(1 - 2**-24))
    assert random_indices(2**20, 4, almost).max() == 2**20 - 1
    assert single_indices(2**20, 4, float(almost[0])).tolist() == [2**20 - 1] * 4


@given(COUNT, WANTED, st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_single_repeats_one_frame_of_the_clip(n, T, draw):
    chosen = single_indices(n, T, draw)
    assert len(chosen) == T
    assert len(set(chosen.tolist())) == 1
    assert 0 <= chosen[0] < n


UNIFORM = st.floats(0, 1, exclude_max=True, width=32)
RULES = ["uniform", "middle", "single", "dense", "fps", *(f"released_{r}" for r in ("random", "tsn", "sparse", "fps"))]


@given(st.sampled_from(RULES), COUNT, st.integers(1, 40), st.floats(0.1, 500), st.data())
@settings(deadline=None, max_examples=400)
def test_every_rule_gives_sorted_frames_of_the_clip(name, n, T, seconds, data):
    rule = FrameConfig(
        rule=name,
        stride=data.draw(st.integers(1, 9)),
        fps=data.draw(st.floats(0.1, 60)),
        first_seconds=data.draw(st.none() | st.floats(0.05, 600)),
    )
    draws = np.array(data.draw(st.lists(UNIFORM, min_size=T, max_size=T)), np.float32)
    chosen = choose(rule, n, seconds, T, draws)
    assert chosen.dtype == np.int64
    assert len(chosen) == T
    assert chosen[0] >= 0
    assert chosen[-1] <= n - 1
    assert (np.diff(chosen) >= 0).all()
    if rule.first_seconds is not None and n > 1:
        assert chosen[-1] == 0 or chosen[-1] * seconds / n < rule.first_seconds + 1e-6


@given(COUNT, WANTED, st.data())
@settings(deadline=None)
def test_every_frame_of_a_clip_can_be_drawn(n, T, data):
    frame = data.draw(st.integers(0, n - 1))
    edges = np.linspace(0, n, min(n, T) + 1).astype(int)
    place = int(np.searchsorted(edges, frame, side="right")) - 1
    draws = np.zeros(T)
    draws[place] = (frame - edges[place] + 0.5) / (edges[place + 1] - edges[place])
    assert random_indices(n, T, draws)[place] == frame


@given(COUNT, WANTED, st.integers(1, 9), UNIFORM)
@settings(deadline=None)
def test_dense_takes_every_so_manieth_frame_and_repeats_the_last(n, T, stride, draw):
    chosen = dense_indices(n, T, stride, draw)
    inside = chosen[: int((chosen < n - 1).sum()) + 1]
    assert (np.diff(inside)[:-1] == stride).all()
    if n > (T - 1) * stride:
        assert (np.diff(chosen) == stride).all()
    else:
        assert chosen[0] == 0
        assert chosen[-1] == n - 1


def test_dense_reaches_every_start():
    starts = {int(dense_indices(20, 4, 3, (i + 0.5) / 100)[0]) for i in range(100)}
    assert starts == set(range(11))


@given(st.integers(1, 6), COUNT, WANTED)
@settings(deadline=None)
def test_views_are_in_their_interval_spread_evenly_and_one_is_the_middle(views, n, T):
    assert view_indices(n, T, 0, 1).tolist() == middle_indices(n, T).tolist()
    chosen = np.stack([view_indices(n, T, view, views) for view in range(views)])
    assert (np.diff(chosen, axis=0) >= 0).all()
    for column, (first, last) in zip(chosen.T, released_intervals(n, T), strict=False):
        assert (column >= first).all()
        assert (column <= last).all()
        if last - first + 1 >= 2 * views:
            assert len(set(column.tolist())) == views
    dense = np.stack([dense_view_indices(n, T, 2, view, views) for view in range(views)])
    assert (dense >= 0).all()
    assert (dense < n).all()
    assert (np.diff(dense, axis=0) >= 0).all()
    if views > 1:
        assert dense[0, 0] == 0
        assert dense[-1, -1] == n - 1 or n < (T - 1) * 2 + 1


@given(st.integers(1, 200), st.integers(1, 20), st.floats(0.2, 30), st.floats(0.25, 40), UNIFORM)
@settings(deadline=None)
def test_fps_shows_the_frame_of_each_time(n, T, fps, seconds, draw):
    chosen = fps_indices(n, T, seconds, fps, draw)
    start = draw * max(0.0, seconds - T / fps)
    for place, frame in enumerate(chosen):
        at = start + (place + 0.5) / fps
        assert frame == n - 1 or frame * seconds / n <= at + 1e-6
        assert frame == n - 1 or at < (frame + 1) * seconds / n + 1e-6


def test_the_rules_of_the_release_are_its_own():
    """Each against the release's rule written as a loop; random numbers that a loop can follow."""
    draws = uniform_np(11, "frames", 40)[0]
    for n in (*range(2, 60), 199, 300):
        for T in (1, 4, 8, 16):
            intervals = released_intervals(n, T)
            if all(last > first for first, last in intervals):
                loop = [first + int(u * (last - first)) for (first, last), u in zip(intervals, draws, strict=False)]
                assert released_random_indices(n, T, draws).tolist() == loop + loop[-1:] * (T - len(loop))
            else:
                chosen = released_random_indices(n, T, draws)[: len(intervals)]
                assert len(set(chosen.tolist())) == len(intervals)
            length = n // T
            tsn = [i * length + int(draws[i] * length) for i in range(T)] if n >= T else [0] * T
            assert released_tsn_indices(n, T, draws).tolist() == tsn
            step = max(0.0, (n - 1) / T)
            low, high = [round(step * i) for i in range(T)], [round(step * (i + 1)) for i in range(T)]
            sparse = [
                lo + min(int(draws[i] * (hi - lo + 1)), hi - lo)
                for i, (lo, hi) in enumerate(zip(low, high, strict=True))
            ]
            assert released_sparse_indices(n, T, draws).tolist() == sparse
            for view in range(4):
                seen = [min(lo + int(step / 5 * (view + 1)), n - 1) for lo in low]
                assert released_sparse_view_indices(n, T, view, 4).tolist() == seen


def test_where_the_release_differs_from_ours():
    """Trap I: its random rule never shows the last frame of an interval, and TSN never what n // T leaves over."""
    seeds = [uniform_np(seed, "frames", 4)[0] for seed in range(400)]
    released = {int(f) for draws in seeds for f in released_random_indices(20, 4, draws)}
    assert released == set(range(20)) - {4, 9, 14, 19}
    assert {int(f) for draws in seeds for f in released_tsn_indices(23, 4, draws)} == set(range(20))
    assert released_tsn_indices(5, 8, np.full(8, 0.9)).tolist() == [0] * 8
    assert released_fps_indices(300, 8, 10.0, 0.5).tolist() == [30, 90, 150, 210, 270, 270, 270, 270]
    subsets = {tuple(released_random_indices(5, 4, uniform_np(seed, "frames", 4)[0]).tolist()) for seed in range(300)}
    assert len(subsets) == 5  # all 4 of 5


def test_the_first_seconds_are_a_limit():
    assert [within_seconds(300, 10.0, limit) for limit in (None, 20, 10, 5, 0.02, 0.05)] == [300, 300, 300, 150, 1, 2]
    assert middle_of(300, 10.0, 2, 5.0).tolist() == middle_indices(150, 2).tolist()
    assert within_seconds(300, 0.0, 5.0) == 300


def test_choose_names_the_rules():
    draws = uniform_np(3, "frames", 8)[0]

    def chosen(rule, **options):
        return choose(FrameConfig(rule=rule, **options), 30, 3.0, 8, draws).tolist()

    assert chosen("middle") == middle_indices(30, 8).tolist()
    assert chosen("single") == single_indices(30, 8, draws[0]).tolist()
    assert chosen("uniform") == random_indices(30, 8, draws).tolist()
    assert chosen("dense", stride=2) == dense_indices(30, 8, 2, draws[0]).tolist()
    assert chosen("fps", fps=4) == fps_indices(30, 8, 3.0, 4, draws[0]).tolist()
    assert chosen("uniform", first_seconds=1.0) == random_indices(10, 8, draws).tolist()
    assert choose(FrameConfig(rule="fps"), 1, 0.0, 4, draws).tolist() == [0] * 4


def test_a_pace_needs_times():
    for rule in ("fps", "released_fps"):
        with pytest.raises(SampleError, match="no times"):
            choose(FrameConfig(rule=rule), 30, 0.0, 8, np.zeros(8))


@given(COUNT, WANTED)
@settings(deadline=None)
def test_the_cache_keeps_distinct_frames_and_the_middle_rule_at_equal_count(n, most):
    kept = spread_indices(n, most)
    assert len(set(kept.tolist())) == len(kept) == min(n, most)
    if n >= most:
        assert kept.tolist() == middle_indices(n, most).tolist()


@given(st.integers(2, 16), st.integers(-(2**62), 2**62))
@settings(deadline=None)
def test_shuffled_is_a_permutation_and_never_the_given_order(T, seed):
    order = shuffled_order(T, seed)
    assert sorted(order.tolist()) == list(range(T))
    assert order.tolist() != list(range(T))


def test_nothing_can_be_chosen_from_nothing():
    for rule in (middle_indices, lambda n, T: single_indices(n, T, 0.5)):
        with pytest.raises(ValueError, match="8 frames out of 0"):
            rule(0, 8)
