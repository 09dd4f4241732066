"""Queries for the report, chosen by rule and not by eye: the worst, those that time has to tell apart, the best.

The worst have the highest ranks; the best are found first with the widest margin between the first and the second
score. Between them stand misses whose first clip found shows what the right one shows (equal values of the attributes
`same`), in corpora that say what their clips show. Equal values keep the queries' order.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from data_pipeline.clips import ClipSource
from data_pipeline.frames import middle_of
from data_pipeline.preprocess import VisualPreprocess
from data_pipeline.schema import Kind, SampleError, Samples
from data_pipeline.shards import Corpus
from retrieval_eval.listing import read_listing
from retrieval_eval.report.data import QueryStrips, Strip
from retrieval_eval.report.figures import frame_strip

FRAMES = 8
WORST, ALIKE, BEST = "The worst", "Told apart by time alone", "The best"
Line = dict[str, Any]


def query_strips(
    queries: Path,
    corpus: Samples,
    columns: dict[str, str],
    first_seconds: float | None = None,
    each: int = 4,
    found: int = 3,
    same: Sequence[str] = ("look", "size"),
) -> tuple[QueryStrips, ...]:
    """Strips for at most `each` lines of every group of a queries.jsonl; `columns` as in result.json.

    The scoring shown is the last one that is listed (re-ranked where there is one). Of a clip no more is shown than
    the evaluation saw, its `first_seconds`.
    """
    lines = read_listing(queries)
    scoring = next((name for name in reversed(list(columns)) if lines and name in lines[0]), None)
    if scoring is None:
        return ()
    looks = _looks(corpus, same) if isinstance(corpus, Corpus) else None
    show = _Shower(corpus, first_seconds)
    return tuple(
        QueryStrips(
            group=group,
            text=line["query"],
            rank=line[scoring]["rank"],
            column=columns[scoring],
            truth=show.strip(line["truth"], None, right=True),
            found=tuple(
                show.strip(clip, clip["score"], right=clip["index"] == line["truth"]["index"])
                for clip in line[scoring]["found"][:found]
            ),
        )
        for group, chosen in choose(lines, scoring, each, looks).items()
        for line in chosen
    )


def choose(lines: list[Line], scoring: str, each: int, looks: list[tuple[Any, ...]] | None) -> dict[str, list[Line]]:
    """Lines to show by group, as this module's head says; `looks` by place in the corpus."""

    def alike(line: Line) -> bool:
        return looks is not None and looks[line["truth"]["index"]] == looks[line[scoring]["found"][0]["index"]]

    def margin(line: Line) -> float:
        scores = [clip["score"] for clip in line[scoring]["found"][:2]]
        return float(scores[0] - scores[1]) if len(scores) > 1 else 0.0

    wrong = sorted((line for line in lines if line[scoring]["rank"] >= 2), key=lambda line: -line[scoring]["rank"])
    right = sorted((line for line in lines if line[scoring]["rank"] < 2), key=margin, reverse=True)
    worst, others = wrong[:each], wrong[each:]
    groups = {WORST: worst, ALIKE: [line for line in others if alike(line)][:each], BEST: right[:each]}
    return {group: chosen for group, chosen in groups.items() if chosen}


def _looks(corpus: Corpus, names: Sequence[str]) -> list[tuple[Any, ...]] | None:
    try:
        columns = [corpus.attribute(name) for name in names]
    except UserError:  # a corpus without these attributes has no such pairs
        return None
    if not columns or any(value is None for column in columns for value in column):
        return None
    return list(zip(*columns, strict=True))


class _Shower:
    """Clips of a corpus as strips, each decoded once."""

    def __init__(self, corpus: Samples, first_seconds: float | None) -> None:
        self.corpus, self.first_seconds = corpus, first_seconds
        self._made: dict[int, str] = {}

    def strip(self, clip: dict[str, Any], score: float | None, right: bool) -> Strip:
        place = clip["index"]
        if place not in self._made:
            self._made[place] = frame_strip(clip_frames(self.corpus, place, first_seconds=self.first_seconds))
        return Strip(key=clip["key"], caption=clip["caption"], image=self._made[place], score=score, right=right)


def clip_frames(
    corpus: Samples, index: int, count: int = FRAMES, first_seconds: float | None = None
) -> NDArray[np.uint8]:
    """`count` middle frames (T, H, W, 3) of a clip as it is; a grey frame for one that can no longer be read."""
    try:
        kind: Kind = "image" if corpus.read_meta(index).get("media") == "image" else "video"
        source = ClipSource(corpus, kind, VisualPreprocess(frames=count))
        frames_TCHW = source.frames(index, lambda n, seconds: middle_of(n, seconds, min(n, count), first_seconds))
    except SampleError:
        return np.full((1, 8, 8, 3), 128, dtype=np.uint8)
    frames: NDArray[np.uint8] = frames_TCHW.permute(0, 2, 3, 1).numpy()
    return frames
