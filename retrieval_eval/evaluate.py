"""Zero-shot retrieval of one checkpoint on one corpus, from shards to result.json.

`out` gets result.json (the numbers and every choice behind them), queries.jsonl (a line a query: what was found),
ranks.npz (every query's rank, to compare results by), row.md (to paste), similarity.png (every dual score),
report.html (to look at) and embeddings/ (see store.py).

The work has three stages: embedding and re-ranking, which write pieces that any number of processes share, and
measuring, which reads them. Each takes what it finds, so an evaluation that was killed goes on where it was.
"""

import json
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
from retrieval_eval.config import BenchmarkData, RetrievalConfig, Stage
from retrieval_eval.decoder import PairScorer
from retrieval_eval.embed import EVERYTHING, Tell, View, embed_clips, identity_of, quiet, read_clips, read_tokens
from retrieval_eval.encoders import Encoders
from retrieval_eval.index import FlatIndex, Vectors
from retrieval_eval.listing import write_listing
from retrieval_eval.matches import Reranking
from retrieval_eval.protocol import describe
from retrieval_eval.ranks import Crew
from retrieval_eval.report.evaluation import write_evaluation_report
from retrieval_eval.report.similarity import FILE as SIMILARITY
from retrieval_eval.report.similarity import write_similarity
from retrieval_eval.rerank import Candidates, joined, match_clip
from retrieval_eval.results import VIEWS, Scores
from retrieval_eval.store import Store
from retrieval_eval.summary import ROW, markdown
from retrieval_eval.testset import TestSet, answers, open_set
from retrieval_eval.texts import TextPlan, embed_texts, read_states, read_texts

QUERIES, EMBEDDINGS = "queries.jsonl", "embeddings"
ALONE = Crew(EVERYTHING)


def evaluate(config: RetrievalConfig, fresh: bool = False, tell: Tell = quiet) -> dict[str, Any]:
    """Run the evaluation, write its files into `config.out`, and return what result.json holds.

    `fresh` removes embeddings that are there. Raises UserError for a folder that is no corpus or no stage-2
    checkpoint, and for embeddings of another checkpoint, corpus or choice in `out`.
    """
    result = run_stages(config, fresh, tell)
    assert result is not None  # one process measures
    return result


def run_stages(
    config: RetrievalConfig,
    fresh: bool = False,
    tell: Tell = quiet,
    only: Stage | None = None,
    crew: Crew = ALONE,
) -> dict[str, Any] | None:
    """`evaluate` among others: `crew` says which share of the pieces is this process's, `only` stops after a stage.

    Returns None where nothing was measured: after `only` a stage, and on every rank but the first.
    """
    began = time.perf_counter()
    work = _Work(config, fresh, tell, crew)
    if only != "rerank":
        work.embed()
        crew.wait()
    embedded = time.perf_counter()
    if only == "embed":
        return None
    if work.reranked:
        work.rerank()
        crew.wait()
    if only == "rerank" or not crew.first:
        return None
    return work.measure({"embed": embedded - began, "rerank": time.perf_counter() - embedded})


