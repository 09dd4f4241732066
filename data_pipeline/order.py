"""The order of a run as a pure function: (seed, step) -> the global batch, whatever the ranks and workers.

A step takes one batch of one corpus. Which corpus: the steps are dealt out by weight, evenly interleaved, and
how many of the first s steps went to a corpus is a formula (so the position at step 1,000,000 costs nothing).
Which samples: each corpus has its own epochs, an epoch is a permutation drawn from (seed, corpus, epoch), and
within it no sample comes twice. What is left when an epoch does not divide into batches is dropped
(`tail="drop"`: other samples every epoch) or runs on into the next epoch (`tail="wrap"`).

Windows: where a corpus gives its shards' sizes and a window, an epoch goes through the shards a few at a time
(windows.py), so that shards fetched from afar are needed once an epoch.

Groups: where samples carry labels and `group_size` is above 1, an epoch is a permutation of whole groups of
samples with one label. What a label has left over forms mixed groups with what other labels have left over, so
that of n samples exactly n mod group_size are dropped in an epoch; a batch holds batch / group_size groups.

A rank takes a contiguous, equal slice. Letters: B samples of the global batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from data_pipeline.config import Kind, Tail
from data_pipeline.draws import derive, permutation_np
from data_pipeline.windows import WindowedEpoch

Int64Array = npt.NDArray[np.int64]

KEPT_EPOCHS = 2  # permutations kept a corpus: a batch that wraps needs two
WEIGHT_DENOMINATOR = 1_000_000


@dataclass(frozen=True)
class OrderCorpus:
    """What the order needs to know of a corpus.

    `batch` is the global batch of its steps; `weight` None means in proportion to its batches an epoch, times
    `epochs`; `shard_sizes` (shards,) and `window` (shards) keep an epoch local; `labels` (size,) integers say which
    samples are alike, for groups of `group_size`; samples of one label whose `unlike` (size,) is equal too are kept
    out of one group where possible.
    """

    name: str
    size: int
    batch: int
    kind: Kind = "video"
    weight: float | None = None
    labels: npt.NDArray[Any] | None = None
    group_size: int = 1
    unlike: npt.NDArray[Any] | None = None
    epochs: float = 1.0
    shard_sizes: tuple[int, ...] = ()
    window: int | None = None


@dataclass(frozen=True)
class BatchPlan:
    """The samples of one step, or a rank's slice of them: `epoch`, `index` and `seeds` are int64 (B,)."""

    step: int
    corpus: int
    kind: Kind
    epoch: Int64Array
    index: Int64Array
    seeds: Int64Array

    def __len__(self) -> int:
        return len(self.index)


