"""Zero-shot retrieval of a model in training: the Evaluator of pretrain/evaluation.py.

Every rank embeds its part of the clips and of the texts; vectors are gathered, and all ranks measure the same matrix.
The dual encoder alone: re-ranking and the controls take longer than a run has time for, and `videomamba eval` gives
them for any checkpoint. The numbers are those of its dual-encoder column.

V clips, C captions, U different texts, E joint width.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import UserError
from configs.loader import load_config
from data_pipeline.loader import EvalLoader
from pretrain import distributed
from pretrain.checkpoint import Meta, versions
from pretrain.config import PretrainConfig
from pretrain.evaluation import Agreed
from pretrain.stage2 import Stage2
from pretrain.tasks import Task
from retrieval_eval.config import BenchmarkData, RetrievalConfig
from retrieval_eval.encoders import Encoders
from retrieval_eval.metrics import both_directions
from retrieval_eval.testset import TestSet, open_set

TOLD = ("R@1", "R@5", "R@10", "MedR", "MeanR")


def retrieval_of(config: PretrainConfig) -> RetrievalConfig:
    """The retrieval config that a run names for its evaluations, its checkpoint being the run itself."""
    assert config.evaluate is not None  # asked by the callers
    given = config.evaluate
    return load_config(
        given.config, RetrievalConfig, [f"checkpoint={config.out}", f"out={config.out}", *given.overrides]
    )


class InLoop:
    """Retrieval of the model that a task trains, on the test set that its run names."""

    def __init__(self, config: PretrainConfig, task: Task) -> None:
        if not isinstance(task, Stage2) or task.preprocess.text is None:
            raise UserError("An evaluation by retrieval needs a text tower.", "Use task=stage2, or set evaluate=null.")
        self.config = retrieval_of(config)
        self.found: TestSet = open_set(self.config.data)
        meta = Meta(
            step=0, task=config.task, config="", ranks=1, zero_stage=config.zero_stage, model=task.meta,
            versions=versions(),
        )  # fmt: skip
        visual, text = task.preprocess.visual, task.preprocess.text
        place, precision = task.device, self.config.precision
        encoders = Encoders(task.joint, visual, text, task.tokenizer, Path(config.out), meta, place, precision)
        if isinstance(self.config.data, BenchmarkData):
            data = self.config.data
            encoders = encoders.reading(data.max_tokens, data.clean, data.first_seconds)
        self.encoders = encoders

    def __call__(self, stopping: Agreed) -> dict[str, float] | None:
        """Recalls in percent and ranks, both ways; None where a wish to stop came."""
        clips = self._clips(stopping)
        if clips is None:
            return None
        vectors_VE, captions_V = clips
        if not captions_V:
            raise UserError(
                f"Not one clip of {self.found.corpus.folder} can be read.", "Mend it, or set evaluate=null."
            )
        chosen = [captions if self.found.captions == "all" else captions[:1] for captions in captions_V]
        owner_C = np.repeat(np.arange(len(chosen)), [len(captions) for captions in chosen]).astype(np.int64)
        texts = self._texts([caption for captions in chosen for caption in captions], stopping)
        if texts is None:
            return None
        scores_VC = vectors_VE @ texts.T
        made, _ = both_directions(scores_VC, scores_VC, owner_C, self.config.ties, samples=0)
        return {f"{way}_{name}": float(made[way][name]) for way in ("t2v", "v2t") for name in TOLD}

    def _clips(self, stopping: Agreed) -> tuple[NDArray[np.float32], list[tuple[str, ...]]] | None:
        """Vectors (V, E) of all clips that can be read and their captions, in the corpus's order."""
        config, rank, ranks = self.config, distributed.rank(), distributed.world_size()
        loader = EvalLoader(
            self.found.corpus, self.encoders.visual, config.batch, config.data.workers, kind=self.found.kind,
            rank=rank, world=ranks,
        )  # fmt: skip
        most = -(-len(self.found.corpus) // ranks)
        vectors: list[Tensor] = []
        captions: list[tuple[str, ...]] = []
        read = iter(loader)
        for _ in range(-(-most // config.batch)):  # as often on every rank, so that all agree
            if stopping():
                return None
            batch = next(read, None)
            if batch is not None and len(batch):
                vectors.append(self.encoders.clips(batch.frames).vectors_BE.float().cpu())
                captions.extend(batch.all_captions)
        found = distributed.gather_objects((_stacked(vectors), captions))
        return np.concatenate([part for part, _ in found if len(part)] or [np.zeros((0, 1), np.float32)]), [
            one for _, said in found for one in said
        ]

    def _texts(self, captions: list[str], stopping: Agreed) -> NDArray[np.float32] | None:
        """Unit vectors (C, E) of the captions; equal ones are encoded once, each on one rank."""
        cleaned = [self.encoders.text.clean_caption(caption) for caption in captions]
        texts, text_of_C = np.unique(np.array(cleaned, dtype=object).astype(str), return_inverse=True)
        rank, ranks = distributed.rank(), distributed.world_size()
        start, stop = len(texts) * rank // ranks, len(texts) * (rank + 1) // ranks
        own, most, size = texts[start:stop].tolist(), -(-len(texts) // ranks), self.config.text_batch
        vectors: list[Tensor] = []
        for first in range(0, most, size):
            if stopping():
                return None
            if part := own[first : first + size]:
                vectors.append(self.encoders.texts(part).vectors_BE.float().cpu())
        found = distributed.gather_objects(_stacked(vectors))
        made: NDArray[np.float32] = np.concatenate([part for part in found if len(part)])[text_of_C.reshape(-1)]
        return made


def _stacked(vectors: list[Tensor]) -> NDArray[Any]:
    return torch.cat(vectors).numpy() if vectors else np.zeros((0, 1), np.float32)


def lines_of(config: PretrainConfig) -> Iterator[str]:
    """What a run's evaluations will read, in lines; UserError where they could not begin."""
    found = open_set(retrieval_of(config).data)
    assert config.evaluate is not None  # asked by the caller
    yield f"evaluation every {config.evaluate.every_steps} steps: {found.lines()[0]}"
