"""The report's small parts: ticks, thinned curves, strips, and the rule that chooses queries."""

import base64
import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.shards import Corpus
from retrieval_eval.report.charts import Line, line_chart, thin, ticks
from retrieval_eval.report.data import LostClip, QueryStrips, ReportData, Strip
from retrieval_eval.report.figures import GAP, frame_strip
from retrieval_eval.report.histogram import bins, shares
from retrieval_eval.report.page import render
from retrieval_eval.report.similarity import blocks, read_similarity, write_similarity
from retrieval_eval.report.strips import ALIKE, BEST, WORST, choose, clip_frames


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
    chart = line_chart("t", [Line("<a>", [1, 2, 3, 4], [1.0, math.nan, 2.0, 1.0], marks=[3])], "step", "loss")
    assert chart.count('class="mark') == 1
    path = chart.split(' d="')[1].split('"')[0]
    assert path.count("M") == 2
    assert "&lt;a&gt; <b>1</b>" in chart
    assert "<a>" not in chart
    assert "nothing was logged" in line_chart("t", [], "step", "loss")


def test_a_strip_shows_evenly_spaced_frames_in_their_shape() -> None:
    frames = np.stack([np.full((20, 40, 3), 10 * t, np.uint8) for t in range(16)])
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(frame_strip(frames, height=30, columns=4)))))
    assert sheet.shape == (30, 4 * 60 + 3 * GAP, 3)
    shades = [int(sheet[15, 30 + place * (60 + GAP)].mean()) for place in range(4)]
    assert shades == pytest.approx([0, 50, 100, 150], abs=3)


def test_queries_are_chosen_by_rule() -> None:
    looks = [("red",), ("red",), ("blue",), ("green",)]

    def line(truth: int, found: int, rank: float, margin: float = 0.0) -> dict:
        scores = [{"index": found, "score": 1.0}, {"index": 9, "score": 1.0 - margin}]
        return {"query": f"{truth} {found}", "truth": {"index": truth}, "dual": {"rank": rank, "found": scores}}

    lines = [line(2, 3, 7), line(0, 1, 3), line(1, 1, 1, 0.1), line(2, 2, 1, 0.6), line(3, 0, 90), line(3, 3, 1.5, 0.3),
             line(3, 2, 2)]  # fmt: skip
    chosen = choose(lines, "dual", each=2, looks=looks)
    assert {group: [one["query"] for one in found] for group, found in chosen.items()} == {
        WORST: ["3 0", "2 3"],
        ALIKE: ["0 1"],
        BEST: ["2 2", "3 3"],
    }
    assert set(choose(lines, "dual", 2, None)) == {WORST, BEST}


def test_bars_count_every_query_once() -> None:
    ranks = np.random.default_rng(0).integers(1, 401, 1000).astype(float)
    ranks[:10] += 0.5  # ties
    ranks = np.minimum(ranks, 400)
    found = shares(ranks, 400)
    naive = [100 * np.mean([first <= int(rank) <= last for rank in ranks]) for first, last in bins(400)]
    assert found == pytest.approx(naive)
    assert sum(found) == pytest.approx(100)
    assert bins(400)[0] == (1, 1)
    assert bins(400)[-1] == (201, 400)
    assert bins(1) == [(1, 1)]


@pytest.mark.parametrize("clips, most", [(7, 3), (12, 4), (5, 9), (1, 4), (101, 10)])
def test_a_block_is_its_highest_score(clips: int, most: int) -> None:
    scores = np.random.default_rng(clips).normal(size=(clips, clips + 2)).astype(np.float32)
    text_of = np.random.default_rng(1).permutation(clips + 2)[:clips]
    found = blocks(scores, text_of, most)
    size = -(-clips // most)
    naive = [[max(scores[v, text_of[u]] for v in range(i, min(i + size, clips)) for u in range(j, min(j + size, clips)))
              for j in range(0, clips, size)] for i in range(0, clips, size)]  # fmt: skip
    assert len(found) <= most
    assert (found == np.array(naive)).all()


def test_a_large_matrix_keeps_its_diagonal_and_a_report_its_size(tmp_path: Path) -> None:
    """5,000 clips, and frames of noise, which no JPEG makes small."""
    generator = np.random.default_rng(0)
    clips = 5000
    scores = generator.normal(0, 0.1, (clips, clips)).astype(np.float32)
    scores[np.arange(clips), np.arange(clips)] += 0.5
    write_similarity(tmp_path / "s.png", scores, np.arange(clips))
    seen = read_similarity(tmp_path / "s.png")
    assert (seen.clips, seen.block, seen.side) == (5000, 10, 500)
    shades = np.asarray(Image.open(io.BytesIO(base64.b64decode(seen.image))))
    assert np.diagonal(shades).mean() > np.percentile(shades, 99)
    noise = frame_strip(generator.integers(0, 255, (8, 90, 160, 3)).astype(np.uint8))
    strip = Strip(key="k", caption="a caption of an ordinary length, twelve words or so, no more", image=noise)
    queries = tuple(QueryStrips(group="The worst", text="q", rank=9, column="dual", truth=strip, found=(strip,) * 3)
                    for _ in range(12))  # fmt: skip
    missing = tuple(LostClip(name=f"clip{i}", reason="missing_file", detail="x" * 80) for i in range(clips))
    page = render(ReportData(title="t", result={"missing": []}, queries=queries, similarity=seen, missing=missing))
    assert len(page) < 3_000_000, len(page)
    assert "And 4,800 more" in page


def test_frames_of_a_clip_and_of_a_broken_one(clips: Path) -> None:
    corpus = Corpus.open(clips)
    assert clip_frames(corpus, 0).shape == (8, 32, 32, 3)
    assert clip_frames(corpus, 5).shape == (1, 8, 8, 3)
