"""Zero-shot retrieval of one checkpoint on one corpus, from shards to result.json.

`out` gets result.json (the numbers and every choice behind them), queries.jsonl (a line a query: what was found)
and embeddings/ (see store.py). The files appear whole; an evaluation that was killed goes on where it was.
"""

import json
import logging
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.loader import to_yaml
from data_pipeline.files import write_whole
from retrieval_eval import metrics
from retrieval_eval.config import BenchmarkData, Control, RetrievalConfig
from retrieval_eval.decoder import PairScorer
from retrieval_eval.embed import (
    ClipList,
    Tell,
    TextTable,
    View,
    embed_clips,
    embed_texts,
    identity_of,
    quiet,
    read_clips,
    read_states,
    read_tokens,
)
from retrieval_eval.encoders import Encoders
from retrieval_eval.index import FlatIndex, Vectors
from retrieval_eval.listing import write_listing
from retrieval_eval.rerank import Candidates, rerank
from retrieval_eval.store import Store
from retrieval_eval.testset import TestSet, open_set

log = logging.getLogger(__name__)

RESULT, QUERIES, EMBEDDINGS = "result.json", "queries.jsonl", "embeddings"
VIEWS: dict[Control, View] = {"shuffled": "clips-shuffled", "single": "clips-single"}


class Scores(NamedTuple):
    """Scores (V, U) of clips and different texts: of the dual encoder, and after re-ranking, both ways."""

    dual_VU: Vectors
    t2v_VU: NDArray[np.float64] | None = None
    v2t_VU: NDArray[np.float64] | None = None
    pairs: int = 0


