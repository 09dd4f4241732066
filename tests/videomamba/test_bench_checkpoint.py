import json


def test_every_row_is_there_and_nothing_stays(videomamba, tmp_path):
    (tmp_path / "disk").mkdir()
    arguments = ("--model", "tiny", "--steps", "1", "--repeats", "1", "--folder", str(tmp_path / "disk"))
    done = videomamba("bench", "checkpoint", *arguments, "--json", str(tmp_path / "b.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    measured = ("pause", "added to a run of 1 steps")
    assert [row["name"] for row in rows] == [f"{what}, {way}" for what in measured for way in ("background", "waiting")]
    assert all(row["ours"] > 0 for row in rows)
    assert not list((tmp_path / "disk").iterdir())
