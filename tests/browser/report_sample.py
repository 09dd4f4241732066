"""A report with every part in it, and with texts that would break a page that does not escape them."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from retrieval_eval.report.data import (
    Departure,
    LossCurve,
    LostClip,
    QueryStrips,
    RankHistogram,
    ReportData,
    Similarity,
    SingleFrameModel,
    StepTime,
    Strip,
)
from retrieval_eval.report.figures import frame_strip
from retrieval_eval.report.histogram import shares
from retrieval_eval.report.similarity import read_similarity, write_similarity

MARKUP = "a <script>alert(1)</script> & \"quoted\" 'clip'"


def _numbers(r1: float) -> dict:
    interval = {name: [value - 4.8, value + 4.8] for name, value in (("R@1", r1), ("R@5", r1 + 25), ("R@10", r1 + 30))}
    return {
        "R@1": r1,
        "R@5": r1 + 25,
        "R@10": r1 + 30,
        "R@50": 99.0,
        "MedR": 1.5,
        "MeanR": 4.25,
        "n": 400,
        "gallery": 400,
        "interval_95": interval | {"MedR": [1.0, 2.0]},
    }


def _both(r1: float) -> dict:
    return {"t2v": _numbers(r1), "v2t": _numbers(r1 - 1.25)}


def result() -> dict:
    return {
        "columns": {"dual": "dual encoder", "reranked": "re-ranked, top 128"},
        "results": {
            "dual": _both(61.25),
            "reranked": _both(64.5),
            "controls": {"shuffled": {"dual": _both(50.0)}, "single": {"dual": _both(25.25)}},
        },
        "chance": {way: {"R@1": 0.25, "R@5": 1.25, "R@10": 2.5} for way in ("t2v", "v2t")},
        "status": "partial",
        "missing": [{"clip": MARKUP, "reason": "decode_error", "detail": "cut"}],
        "protocol": {
            "checkpoint": "step-0002400, sha256 0123456789abcdef" * 3,
            "captions": "all",
            "ties": "expected",
            "visual": {"frames": 8, "mean": [0.485, 0.456]},
            "rerank_top": 128,
            "bootstrap": {"samples": 1000},
            "versions": {"torch": "2.13.0"},
        },
    }


def _strip(seed: int, right: bool = False) -> Strip:
    frames = np.random.default_rng(seed).integers(0, 255, (1, 8, 8, 3)).repeat(8, 0).repeat(8, 1).repeat(8, 2)
    for step in range(8):
        frames[step, 24:40, step * 6 : step * 6 + 16] = (255, 40, 40)
    return Strip(
        key=f"test/clip-{seed:06d}",
        caption="a large red square drifts to the right over a striped background",
        image=frame_strip(frames.astype(np.uint8)),
        score=0.731 - seed / 50,
        right=right,
    )


RANKS = np.repeat([1.0, 2.5, 40.0], [260, 100, 40])


def matrix() -> Similarity:
    scores = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32) + 3 * np.eye(40, dtype=np.float32)
    with TemporaryDirectory() as folder:
        write_similarity(Path(folder) / "similarity.png", scores, np.arange(40))
        return read_similarity(Path(folder) / "similarity.png")


def sample() -> ReportData:
    queries = tuple(
        QueryStrips(
            text=text,
            rank=rank,
            column="re-ranked, top 128",
            truth=_strip(seed),
            found=tuple(_strip(seed + i, right=(i == 0 and rank == 1)) for i in range(3)),
            note=note,
            group="The worst" if rank > 1 else "The best",
        )
        for seed, (text, rank, note) in enumerate(
            [
                ("the big red square moves right", 1, ""),
                (MARKUP, 3, "Differs from the first found by motion alone."),
            ]
        )
    )
    curves = tuple(
        LossCurve(
            title=title,
            steps=tuple(range(10, 2010, 10)),
            note="Each point is a mean over 2 logged steps.",
            series={
                name: tuple(scale * math.exp(-i / 60) + 0.1 if i % 50 else None for i in range(200))
                for name, scale in series.items()
            },
        )
        for title, series in {
            "Stage 1 (masked, with the teacher)": {"alignment": 1.6},
            "Stage 2, masked": {"contrastive": 4.1, "matching": 0.7, "mlm": 5.2, "alignment": 0.9},
            "Stage 2, unmasked": {"contrastive": 2.1, "matching": 0.4, "mlm": 2.2},
        }.items()
    )
    return ReportData(
        title="VideoMamba demo: from raw clips to exported encoders",
        world="This is a rendered world: clips drawn by a program, not footage. Its numbers compare with one another "
        "within world version 1 only, and with no published table.",
        result=result(),
        facts={
            "World": "version 1, seed 7",
            "Training clips": "6,000 in 12 shards",
            "Model": "VideoMamba, 4 blocks of width 192",
            "Long path": "runs/" + "a" * 120,
        },
        steps=tuple(
            StepTime(name=name, seconds=60.5, budget_seconds=90, peak_gb=1.25)
            for name in ("render", "data build", "teacher")
        ),
        peak_gb=3.1,
        missing=(LostClip(name=MARKUP, reason="decode_error", detail="cut"),),
        histograms=tuple(
            RankHistogram(
                direction=way, gallery=400, bars={MARKUP: shares(RANKS, 400), "re-ranked": shares(RANKS, 400)}
            )
            for way in ("t2v", "v2t")
        ),
        similarity=matrix(),
        lost=(
            LostClip(
                name="raw/broken-0003-with-a-long-name.mp4",
                reason="decode_error",
                detail="moov atom not found " + MARKUP,
            ),
        ),
        curves=curves,
        queries=queries,
        single_frame=SingleFrameModel(
            results={"dual": _both(24.0)}, origin="world version 1, trained once, docs/log.md"
        ),
        departures=(
            Departure(
                what="Patch embedding",
                released="one 16 x 16 convolution",
                here="convolutional stem, 4 x 4 stride 4",
                why="learns the rendered world in minutes",
            ),
        ),
        export_checks={"Video encoder": "largest difference from the checkpoint 2.4e-07"},
    )