class Order:
    """The pure order of a run over one or several corpora; see the module's head.

    Raises UserError where a batch does not divide into groups or a corpus is smaller than one batch.
    """

    def __init__(self, corpora: Sequence[OrderCorpus], seed: int, tail: Tail = "drop") -> None:
        if not corpora:
            raise UserError("There is no corpus to train on.", "Name at least one in data.train.")
        self.corpora = tuple(corpora)
        self.seed = seed
        self.tail = tail
        for corpus in self.corpora:
            _check(corpus, tail)
        self._shares = self._remaining_shares()
        self._kept: dict[tuple[int, int], Int64Array | WindowedEpoch] = {}

    def steps_per_epoch(self, corpus: int = 0) -> Fraction:
        """Batches in one epoch of a corpus: whole with tail "drop", a fraction with "wrap"."""
        plan = self.corpora[corpus]
        per_epoch = Fraction(self._length(corpus), plan.batch)
        return per_epoch if self.tail == "wrap" else Fraction(per_epoch.numerator // per_epoch.denominator)

    def corpus_of(self, step: int) -> int:
        """The corpus that a step draws from."""
        return self._locate(step)[0]

    def visits(self, corpus: int, step: int) -> int:
        """How many of the steps before `step` went to the corpus, by arithmetic."""
        rest = step
        for place, share in enumerate(self._shares):
            taken = _dealt(share, rest)
            if place == corpus:
                return taken
            rest -= taken
        raise IndexError(f"corpus {corpus} of {len(self.corpora)}")

    def batch(self, step: int) -> BatchPlan:
        """The global batch of a step."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        corpus, visit = self._locate(step)
        plan = self.corpora[corpus]
        length = self._length(corpus)
        if self.tail == "drop":
            epoch, batch = divmod(visit, length // plan.batch)
            epoch_B = np.full(plan.batch, epoch, dtype=np.int64)
            place_B = np.arange(plan.batch, dtype=np.int64) + batch * plan.batch
        else:
            epoch_B, place_B = np.divmod(np.arange(plan.batch, dtype=np.int64) + visit * plan.batch, length)
        index_B = np.empty(plan.batch, dtype=np.int64)
        for epoch in np.unique(epoch_B):
            here = epoch_B == epoch
            index_B[here] = self._at(corpus, int(epoch), place_B[here])
        seeds_B = sample_seeds(self.seed, corpus, epoch_B, index_B)
        return BatchPlan(step, corpus, plan.kind, epoch_B, index_B, seeds_B)

    def slice(self, step: int, rank: int, world: int) -> BatchPlan:
        """A rank's share of a step: the rank-th of `world` equal, contiguous parts of the global batch."""
        plan = self.batch(step)
        check_world(len(plan), world)
        share = len(plan) // world
        part = np.s_[rank * share : (rank + 1) * share]
        return replace(plan, epoch=plan.epoch[part], index=plan.index[part], seeds=plan.seeds[part])

    def epoch(self, corpus: int, epoch: int) -> Int64Array:
        """The samples of a corpus in the order of one epoch (whole groups only, where there are groups)."""
        return self._at(corpus, epoch, np.arange(self._length(corpus), dtype=np.int64))

    def _at(self, corpus: int, epoch: int, places: Int64Array) -> Int64Array:
        """The samples at some places of an epoch."""
        kept = self._kept.get((corpus, epoch))
        if kept is None:
            kept = self._permuted(self.corpora[corpus], derive(self.seed, "epoch", corpus, epoch))
            held = [key for key in self._kept if key[0] == corpus]
            for oldest in held[: len(held) + 1 - KEPT_EPOCHS]:
                del self._kept[oldest]
            self._kept[corpus, epoch] = kept
        return kept.at(places) if isinstance(kept, WindowedEpoch) else kept[places]

    @staticmethod
    def _permuted(plan: OrderCorpus, seed: int) -> Int64Array | WindowedEpoch:
        if plan.window is not None:
            return WindowedEpoch(seed, np.array(plan.shard_sizes, dtype=np.int64), plan.window)
        if plan.labels is None or plan.group_size == 1:
            return permutation_np(seed, "samples", plan.size)
        return grouped_permutation(seed, plan.labels, plan.group_size, plan.unlike)

    def _length(self, corpus: int) -> int:
        plan = self.corpora[corpus]
        return plan.size // plan.group_size * plan.group_size

    def _remaining_shares(self) -> list[Fraction]:
        """For each corpus in turn, its share of the steps that the corpora before it leave."""
        weights = [
            self.steps_per_epoch(place) * Fraction(corpus.epochs).limit_denominator(WEIGHT_DENOMINATOR)
            if corpus.weight is None
            else Fraction(corpus.weight).limit_denominator(WEIGHT_DENOMINATOR)
            for place, corpus in enumerate(self.corpora)
        ]
        return [weight / sum(weights[place:]) for place, weight in enumerate(weights)]

    def _locate(self, step: int) -> tuple[int, int]:
        """(corpus, visit): the step is that corpus's visit-th."""
        rest = step
        for corpus, share in enumerate(self._shares):
            taken = _dealt(share, rest)
            if _dealt(share, rest + 1) > taken:
                return corpus, taken
            rest -= taken
        raise AssertionError("the last corpus takes every step that is left")


def _dealt(share: Fraction, steps: int) -> int:
    """How many of the first `steps` go to a corpus with this share: the share, rounded to the nearest."""
    return (2 * share.numerator * steps + share.denominator) // (2 * share.denominator)


def sample_seeds(seed: int, corpus: int, epoch_B: Int64Array, index_B: Int64Array) -> Int64Array:
    """(B,) the seed from which everything random about a sample in an epoch is drawn."""
    return derive(np.array([seed], dtype=np.int64), corpus, epoch_B, index_B)


def substitute(seed: int, index: int, attempt: int, size: int) -> tuple[int, int]:
    """(index, seed) of what stands in for a lost sample: another one of the same corpus of `size` samples.

    A pure draw from the lost sample's seed, which holds (run seed, corpus, epoch, sample), and the attempt.
    """
    drawn = derive(seed, "substitute", attempt)
    if size == 1:
        return index, drawn
    other = (derive(drawn, "index") & ((1 << 62) - 1)) % (size - 1)
    return other + (other >= index), drawn


def grouped_permutation(
    seed: int, labels: npt.NDArray[Any], group_size: int, unlike: npt.NDArray[Any] | None = None
) -> Int64Array:
    """A random order of the samples in which every run of `group_size` has one label, leftovers apart.

    The members of a label are permuted and cut into groups; the leftovers of all labels are permuted and cut into
    mixed groups; then the groups are permuted. The last len(labels) % group_size samples without a group are dropped.
    With `unlike`, the members of a label come in rounds, each holding every value of `unlike` at most once, so that
    only a group that spans two rounds can hold one twice.
    """
    shuffled = permutation_np(seed, "samples", len(labels))
    rounds = 0 if unlike is None else _occurrence(labels[shuffled], unlike[shuffled])
    by_label = shuffled[np.lexsort((np.broadcast_to(rounds, len(labels)), labels[shuffled]))]
    _, first, counts = np.unique(labels[by_label], return_index=True, return_counts=True)
    rank = np.arange(len(by_label)) - np.repeat(first, counts)
    whole = rank < np.repeat(counts // group_size * group_size, counts)
    left = by_label[~whole]
    left = left[permutation_np(seed, "leftovers", len(left))]
    left = left[: len(left) // group_size * group_size]
    groups = np.concatenate([by_label[whole], left]).reshape(-1, group_size)
    return groups[permutation_np(seed, "groups", len(groups))].reshape(-1)


def _occurrence(labels: npt.NDArray[Any], unlike: npt.NDArray[Any]) -> Int64Array:
    """How many earlier samples have the same label and the same value of `unlike`, (size,)."""
    by_pair = np.lexsort((unlike, labels))
    new = np.ones(len(by_pair), dtype=bool)
    new[1:] = (np.diff(labels[by_pair]) != 0) | (np.diff(unlike[by_pair]) != 0)
    start = np.maximum.accumulate(np.where(new, np.arange(len(by_pair)), 0))
    count = np.empty(len(by_pair), dtype=np.int64)
    count[by_pair] = np.arange(len(by_pair)) - start
    return count


def check_world(batch: int, world: int, what: str = "data.batch") -> None:
    """UserError unless a global batch divides into `world` equal slices."""
    if world < 1 or batch % world:
        ranks = max(n for n in range(1, min(batch, max(world, 1)) + 1) if batch % n == 0)
        raise UserError(
            f"{what}: {batch} clips do not divide by {world} ranks.",
            f"Use {max(world, round(batch / max(world, 1)) * world)}, or {ranks} rank{'s' * (ranks > 1)}.",
        )


def _check(corpus: OrderCorpus, tail: Tail) -> None:
    if corpus.batch % corpus.group_size:
        near = max(1, round(corpus.batch / corpus.group_size)) * corpus.group_size
        raise UserError(
            f"A batch of {corpus.batch} does not divide into groups of {corpus.group_size} ({corpus.name}).",
            f"Use a batch of {near}.",
        )
    if corpus.group_size > 1 and (corpus.labels is None or len(corpus.labels) != corpus.size):
        raise ValueError(f"{corpus.name}: groups need one label for each of its {corpus.size} samples")
    if corpus.window is not None and (corpus.group_size > 1 or sum(corpus.shard_sizes) != corpus.size):
        raise ValueError(f"{corpus.name}: a window needs the sizes of all shards, and no groups")
    usable = corpus.size // corpus.group_size * corpus.group_size
    least = corpus.group_size if tail == "wrap" else corpus.batch
    if usable < least:
        wrap = "" if tail == "wrap" else ", or set tail=wrap"
        raise UserError(
            f"{corpus.name} holds {corpus.size} samples, fewer than {least} for one batch.",
            f"Use a batch of at most {max(usable, 1)}{wrap}.",
        )
