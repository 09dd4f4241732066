"""`videomamba bench trainer`: both sides take the same steps, or there is no table."""

import json

import pytest


@pytest.mark.slow
def test_both_stages_are_measured_against_the_bare_loop(videomamba, tmp_path):
    result = tmp_path / "trainer.json"
    done = videomamba("bench", "trainer", "--quick", "--json", str(result))
    assert done.returncode == 0, done.stderr
    rows = json.loads(result.read_text())["rows"]
    assert [(row["name"], row["baseline_name"], row["unit"]) for row in rows] == [
        ("stage1", "pytorch", "ms"),
        ("stage2", "pytorch", "ms"),
    ]
    assert all(row["ratio"] == pytest.approx(row["baseline"] / row["ours"], rel=0.01) for row in rows)


@pytest.mark.slow
def test_sides_that_differ_give_no_table(monkeypatch, tmp_path):
    from configs.errors import UserError
    from videomamba import bench_trainer

    taken = bench_trainer._run_bare
    monkeypatch.setattr(bench_trainer, "_run_bare", lambda run, size: (taken(run, size)[0], 1e3))
    with pytest.raises(UserError, match="the bare loop one of 1000"):
        list(bench_trainer.measure(bench_trainer.QUICK, ("stage1",)))
