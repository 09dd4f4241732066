"""Zero-shot retrieval of one checkpoint on one corpus, from shards to result.json.

`out` gets result.json (the numbers and every choice behind them), queries.jsonl (a line a query: what was found),
ranks.npz (every query's rank, to compare results by), row.md (to paste) and embeddings/ (see store.py). The files
appear whole; an evaluation that was killed goes on where it was.
"""

import json
import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.files import write_whole
from configs.loader import to_yaml
from retrieval_eval import results
from retrieval_eval.comparison import RESULT, write_ranks
from retrieval_eval.config import BenchmarkData, RetrievalConfig
from retrieval_eval.decoder import PairScorer
from retrieval_eval.embed import (
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
from retrieval_eval.index import FlatIndex
from retrieval_eval.listing import write_listing
from retrieval_eval.protocol import describe
from retrieval_eval.rerank import Candidates, rerank
from retrieval_eval.results import VIEWS, Scores
from retrieval_eval.store import Store
from retrieval_eval.summary import ROW, markdown
from retrieval_eval.testset import TestSet, answers, open_set

log = logging.getLogger(__name__)

QUERIES, EMBEDDINGS = "queries.jsonl", "embeddings"


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
    of_own = None if found.answers is None else (texts.text_of_C, owner_C)
    scores = {view: _score(config, encoders, store, texts, view, view in reranked, of_own, tell) for view in views}
    scored = time.perf_counter()
    made, ranks = results.tables(config, scores, texts.text_of_C, owner_C, answers(found, clips))
    result = {
        "protocol": describe(config, encoders, found, clips, texts, captions),
        "status": "partial" if clips.lost else "complete",
        "columns": results.columns(config),
        "results": made,
        "chance": results.chance(len(clips.keys), owner_C),
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
    write_ranks(Path(config.out), ranks)
    write_whole(Path(config.out) / ROW, markdown(result).encode())
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
        encoders = encoders.reading(config.data.max_tokens, config.data.clean, config.data.first_seconds)
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
    config: RetrievalConfig,
    encoders: Encoders,
    store: Store,
    texts: TextTable,
    view: View,
    again: bool,
    of_own: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    tell: Tell,
) -> Scores:
    """Scores of a view, re-ranked if `again`; `of_own` (text and clip of each caption) asks for those pairs alone."""
    _, clips_VE = read_clips(store, view)
    dual_VU = np.ascontiguousarray(FlatIndex(clips_VE).scores(texts.vectors_UE).T)
    temperature = float(encoders.model.temp.detach()) if config.dual_softmax else None
    if not again:
        return Scores(dual_VU, temperature=temperature)
    candidates = (
        Candidates.by_dual(clips_VE, texts.vectors_UE, config.rerank.top)
        if of_own is None
        else Candidates.own(*of_own, len(clips_VE))
    )
    made = rerank(
        dual_VU,
        candidates,
        read_tokens(store, view),
        read_states(store),
        PairScorer(encoders.model),
        config.rerank.pairs,
        encoders.device,
        encoders.precision,
        lambda done: tell("re-ranking", done, len(dual_VU)),
    )
    return Scores(dual_VU, made.t2v_VU, made.v2t_VU, made.pairs, temperature)
