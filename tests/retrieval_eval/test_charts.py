"""The report's small parts: ticks, thinned curves, strips, and the rule that chooses queries."""

import base64
import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.shards import Corpus
from retrieval_eval.charts import line_chart, thin, ticks
from retrieval_eval.figures import GAP, frame_strip
from retrieval_eval.strips import NOTE, choose, clip_frames


@pytest.mark.parametrize("low, high", [(0, 1.62), (0, 0.003), (-3.5, 2), (0, 2000), (5, 5), (0, 0)])
def test_ticks_are_round_and_cover_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 1 <= len(found) <= 8
    steps = np.diff(found)
    assert steps == pytest.approx(np.full(len(steps), steps[0]) if len(steps) else steps)
    assert all(len(f"{tick:g}") <= 6 for tick in found)


def test_thinning_keeps_means_and_gaps() -> None:
    steps, values = thin([10, 20, 30, 40, 50], [1.0, 3.0, math.nan, math.nan, 9.0], points=3)
    assert steps == [15, 35, 50]
    assert values[0] == 2
    assert math.isnan(values[1])
    assert values[2] == 9


def test_a_chart_breaks_where_nothing_was_logged_and_escapes_names() -> None:
    chart = line_chart("t", [1, 2, 3, 4], {"<a>": [1.0, math.nan, 2.0, 1.0]}, "step", "loss")
    path = chart.split(' d="')[1].split('"')[0]
    assert path.count("M") == 2
    assert "&lt;a&gt; <b>1</b>" in chart
    assert "<a>" not in chart
    assert "nothing was logged" in line_chart("t", [], {}, "step", "loss")


def test_a_strip_shows_evenly_spaced_frames_in_their_shape() -> None:
    frames = np.stack([np.full((20, 40, 3), 10 * t, np.uint8) for t in range(16)])
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(frame_strip(frames, height=30, columns=4)))))
    assert sheet.shape == (30, 4 * 60 + 3 * GAP, 3)
    shades = [int(sheet[15, 30 + place * (60 + GAP)].mean()) for place in range(4)]
    assert shades == pytest.approx([0, 50, 100, 150], abs=3)


def test_motion_pairs_come_first_among_the_misses() -> None:
    looks = [("red",), ("red",), ("blue",), ("green",)]

    def line(truth: int, found: int) -> dict:
        return {
            "query": f"{truth} {found}",
            "truth": {"index": truth},
            "dual": {"rank": 1.0 if truth == found else 3.0, "found": [{"index": found}]},
        }

    lines = [line(2, 3), line(0, 1), line(1, 1), line(2, 2), line(3, 0)]
    chosen = choose(lines, "dual", hits=1, misses=3, looks=looks)
    assert [(one["query"], note) for one, note in chosen[:1]] == [("0 1", NOTE)]
    assert {one["query"] for one, _ in chosen[1:3]} == {"2 3", "3 0"}
    assert chosen[3][0]["dual"]["rank"] == 1
    assert all(note == "" for _, note in choose(lines, "dual", 1, 3, None))


def test_frames_of_a_clip_and_of_a_broken_one(clips: Path) -> None:
    corpus = Corpus.open(clips)
    assert clip_frames(corpus, 0).shape == (8, 32, 32, 3)
    assert clip_frames(corpus, 5).shape == (1, 8, 8, 3)
