"""From the folder of an evaluation to its page; the demo's page shows the same parts among others of its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.schema import Samples
from retrieval_eval.comparison import RANKS, RESULT
from retrieval_eval.report.data import LostClip, RankHistogram, ReportData
from retrieval_eval.report.histogram import shares
from retrieval_eval.report.page import write_report
from retrieval_eval.report.similarity import FILE, read_similarity
from retrieval_eval.report.strips import query_strips
from retrieval_eval.summary import REPORT

QUERIES = "queries.jsonl"


def write_evaluation_report(folder: Path, corpus: Samples) -> Path:
    """Write report.html beside the result.json in `folder`; frames come from `corpus`."""
    result = json.loads((folder / RESULT).read_text())
    protocol = result["protocol"]
    split = protocol.get("split") or Path(str(protocol.get("corpus", ""))).name
    data = ReportData(
        title=f"Zero-shot retrieval: {split}",
        result=result,
        world=str(protocol.get("note", "")),
        **evaluation_parts(folder, corpus, result),
    )
    return write_report(data, folder / REPORT)


def evaluation_parts(folder: Path, corpus: Samples, result: dict[str, Any]) -> dict[str, Any]:
    """The fields of ReportData that come from an evaluation's other files; what is not there is left out."""
    first_seconds = result["protocol"].get("visual", {}).get("first_seconds")
    listed = folder / QUERIES
    queries = query_strips(listed, corpus, result["columns"], first_seconds) if listed.is_file() else ()
    missing = (LostClip(name=one["clip"], reason=one["reason"], detail=one["detail"]) for one in result["missing"])
    return {
        "queries": queries,
        "histograms": tuple(_histograms(folder / RANKS, result)),
        "similarity": read_similarity(folder / FILE),
        "missing": tuple(missing),
    }


def _histograms(path: Path, result: dict[str, Any]) -> list[RankHistogram]:
    if not path.is_file():
        return []
    found = []
    with np.load(path) as ranks:
        for way in ("t2v", "v2t"):
            names = {scoring: name for scoring, name in result["columns"].items() if f"{scoring}.{way}" in ranks}
            if names:
                gallery = int(result["results"][next(iter(names))][way]["gallery"])
                bars = {name: shares(ranks[f"{scoring}.{way}"], gallery) for scoring, name in names.items()}
                found.append(RankHistogram(direction=way, gallery=gallery, bars=bars))
    return found