class _Work:
    """One evaluation on this process: what it reads, and its stages."""

    def __init__(self, config: RetrievalConfig, fresh: bool, tell: Tell, crew: Crew) -> None:
        self.config, self.tell, self.part = config, tell, crew.part
        self.found, self.encoders = _open(config)
        self.views = _views(config, self.found)
        top = config.rerank.top
        self.reranked: list[View] = [] if not top else [*self.views] if config.rerank.controls else ["clips"]
        self.scorer = PairScorer(self.encoders.model) if top else None
        identity = identity_of(self.encoders, self.found.corpus, config.seed, config.chunk)
        folder = Path(config.out) / EMBEDDINGS
        if crew.first:
            self.store = Store(folder, identity, fresh)
            if self.part.index == 1:
                write_whole(Path(config.out) / "config.yaml", to_yaml(config).encode())
        crew.wait()
        if not crew.first:
            self.store = Store(folder, identity)
        self.plan = TextPlan(self.encoders, self.found.all_captions())

    def embed(self) -> None:
        """The chunks of clips and of texts that are this process's."""
        config = self.config
        embed_clips(
            self.encoders, self.found.corpus, self.store, self.views, self.reranked, config.batch,
            config.data.workers, config.seed, self.tell, self.found.kind, self.part,
        )  # fmt: skip
        embed_texts(
            self.encoders, self.plan, self.store, bool(config.rerank.top), config.text_batch, self.tell, self.part
        )

    def read(self) -> None:
        """What all processes embedded: clips, captions and texts."""
        self.clips, _ = read_clips(self.store)
        self.captions, self.owner_C = self.clips.queries(self.found.captions)
        self.texts = read_texts(self.plan, self.captions, self.store)

    def rerank(self) -> None:
        """The chunks of match scores that are this process's, view by view."""
        self.read()
        states = read_states(self.plan, self.texts, self.store)
        for view in self.reranked:
            tokens = read_tokens(self.store, view)

            def match(clip: int, texts_M: NDArray[np.int64], tokens: Any = tokens) -> Vectors:
                assert self.scorer is not None
                return match_clip(
                    tokens, clip, texts_M, states, self.scorer, self.config.rerank.words, self.encoders.device,
                    self.encoders.precision,
                )  # fmt: skip

            self.reranking(view).score(match, lambda done, total: self.tell("re-ranking", done, total), self.part)

    def reranking(self, view: View) -> Reranking:
        """Which pairs of a view are re-ranked: of multiple choice each clip's own, else the first by dual score."""
        _, clips_VE = read_clips(self.store, view)
        own = self.found.answers is not None
        top, text_of_C, owner_C = self.config.rerank.top, self.texts.text_of_C, self.owner_C

        def make() -> Candidates:
            if own:
                return Candidates.own(text_of_C, owner_C, len(clips_VE))
            return Candidates.by_dual(clips_VE, self.texts.vectors_UE, top)

        choices = {"top": None if own else top, "texts": self.texts.texts, "clips": self.clips.index}
        return Reranking.plan(self.store, view, choices, make, (len(clips_VE), len(self.texts.texts)))

    def score(self, view: View) -> Scores:
        """Scores of a view, re-ranked where that was asked for."""
        _, clips_VE = read_clips(self.store, view)
        dual_VU = np.ascontiguousarray(FlatIndex(clips_VE).scores(self.texts.vectors_UE).T)
        temperature = float(self.encoders.model.temp.detach()) if self.config.dual_softmax else None
        if view not in self.reranked:
            return Scores(dual_VU, temperature=temperature)
        asked = self.reranking(view)
        made = joined(dual_VU, asked.read(), asked.t2v_VU, asked.v2t_VU)
        return Scores(dual_VU, made.t2v_VU, made.v2t_VU, made.pairs, temperature)

    def measure(self, seconds: dict[str, float]) -> dict[str, Any]:
        """From the pieces to result.json and what stands beside it."""
        began, config, out = time.perf_counter(), self.config, Path(self.config.out)
        self.read()
        clips, texts = self.clips, self.texts
        scores = {view: self.score(view) for view in self.views}
        right = answers(self.found, clips)
        made, ranks = results.tables(config, scores, texts.text_of_C, self.owner_C, right)
        main = scores["clips"]
        write_listing(out / QUERIES, clips, self.captions, self.owner_C, texts.text_of_C, main.dual_VU, main.t2v_VU,
                      config.listed, config.ties)  # fmt: skip
        write_ranks(out, ranks)
        seconds |= {"measure": time.perf_counter() - began}
        result = {
            "protocol": describe(config, self.encoders, self.found, clips, texts, self.captions),
            "status": "partial" if clips.lost else "complete",
            "columns": results.columns(config),
            "results": made,
            "chance": results.chance(len(clips.keys), self.owner_C),
            "missing": clips.lost,
            "seconds": {stage: round(spent, 2) for stage, spent in seconds.items()},
            "pairs_reranked": sum(one.pairs for one in scores.values()),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_whole(out / ROW, markdown(result).encode())
        write_whole(out / RESULT, json.dumps(result, indent=2, ensure_ascii=False).encode())
        first_V = np.searchsorted(self.owner_C, np.arange(len(clips.keys)))
        write_similarity(out / SIMILARITY, main.dual_VU, texts.text_of_C[first_V])
        write_evaluation_report(out, self.found.corpus)
        self.store.sweep()
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
