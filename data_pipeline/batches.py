"""What a worker does: a plan of samples becomes a finished batch, with substitutes for what is lost.

Letters: B clips of this rank, C channels, T frames, H and W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from data_pipeline.clips import Augment, ClipSource, Draws, Meta
from data_pipeline.config import CaptionRule, FrameConfig
from data_pipeline.draws import derive
from data_pipeline.frames import choose, middle_of, shuffled_order
from data_pipeline.lost import BadSamples, Loss
from data_pipeline.order import BatchPlan, substitute
from data_pipeline.preprocess import VisualPreprocess
from data_pipeline.schema import Kind, SampleError
from data_pipeline.shared_memory import Watch
from data_pipeline.transforms import to_square

MAX_ATTEMPTS = 20  # substitutes tried for one sample before the corpus is called unusable

Control = Literal["normal", "shuffled", "repeated"]


Allocate = Callable[[tuple[int, ...]], Tensor]


def fresh(shape: tuple[int, ...]) -> Tensor:
    """Memory of this process for the frames of a batch, uint8."""
    return torch.empty(shape, dtype=torch.uint8)


@dataclass
class Batch:
    """This rank's clips of a step, or a batch of an evaluation (there `step` counts batches).

    `frames` uint8 (B, C, T, H, W); `captions` one a clip and `all_captions` every one it has; `identity` int64
    (B,), equal for equal media content; `seeds` int64 (B,), from which everything random about the clips is
    drawn; `index` int64 (B,) their places in the corpus; `losses` what was met while making this batch.
    """

    frames: Tensor
    captions: list[str]
    identity: Tensor
    seeds: Tensor
    keys: list[str]
    kind: Kind
    step: int
    corpus: int
    attributes: list[dict[str, Any]]
    all_captions: list[tuple[str, ...]]
    index: Tensor
    losses: list[Loss] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.captions)

    def part(self, start: int, stop: int) -> "Batch":
        """The clips from `start` to `stop`, as views: a micro-batch."""
        cut = slice(start, stop)
        return Batch(
            frames=self.frames[cut],
            captions=self.captions[cut],
            identity=self.identity[cut],
            seeds=self.seeds[cut],
            keys=self.keys[cut],
            kind=self.kind,
            step=self.step,
            corpus=self.corpus,
            attributes=self.attributes[cut],
            all_captions=self.all_captions[cut],
            index=self.index[cut],
        )

    def pinned(self) -> "Batch":
        """The same batch with its frames in pinned memory."""
        self.frames = self.frames.pin_memory()
        return self


@dataclass(frozen=True)
class _Filled:
    """One clip of a batch being made."""

    meta: Meta
    caption: str
    frames: Tensor
    seed: int
    index: int


def _assemble(
    filled: Sequence[_Filled], kind: Kind, step: int, corpus: int, visual: VisualPreprocess, allocate: Allocate
) -> Batch:
    size = visual.image_size
    frames_BCTHW = allocate((len(filled), 3, visual.frames, size, size))
    for place, clip in enumerate(filled):
        frames_BCTHW[place].copy_(clip.frames.transpose(0, 1))
    return Batch(
        frames=frames_BCTHW,
        captions=[clip.caption for clip in filled],
        identity=torch.tensor([clip.meta.identity for clip in filled], dtype=torch.int64),
        seeds=torch.tensor([clip.seed for clip in filled], dtype=torch.int64),
        keys=[clip.meta.key for clip in filled],
        kind=kind,
        step=step,
        corpus=corpus,
        attributes=[clip.meta.attributes for clip in filled],
        all_captions=[clip.meta.captions for clip in filled],
        index=torch.tensor([clip.index for clip in filled], dtype=torch.int64),
    )


class TrainBatches:
    """plan -> Batch, in a worker (or here, without workers); a UserError comes back as a value."""

    def __init__(
        self,
        sources: Sequence[ClipSource],
        augments: Sequence[Augment],
        sizes: Sequence[int],
        rule: FrameConfig,
        caption: CaptionRule,
    ) -> None:
        self.sources = list(sources)
        self.augments = list(augments)
        self.sizes = list(sizes)
        self.rule = rule
        self.caption = caption
        self.bad = BadSamples()

    def watched_by(self, watch: Watch) -> None:
        """Say to `watch` what is being decoded."""
        for source in self.sources:
            source.watch = watch

    def make(self, plan: BatchPlan, allocate: Allocate = fresh) -> Batch | UserError:
        """The batch of a plan, its frames in memory from `allocate`."""
        source = self.sources[plan.corpus]
        losses: list[Loss] = []
        draws = Draws.of(plan.seeds, source.visual.frames)
        try:
            filled = [self._fill(plan, draws, row, losses) for row in range(len(plan))]
        except UserError as error:
            return error
        batch = _assemble(filled, source.kind, plan.step, plan.corpus, source.visual, allocate)
        batch.losses = losses
        return batch

    def _fill(self, plan: BatchPlan, draws: Draws, row: int, losses: list[Loss]) -> _Filled:
        source = self.sources[plan.corpus]
        index, seed = int(plan.index[row]), int(plan.seeds[row])
        for attempt in range(MAX_ATTEMPTS + 1):
            if attempt:
                index, drawn = substitute(seed, int(plan.index[row]), attempt, self.sizes[plan.corpus])
                draws, row_of = Draws.of(np.array([drawn]), source.visual.frames), 0
            else:
                row_of = row
            try:
                return self._read(plan.corpus, index, draws, row_of)
            except SampleError as error:
                losses.append(Loss.of(plan.corpus, source.corpus, index, error))
        raise UserError(
            f"{MAX_ATTEMPTS + 1} samples in a row could not be used, the last being {losses[-1].location} "
            f"({losses[-1].reason.value}: {losses[-1].detail}).",
            "Run `videomamba data verify` on the corpus.",
            exit_code=1,
        )

    def _read(self, corpus: int, index: int, draws: Draws, row: int) -> _Filled:
        source = self.sources[corpus]
        self.bad.require_good(corpus, index)
        meta = source.meta(index)
        wanted = partial(choose, self.rule, T=source.visual.frames, uniforms_T=draws.frames_BT[row])
        frames = self.augments[corpus](source.frames(index, wanted), draws, row)
        caption = meta.caption(self.caption, float(draws.caption_B[row]))
        return _Filled(meta, caption, frames, int(draws.seeds_B[row]), index)


class EvalBatches:
    """(batch number, first, last + 1) -> Batch of the corpus in its own order; lost samples are left out.

    Frames are the middle ones of T intervals; "shuffled" puts them in a drawn, wrong order, "repeated" shows the
    middle one of them T times.
    """

    def __init__(self, source: ClipSource, control: Control, seed: int) -> None:
        self.source = source
        self.control = control
        self.seed = seed
        self.bad = BadSamples()

    def watched_by(self, watch: Watch) -> None:
        """Say to `watch` what is being decoded."""
        self.source.watch = watch

    def make(self, span: tuple[int, int, int], allocate: Allocate = fresh) -> Batch | UserError:
        """The batch of a span, its frames in memory from `allocate`."""
        number, start, stop = span
        filled: list[_Filled] = []
        losses: list[Loss] = []
        for index in range(start, stop):
            try:
                filled.append(self._read(index))
            except SampleError as error:
                losses.append(Loss.of(0, self.source.corpus, index, error))
            except UserError as error:
                return error
        batch = _assemble(filled, self.source.kind, number, 0, self.source.visual, allocate)
        batch.losses = losses
        return batch

    def _read(self, index: int) -> _Filled:
        self.bad.require_good(0, index)
        visual = self.source.visual
        meta = self.source.meta(index)
        seed = derive(self.seed, "eval", index)
        frames = self.source.frames(
            index, lambda n, seconds: middle_of(n, seconds, visual.frames, visual.first_seconds)
        )
        frames = to_square(frames, visual.image_size, visual.resize, visual.interpolation)
        if self.control == "shuffled":
            frames = frames[torch.from_numpy(shuffled_order(len(frames), seed))]
        elif self.control == "repeated":
            middle = len(frames) // 2
            frames = frames[middle : middle + 1].expand_as(frames)
        return _Filled(meta, meta.captions[0], frames, seed, index)
