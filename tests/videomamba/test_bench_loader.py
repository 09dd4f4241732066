import json


def test_every_row_is_there_and_says_what_it_was_measured_against(videomamba, tmp_path):
    result = tmp_path / "loader.json"
    done = videomamba("bench", "loader", "--quick", "--json", str(result))
    assert done.returncode == 0, done.stderr
    rows = json.loads(result.read_text())["rows"]
    assert [(row["name"].partition(",")[0], row["baseline_name"]) for row in rows] == [
        ("1-worker", "pyav"),
        ("2-workers", "1-worker"),
        ("1-worker", "webdataset"),
        ("resume", "step 1"),
        ("plan", "step 1"),
        ("memory", "after 32"),
    ]
    assert all(row["ours"] > 0 and row["baseline"] > 0 for row in rows)
    assert "MiB a thousand" in rows[-1]["name"]
    for row in rows[:3]:
        assert abs(row["ratio"] - row["ours"] / row["baseline"]) < 0.05 * row["ratio"]
