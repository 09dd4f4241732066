"""Batches for training and for evaluation: plans from the pure order, filled by worker processes.

The main process walks the order and hands each worker a plan (which samples, which seeds); the worker returns a
finished batch (workers.py, which outlives its workers). Nothing depends on how many there are, and the position is
the step that was consumed, which every batch carries. A lost sample is counted, logged once with its place,
remembered as bad, and replaced by a pure draw from the same corpus, with the substitute's own captions and identity.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from data_pipeline.batches import Batch, Control, EvalBatches, TrainBatches
from data_pipeline.clips import Augment, ClipSource
from data_pipeline.config import DECODE_TIMEOUT, CorpusConfig, DataConfig, IdentityRule, Kind, RemoteConfig
from data_pipeline.frame_cache import CacheSpec, FrameCache
from data_pipeline.lost import BadSamples, check_bad_fraction
from data_pipeline.order import Order, OrderCorpus, check_world
from data_pipeline.preprocess import VisualPreprocess
from data_pipeline.remote import is_address
from data_pipeline.schema import LossReason, SampleError, Samples
from data_pipeline.shards import Corpus
from data_pipeline.workers import Pool

__all__ = ["Batch", "Control", "EvalLoader", "TrainLoader", "check_bad_fraction", "open_order"]

log = logging.getLogger(__name__)


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
        corpora = [_open(corpus, config.remote) for corpus in config.train]
        self.config = config
        self.order = open_order(config, seed, corpora)
        self.rank, self.world = rank, world
        self.start_step, self.steps = start_step, steps
        self._counters = _Counters()
        sources = [
            _source(
                corpus,
                item.kind,
                config.visual(),
                config.cache,
                config.cache_frames,
                number,
                config.identity,
                config.decode_timeout,
            )
            for number, (corpus, item) in enumerate(zip(corpora, config.train, strict=True))
        ]
        augments = [
            Augment(source.visual, config.crop_scale, config.crop_ratio, item.flip, config.augment)
            for source, item in zip(sources, config.train, strict=True)
        ]
        sizes = [len(corpus) for corpus in corpora]
        self._maker = TrainBatches(sources, augments, sizes, config.frames, config.caption)
        shares = [config.batch_of(item.kind) // world for item in config.train]
        frame_bytes = max(share * clip_bytes(source.visual) for share, source in zip(shares, sources, strict=True))
        self._pool = Pool(self._maker, config.workers, config.prefetch, frame_bytes, config.decode_timeout, pin_memory)

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
        for batch in self._pool.run(plans):
            self._counters.take(batch)
            for loss in batch.losses:
                self.bad.add(loss.corpus, loss.index, SampleError(loss.reason, loss.detail))
            yield batch
            if self.world == 1:  # after the caller had a look at what was lost
                check_bad_fraction(self.lost.total(), self.seen, self.config.max_bad_fraction)

    @property
    def bad(self) -> BadSamples:
        """The samples that are known to be bad: met and consumed on this rank, timed out, or from a checkpoint."""
        return self._maker.bad

    def state_dict(self) -> dict[str, Any]:
        """The counters and the bad samples; the position is the trainer's step."""
        lost = {reason.value: count for reason, count in self.lost.items()}
        return {"seen": self.seen, "lost": lost, "bad": self.bad.state()}

    def load_state_dict(self, state: dict[str, Any], count: bool = True) -> None:
        """Know the bad samples of a saved state, and go on counting from it (on one rank: the counts are of all)."""
        self.bad.load(state.get("bad", []))
        if count:
            self._counters.seen = int(state["seen"])
            self._counters.lost = Counter({LossReason(reason): int(n) for reason, n in state["lost"].items()})


class EvalLoader:
    """A corpus in its own order, middle frames, no augmentation; the last batch is short, lost clips are left out.

    `control` "shuffled" and "repeated" are the two views that take motion away (see EvalBatches). A rank takes a
    contiguous part of the corpus; `spans` asks for these samples (first, last + 1) instead, a batch each. `cache`
    names a folder for decoded frames, shared by the controls and later runs.
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
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        opened = Corpus.open(corpus) if isinstance(corpus, str | Path) else corpus
        self.corpus = opened
        start, stop = len(opened) * rank // world, len(opened) * (rank + 1) // world
        ours = [(first, min(first + batch, stop)) for first in range(start, stop, batch)]
        self.spans = ours if spans is None else spans
        source = _source(opened, kind, preprocess, cache, preprocess.frames)
        maker = EvalBatches(source, control, seed)
        self._pool = Pool(maker, workers, prefetch, batch * clip_bytes(source.visual), DECODE_TIMEOUT)
        self._counters = _Counters()

    @property
    def lost(self) -> Counter[LossReason]:
        """Clips that could not be used, by reason."""
        return self._counters.lost

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Batch]:
        self._counters = _Counters()
        spans = [(number, first, stop) for number, (first, stop) in enumerate(self.spans)]
        for batch in self._pool.run(spans):
            self._counters.take(batch)
            yield batch


def open_order(config: DataConfig, seed: int, corpora: list[Corpus] | None = None) -> Order:
    """The order of a run, from its config and the corpora it names; nothing but indexes and labels is read."""
    opened = corpora or [_open(corpus, config.remote) for corpus in config.train]
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
                epochs=item.epochs,
                shard_sizes=tuple(corpus.shard_sizes),
                window=item.shard_window,
            )
            for corpus, item in zip(opened, config.train, strict=True)
        ],
        seed,
        config.tail,
    )


def _open(item: CorpusConfig, remote: RemoteConfig) -> Corpus:
    corpus = Corpus.open(item.path, remote)
    found = corpus.read_meta(0).get("media", item.kind)
    if found != item.kind:
        raise UserError(
            f"{item.path} holds {found}s, and the config calls it a corpus of {item.kind}s.",
            f"Set kind: {found} there, or name the other folder.",
        )
    room = remote.cache_gb * 1e9
    if is_address(item.path) and remote.fetch == "shards" and item.shard_window is None and corpus.bytes > room:
        raise UserError(
            f"{item.path} holds {corpus.bytes / 1e9:.3g} GB and the cache {remote.cache_gb:g}: shuffled as a whole, "
            "its shards would be fetched again and again.",
            "Set shard_window (16, say) for it, data.remote.fetch=ranges, or a larger data.remote.cache_gb.",
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


def _source(
    corpus: Samples,
    kind: Kind,
    visual: VisualPreprocess,
    cache: str | None,
    cache_frames: int,
    number: int = 0,
    identity: IdentityRule = "sha256",
    time_limit: float = DECODE_TIMEOUT,
) -> ClipSource:
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
    return ClipSource(corpus, kind, visual, kept, number, identity, time_limit)


def clip_bytes(visual: VisualPreprocess) -> int:
    """What the frames of one clip take, uint8."""
    return 3 * visual.frames * visual.image_size**2
