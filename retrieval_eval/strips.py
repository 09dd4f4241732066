"""Queries for the report: some that were found and some that were not, with frames of what was found.

Chosen by rule and not by eye: of the misses first those where the first clip found shows what the right one
shows (equal values of the attributes `same`), so that time has to tell them apart; then other misses; then hits,
evenly spread over the queries.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from data_pipeline.clips import ClipSource
from data_pipeline.frames import middle_indices
from data_pipeline.preprocess import VisualPreprocess
from data_pipeline.schema import Kind, SampleError
from data_pipeline.shards import Corpus
from retrieval_eval.figures import frame_strip
from retrieval_eval.listing import read_listing
from retrieval_eval.report_data import QueryStrips, Strip

FRAMES = 8
NOTE = "The first clip found shows the same things: what happens over time has to tell them apart."


def query_strips(
    queries: Path,
    corpus_folder: Path,
    columns: dict[str, str],
    hits: int = 4,
    misses: int = 4,
    found: int = 3,
    same: Sequence[str] = ("look", "size"),
) -> tuple[QueryStrips, ...]:
    """Strips for `hits` + `misses` lines of a queries.jsonl; `columns` as in result.json names the scorings.

    The scoring shown is the last one (re-ranked where there is one).
    """
    corpus = Corpus.open(corpus_folder)
    scoring = list(columns)[-1]
    lines = [line for line in read_listing(queries) if scoring in line]
    chosen = choose(lines, scoring, hits, misses, _looks(corpus, same))
    return tuple(_strips(line, note, scoring, columns[scoring], corpus, found) for line, note in chosen)


def choose(
    lines: list[dict[str, Any]], scoring: str, hits: int, misses: int, looks: list[tuple[Any, ...]] | None
) -> list[tuple[dict[str, Any], str]]:
    """Lines to show, each with a note, as this module's head says; `looks` by place in the corpus."""

    def alike(line: dict[str, Any]) -> bool:
        return looks is not None and looks[line["truth"]["index"]] == looks[line[scoring]["found"][0]["index"]]

    right = [line for line in lines if line[scoring]["rank"] < 2]
    wrong = [line for line in lines if line[scoring]["rank"] >= 2]
    pairs = [line for line in wrong if alike(line)]
    others = [line for line in wrong if not alike(line)]
    shown = _spread(pairs, min(len(pairs), max(misses - 1, misses - len(others))))
    shown_others = _spread(others, misses - len(shown))
    return [
        *((line, NOTE) for line in shown),
        *((line, "") for line in shown_others),
        *((line, "") for line in _spread(right, hits)),
    ]


def _spread(lines: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    if not lines or count <= 0:
        return []
    return [lines[place] for place in middle_indices(len(lines), min(count, len(lines)))]


def _looks(corpus: Corpus, names: Sequence[str]) -> list[tuple[Any, ...]] | None:
    try:
        columns = [corpus.attribute(name) for name in names]
    except UserError:  # a corpus without these attributes has no such pairs
        return None
    if not columns or any(value is None for column in columns for value in column):
        return None
    return list(zip(*columns, strict=True))


def _strips(line: dict[str, Any], note: str, scoring: str, column: str, corpus: Corpus, found: int) -> QueryStrips:
    truth = line["truth"]
    return QueryStrips(
        text=line["query"],
        rank=line[scoring]["rank"],
        column=column,
        truth=_strip(corpus, truth, None, right=True),
        found=tuple(
            _strip(corpus, clip, clip["score"], right=clip["index"] == truth["index"])
            for clip in line[scoring]["found"][:found]
        ),
        note=note,
    )


def _strip(corpus: Corpus, clip: dict[str, Any], score: float | None, right: bool) -> Strip:
    image = frame_strip(clip_frames(corpus, clip["index"]))
    return Strip(key=clip["key"], caption=clip["caption"], image=image, score=score, right=right)


def clip_frames(corpus: Corpus, index: int, count: int = FRAMES) -> NDArray[np.uint8]:
    """`count` middle frames (T, H, W, 3) of a clip as it is; a grey frame for one that can no longer be read."""
    kind: Kind = "image" if corpus.read_meta(index).get("media") == "image" else "video"
    source = ClipSource(corpus, kind, VisualPreprocess(frames=count))
    try:
        frames_TCHW = source.frames(index, lambda n, _: middle_indices(n, min(n, count)))
    except SampleError:
        return np.full((1, 8, 8, 3), 128, dtype=np.uint8)
    frames: NDArray[np.uint8] = frames_TCHW.permute(0, 2, 3, 1).numpy()
    return frames