def evaluate(config: RetrievalConfig, fresh: bool = False, tell: Tell = quiet) -> dict[str, Any]:
    """Run the evaluation, write its files into `config.out`, and return what result.json holds.

    `fresh` removes embeddings that are there. Raises UserError for a folder that is no corpus or no stage-2
    checkpoint, and for embeddings of another checkpoint, corpus or choice in `out`.
    """
    began = time.perf_counter()
    found, encoders = _open(config)
    views = _views(config, found)
    store = Store(Path(config.out) / EMBEDDINGS, identity_of(encoders, found.corpus, config.seed), fresh)
    write_whole(Path(config.out) / "config.yaml", to_yaml(config).encode())
    top = config.rerank.top
    reranked: list[View] = [] if not top else [*views] if config.rerank.controls else ["clips"]
    embed_clips(
        encoders, found.corpus, store, views, reranked, config.batch, config.data.workers, config.seed, tell, found.kind
    )
    clips, _ = read_clips(store)
    captions, owner_C = clips.queries(found.captions)
    texts = embed_texts(encoders, captions, store, bool(top), config.text_batch, tell)
    embedded = time.perf_counter()
    scores = {view: _score(config, encoders, store, texts, view, view in reranked, tell) for view in views}
    scored = time.perf_counter()
    result = {
        "protocol": _protocol(config, encoders, found, clips, texts, len(captions)),
        "status": "partial" if clips.lost else "complete",
        "columns": _columns(config),
        "results": _tables(config, scores, texts, owner_C),
        "chance": _chance(len(clips.keys), owner_C),
        "missing": clips.lost,
        "seconds": {
            "embed": round(embedded - began, 2),
            "score": round(scored - embedded, 2),
            "measure": round(time.perf_counter() - scored, 2),
        },
        "pairs_reranked": sum(one.pairs for one in scores.values()),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    main = scores["clips"]
    write_listing(Path(config.out) / QUERIES, clips, captions, owner_C, texts.text_of_C, main.dual_VU, main.t2v_VU,
                  config.listed, config.ties)  # fmt: skip
    write_whole(Path(config.out) / RESULT, json.dumps(result, indent=2, ensure_ascii=False).encode())
    return result


def check(config: RetrievalConfig) -> list[str]:
    """What an evaluation would read, in lines; raises UserError where it could not begin."""
    found, encoders = _open(config)
    _views(config, found)
    if config.rerank.top:
        PairScorer(encoders.model)
    return [
        f"checkpoint {encoders.folder}, step {encoders.meta.step}, digest {encoders.digest}",
        *found.lines(),
    ]


def _open(config: RetrievalConfig) -> tuple[TestSet, Encoders]:
    if config.threads is not None:
        import torch

        torch.set_num_threads(config.threads)
    found = open_set(config.data)
    encoders = Encoders.load(config.checkpoint, config.device, config.precision)
    if isinstance(config.data, BenchmarkData):
        encoders = encoders.reading(config.data.max_tokens, config.data.clean)
    if config.rerank.top:
        PairScorer(encoders.model)  # refuses a model that cannot, before the work
    return found, encoders


def _views(config: RetrievalConfig, found: TestSet) -> list[View]:
    if config.controls and found.kind == "image":
        raise UserError(
            f"{found.corpus.folder} holds images, and the controls ({', '.join(config.controls)}) change frames of "
            "clips.",
            "Give controls=[].",
        )
    return ["clips", *(VIEWS[control] for control in config.controls)]


def _score(
    config: RetrievalConfig, encoders: Encoders, store: Store, texts: TextTable, view: View, again: bool, tell: Tell
) -> Scores:
    _, clips_VE = read_clips(store, view)
    dual_VU = np.ascontiguousarray(FlatIndex(clips_VE).scores(texts.vectors_UE).T)
    if not again:
        return Scores(dual_VU)
    made = rerank(
        dual_VU,
        Candidates.by_dual(clips_VE, texts.vectors_UE, config.rerank.top),
        read_tokens(store, view),
        read_states(store),
        PairScorer(encoders.model),
        config.rerank.pairs,
        encoders.device,
        encoders.precision,
        lambda done: tell("re-ranking", done, len(dual_VU)),
    )
    return Scores(dual_VU, made.t2v_VU, made.v2t_VU, made.pairs)


def _columns(config: RetrievalConfig) -> dict[str, str]:
    """Every scoring by the name that stands beside its numbers."""
    named = {"dual": "dual encoder"}
    return named | ({"reranked": f"re-ranked, top {config.rerank.top}"} if config.rerank.top else {})


def _tables(
    config: RetrievalConfig, scores: dict[View, Scores], texts: TextTable, owner_C: NDArray[np.int64]
) -> dict[str, Any]:
    """`{"dual": {"t2v": ..., "v2t": ...}, "reranked": ..., "controls": {"shuffled": {"dual": ...}}}`."""
    tables = {view: _table(config, one, texts.text_of_C, owner_C) for view, one in scores.items()}
    controls = {control: tables[VIEWS[control]] for control in config.controls}
    return {**tables["clips"], "controls": controls}


def _table(
    config: RetrievalConfig, scores: Scores, text_of_C: NDArray[np.int64], owner_C: NDArray[np.int64]
) -> dict[str, Any]:
    table: dict[str, Any] = {}
    matrices: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {"dual": (scores.dual_VU, scores.dual_VU)}
    if scores.t2v_VU is not None and scores.v2t_VU is not None:
        matrices["reranked"] = (scores.t2v_VU, scores.v2t_VU)
    for scoring, (t2v_VU, v2t_VU) in matrices.items():
        table[scoring], _ = metrics.both_directions(
            t2v_VU[:, text_of_C], v2t_VU[:, text_of_C], owner_C, config.ties, config.bootstrap, config.seed
        )
    return table


def _chance(videos: int, owner_C: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    return {
        "t2v": metrics.chance(1, videos),
        "v2t": metrics.chance(len(owner_C) / videos, len(owner_C)),
    }


def _protocol(
    config: RetrievalConfig, encoders: Encoders, found: TestSet, clips: ClipList, texts: TextTable, captions: int
) -> dict[str, Any]:
    """Every choice that changes a number, and the hashes of what went in."""
    visual, text = encoders.visual, encoders.text
    return {
        "checkpoint": str(encoders.folder),
        "checkpoint_digest": encoders.digest,
        "checkpoint_step": encoders.meta.step,
        **found.protocol,
        "clips": len(clips.keys),
        "captions": captions,
        "different_texts": len(texts.texts),
        "caption_policy": found.captions,
        "frames": visual.frames,
        "frame_rule": "the middle frame of each of as many equal intervals",
        "visual": visual.model_dump(mode="json"),
        "text": text.model_dump(mode="json"),
        "texts_cut_at_max_tokens": texts.cut,
        "dual_score": "mean over frames of cosines, as the inner product of the text's unit vector with the mean of "
        "the clip's unit frame vectors (FAISS IndexFlatIP)",
        "rerank_top": config.rerank.top,
        "rerank_score": "match logit of class 1 in float32 for the first of each query by the dual score, both ways; "
        "the rest keeps its dual order behind them",
        "ties": config.ties,
        "bootstrap": {"samples": config.bootstrap, "seed": config.seed, "level": 0.95, "over": "queries"},
        "controls": list(config.controls),
        "controls_seed": config.seed,
        "precision": encoders.precision,
        "device": str(encoders.device),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in ("videomamba", "torch", "faiss-cpu", "faiss-gpu-cu12", "numpy", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # one of the two faiss, or a checkout that is not installed
            continue
    return found
