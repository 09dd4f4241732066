"""How two things are timed in turns."""

from collections import Counter

import pytest

from videomamba import bench_table


@pytest.mark.parametrize(("least", "quick_runs"), [(0.0, 1), (0.1, 52)])
def test_a_turn_lasts_a_while_or_one_run(monkeypatch, least, quick_runs):
    clock, runs = [0.0], Counter()

    def lasting(name, seconds):
        def run():
            runs[name] += 1
            clock[0] += seconds if runs[name] > 1 else 7.0  # the warm-up, which is not counted

        return run

    monkeypatch.setattr(bench_table.time, "perf_counter", lambda: clock[0])
    quick, slow = lasting("quick", 2**-9), lasting("slow", 0.5)
    times = bench_table.interleave(quick, slow, 3, least)
    assert times == pytest.approx((2000 / 1024, 500))
    assert runs["slow"] == 1 + 3
    assert runs["quick"] == 1 + 3 * quick_runs
