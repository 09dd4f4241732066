"""queries.jsonl: a line a query, with the clip it was written for and the first clips that were found.

V clips, C captions (the queries), U different texts.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.files import write_whole
from retrieval_eval.embed import ClipList
from retrieval_eval.metrics import Ties, text_to_video_ranks


def write_listing(
    path: Path,
    clips: ClipList,
    captions: list[str],
    owner_C: NDArray[np.int64],
    text_of_C: NDArray[np.int64],
    dual_VU: NDArray[Any],
    reranked_VU: NDArray[Any] | None,
    listed: int,
    ties: Ties,
) -> None:
    """Write one JSON object a line: `query`, `truth` (key, index, caption) and, by scoring, `rank` and `found`."""
    scorings = {"dual": dual_VU} | ({} if reranked_VU is None else {"reranked": reranked_VU})
    ranks = {name: text_to_video_ranks(scores[:, text_of_C], owner_C, ties) for name, scores in scorings.items()}
    lines = []
    for number, caption in enumerate(captions):
        line: dict[str, Any] = {"query": caption, "truth": _clip(clips, int(owner_C[number]))}
        for name, scores_VU in scorings.items():
            scores_V = scores_VU[:, text_of_C[number]]
            best = np.argsort(-scores_V, kind="stable")[:listed]
            found = [_clip(clips, int(row)) | {"score": round(float(scores_V[row]), 6)} for row in best]
            line[name] = {"rank": float(ranks[name][number]), "found": found}
        lines.append(json.dumps(line, ensure_ascii=False))
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def _clip(clips: ClipList, row: int) -> dict[str, Any]:
    return {"key": clips.keys[row], "index": clips.index[row], "caption": clips.captions[row][0]}


def read_listing(path: Path) -> list[dict[str, Any]]:
    """The lines of a queries.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
