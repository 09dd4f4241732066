import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.draws import uniform_np
from data_pipeline.frames import choose, middle_indices, random_indices, shuffled_order, single_indices, spread_indices

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


def test_choose_names_the_rules():
    draws = uniform_np(3, "frames", 8)[0]
    assert choose("middle", 30, 8, draws).tolist() == middle_indices(30, 8).tolist()
    assert choose("single", 30, 8, draws).tolist() == single_indices(30, 8, draws[0]).tolist()
    assert choose("uniform", 30, 8, draws).tolist() == random_indices(30, 8, draws).tolist()


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
