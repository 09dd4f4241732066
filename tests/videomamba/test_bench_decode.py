import json

import numpy as np

from videomamba.bench_decode import bare_loop, made


def test_the_decode_bench_runs_on_clips_made_here_and_given(videomamba, tmp_path):
    clip = made(30)
    assert bare_loop(clip, 300).shape == (8, 224, 224, 3)
    assert len(np.unique(bare_loop(clip, 300).mean((1, 2, 3)))) == 8
    (tmp_path / "own.mp4").write_bytes(clip)
    done = videomamba(
        "bench", "decode", "--clip", str(tmp_path / "own.mp4"), "--repeats", "1", "--json", str(tmp_path / "b.json")
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert (row["name"], row["baseline_name"]) == ("own.mp4", "bare PyAV loop")
