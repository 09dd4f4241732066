"""Batches for training and for evaluation: plans from the pure order, filled by worker processes.

The main process walks the order and hands each worker a plan (which samples, which seeds); the worker returns a
finished batch. Nothing depends on how many workers there are, and the position is the step that was consumed,
which every batch carries. A lost sample is counted, logged once with its place, and replaced by a pure draw from
the same corpus, with the substitute's own captions and identity.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from configs.errors import UserError
from data_pipeline.batches import Batch, Control, EvalBatches, TrainBatches
from data_pipeline.clips import Augment, ClipSource
from data_pipeline.config import CorpusConfig, DataConfig, Kind
from data_pipeline.frame_cache import CacheSpec, FrameCache
from data_pipeline.order import BatchPlan, Order, OrderCorpus, check_world
from data_pipeline.preprocess import VisualPreprocess
from data_pipeline.schema import LossReason, Samples
from data_pipeline.shards import Corpus

__all__ = ["Batch", "Control", "EvalLoader", "TrainLoader", "check_bad_fraction", "open_order"]

log = logging.getLogger(__name__)

FEWEST_FOR_FRACTION = 1000  # below this many samples, losses are held against this many


def check_bad_fraction(lost: int, seen: int, limit: float) -> None:
    """UserError (exit code 1) when `lost` of `seen` samples, summed over ranks, pass `limit`.

    Early on, `lost` is held against 1000 samples instead of the few seen, so that one bad clip in the first
    batch does not stop a run; a limit of 0 stops at the first.
    """
    if lost > limit * max(seen, FEWEST_FOR_FRACTION):
        raise UserError(
            f"{lost} of {seen} samples were lost, more than data.max_bad_fraction={limit:g} allows.",
            "Run `videomamba data verify` on the corpus, or raise the limit.",
            exit_code=1,
        )


class _Counters:
    """What was lost and seen so far on this rank, as consumed (not as prefetched)."""

    def __init__(self) -> None:
        self.lost: Counter[LossReason] = Counter()
        self.seen = 0
        self._told: set[str] = set()

    def take(self, batch: Batch) -> None:
        """Count a consumed batch, and log each lost sample the first time it is met."""
        self.seen += len(batch)
        for loss in batch.losses:
            self.lost[loss.reason] += 1
            if loss.location not in self._told:
                self._told.add(loss.location)
                log.warning("lost %s: %s (%s)", loss.location, loss.detail, loss.reason.value)


class TrainLoader:
    """The batches of this rank for the steps `start_step` to `steps` - 1, one Batch a step.

    Iterating starts the workers; leaving the loop ends them. `lost` and `seen` count what was consumed; with one
    rank the loader itself stops past `config.max_bad_fraction`, with more the trainer sums them over the ranks and
    calls `check_bad_fraction`. Raises UserError for a missing or unusable corpus and for a batch that does not
    divide by `world`, before anything is read.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        steps: int = 0,
        pin_memory: bool = False,
    ) -> None:
        for corpus in config.train:
            check_world(config.batch_of(corpus.kind), world)
        corpora = [_open(corpus) for corpus in config.train]
        self.config = config
        self.order = open_order(config, seed, corpora)
        self.rank, self.world = rank, world
        self.start_step, self.steps = start_step, steps
        self.pin_memory = pin_memory
        self._counters = _Counters()
        sources = [
            _source(corpus, item.kind, config.visual(), config.cache, config.cache_frames)
            for corpus, item in zip(corpora, config.train, strict=True)
        ]
        augments = [
            Augment(source.visual, config.crop_scale, config.crop_ratio, item.flip, config.augment)
            for source, item in zip(sources, config.train, strict=True)
        ]
        sizes = [len(corpus) for corpus in corpora]
        self._batches = TrainBatches(sources, augments, sizes, config.frames, config.caption)

    @property
    def lost(self) -> Counter[LossReason]:
        """Samples lost so far on this rank, by reason; a resumed run goes on counting."""
        return self._counters.lost

    @property
    def seen(self) -> int:
        """Clips delivered so far on this rank."""
        return self._counters.seen

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step)

    def __iter__(self) -> Iterator[Batch]:
        plans = (self.order.slice(step, self.rank, self.world) for step in range(self.start_step, self.steps))
        for batch in _run(self._batches, plans, self.config.workers, self.config.prefetch, self.pin_memory):
            self._counters.take(batch)
            if self.world == 1:
                check_bad_fraction(self.lost.total(), self.seen, self.config.max_bad_fraction)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The counters; the position is the trainer's step."""
        return {"seen": self.seen, "lost": {reason.value: count for reason, count in self.lost.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a saved state."""
        self._counters.seen = int(state["seen"])
        self._counters.lost = Counter({LossReason(reason): int(count) for reason, count in state["lost"].items()})


class EvalLoader:
    """A corpus in its own order, middle frames, no augmentation; the last batch is short, lost clips are left out.

    `control` "shuffled" and "repeated" are the two views that take motion away (see EvalBatches). A rank takes a
    contiguous part of the corpus. `cache` names a folder for decoded frames, shared by the controls and later runs.
    """

    def __init__(
        self,
        corpus: Samples | str | Path,
        preprocess: VisualPreprocess,
        batch: int,
        workers: int = 0,
        control: Control = "normal",
        kind: Kind = "video",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        cache: str | None = None,
        prefetch: int = 2,
    ) -> None:
        opened = Corpus.open(Path(corpus)) if isinstance(corpus, str | Path) else corpus
        self.corpus = opened
        self.batch, self.workers, self.prefetch = batch, workers, prefetch
        self.start, self.stop = len(opened) * rank // world, len(opened) * (rank + 1) // world
        source = _source(opened, kind, preprocess, cache, preprocess.frames)
        self._batches = EvalBatches(source, control, seed)
        self._counters = _Counters()

    @property
    def lost(self) -> Counter[LossReason]:
        """Clips that could not be used, by reason."""
        return self._counters.lost

    def __len__(self) -> int:
        return -(-(self.stop - self.start) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        self._counters = _Counters()
        spans = [
            (number, first, min(first + self.batch, self.stop))
            for number, first in enumerate(range(self.start, self.stop, self.batch))
        ]
        for batch in _run(self._batches, spans, self.workers, self.prefetch, pin_memory=False):
            self._counters.take(batch)
            yield batch


def open_order(config: DataConfig, seed: int, corpora: list[Corpus] | None = None) -> Order:
    """The order of a run, from its config and the corpora it names; nothing but indexes and labels is read."""
    opened = corpora or [_open(corpus) for corpus in config.train]
    return Order(
        [
            OrderCorpus(
                name=item.path,
                size=len(corpus),
                batch=config.batch_of(item.kind),
                kind=item.kind,
                weight=item.weight,
                labels=_labels(corpus, item.group_by),
                group_size=item.group_size,
                unlike=_labels(corpus, item.unlike_by),
            )
            for corpus, item in zip(opened, config.train, strict=True)
        ],
        seed,
        config.tail,
    )


def _open(item: CorpusConfig) -> Corpus:
    corpus = Corpus.open(Path(item.path))
    found = corpus.read_meta(0).get("media", item.kind)
    if found != item.kind:
        raise UserError(
            f"{item.path} holds {found}s, and the config calls it a corpus of {item.kind}s.",
            f"Set kind: {found} there, or name the other folder.",
        )
    return corpus


def _labels(corpus: Corpus, attributes: tuple[str, ...]) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """(size,) a number a sample, equal where all of the attributes are equal; None for no attribute."""
    if not attributes:
        return None
    columns = [
        np.unique([str(value) for value in corpus.attribute(name)], return_inverse=True)[1] for name in attributes
    ]
    return np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _source(corpus: Samples, kind: Kind, visual: VisualPreprocess, cache: str | None, cache_frames: int) -> ClipSource:
    if kind == "image":
        visual, cache_frames = visual.model_copy(update={"frames": 1}), 1
    kept = None
    if cache is not None:
        spec = CacheSpec(
            corpus_digest=corpus.digest,
            samples=len(corpus),
            frames=cache_frames,
            size=visual.image_size,
            resize=visual.resize,
            interpolation=visual.interpolation,
            first_seconds=visual.first_seconds,
        )
        kept = FrameCache(Path(cache), spec)
    return ClipSource(corpus, kind, visual, kept)


class _Plans(Sampler[Any]):
    def __init__(self, plans: Iterable[BatchPlan] | Iterable[tuple[int, int, int]]) -> None:
        self.plans = plans

    def __iter__(self) -> Iterator[Any]:
        return iter(self.plans)


def _run(
    batches: Dataset[Any],
    plans: Iterable[BatchPlan] | Iterable[tuple[int, int, int]],
    workers: int,
    prefetch: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """The batch of each plan, in order; UserErrors of the workers are raised here, and so is a worker's death."""
    loader: DataLoader[Any] = DataLoader(
        batches,
        batch_size=None,
        sampler=_Plans(plans),
        num_workers=workers,
        collate_fn=_same,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context=_workers_context() if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own, so that making a loader draws nothing from the run's
    )
    try:
        for result in loader:
            if isinstance(result, UserError):
                raise result
            yield result
    except (RuntimeError, ConnectionError, EOFError) as error:  # a batch half sent ends in one of the latter
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"A worker that reads data died ({(str(error) or type(error).__name__).splitlines()[0]}).",
            "Look for it in the system's log (memory?), lower data.workers, and resume.",
            exit_code=1,
        ) from error


def _same(item: Any) -> Any:
    return item


def _workers_context() -> BaseContext:
    """Workers start from a clean server process: a fork of this one would copy its threads' locks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "data_pipeline.loader"])
    return context


def _start_worker(_: int) -> None:
    """One thread, and no signals but the last: the main process decides when a run stops, and its end is ours."""
    torch.set_num_threads(1)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this process when the main one does, however that ends.

    torch's own watch looks for a new parent id, but a worker's parent is the server, which lives on with it.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
