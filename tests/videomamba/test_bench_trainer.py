"""`videomamba bench trainer`: both loops learn the same, and the rows are those that were promised."""

import json

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rows_and_json(videomamba, tmp_path):
    """The bench itself refuses to time two loops whose losses differ."""
    done = videomamba(
        "bench", "trainer", "--repeats", "3", "--json", str(tmp_path / "t.json"), timeout=280, OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "t.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["stage1", "stage2"]
    assert all(row["baseline_name"] == "pytorch" and row["ours"] > 0 for row in result["rows"])
