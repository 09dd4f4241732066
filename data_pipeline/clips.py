"""One corpus as a worker reads it: a sample's captions and identity, and its frames, from the cache or decoded.

Everything here happens inside one process for one sample; batches, substitutes and counting are loader.py's.
Letters: T frames, C channels, H and W pixels, S side of the square.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from data_pipeline.augment import augment
from data_pipeline.config import AugmentConfig, CaptionRule, IdentityRule
from data_pipeline.decode import decode_image, decode_video
from data_pipeline.draws import uniform_np
from data_pipeline.frame_cache import FrameCache
from data_pipeline.frames import spread_indices, within_seconds
from data_pipeline.preprocess import VisualPreprocess
from data_pipeline.schema import Kind, LossReason, Sample, SampleError, Samples
from data_pipeline.shared_memory import Watch
from data_pipeline.transforms import (
    CROP_DRAWS,
    crop_box,
    crop_to_square,
    from_decoder,
    multi_scale_box,
    to_square,
)

REMEMBERED = 20_000  # samples whose captions a process keeps, about a kilobyte each

Choose = Callable[[int, float], npt.NDArray[Any]]


@dataclass(frozen=True)
class Meta:
    """What a batch says of a sample. `identity` is the first 63 bits of the sha256 of its content, or its row."""

    key: str
    captions: tuple[str, ...]
    identity: int
    attributes: dict[str, Any]

    def caption(self, rule: CaptionRule, draw: float) -> str:
        """The first caption, or the one that `draw` in [0, 1) chooses."""
        last = len(self.captions) - 1
        return self.captions[0 if rule == "first" else min(int(draw * (last + 1)), last)]


class ClipSource:
    """The samples of a run's `number`-th corpus, with an optional frame cache in front of the decoder.

    All faults of content are SampleErrors, a decode that computes for `time_limit` seconds among them (a hang inside
    the decoder is seen from outside alone). `watch`, where there is one, is told which sample is being decoded.
    """

    def __init__(
        self,
        corpus: Samples,
        kind: Kind,
        visual: VisualPreprocess,
        cache: FrameCache | None = None,
        number: int = 0,
        identity: IdentityRule = "sha256",
        time_limit: float | None = None,
    ) -> None:
        self.corpus = corpus
        self.time_limit = time_limit
        self.identity = identity
        self.number = number
        self.kind = kind
        self.visual = visual
        self.cache = cache
        self.watch: Watch | None = None
        self._remembered: dict[int, Meta] = {}

    def meta(self, index: int) -> Meta:
        """Captions, identity and attributes of a sample."""
        known = self._remembered.get(index)
        if known is not None:
            return known
        tree = self.corpus.read_meta(index)
        captions = tuple(str(caption) for caption in tree["captions"] if str(caption).strip())
        if not captions:
            raise SampleError(LossReason.EMPTY_CAPTION, "no caption with a letter in it")
        if self.identity == "row":
            identity = index
        else:
            identity = int((tree.get("sha256") or self.corpus.read(index).sha256)[:16], 16) >> 1
        meta = Meta(self.corpus.key(index), captions, identity, dict(tree.get("attributes") or {}))
        if len(self._remembered) < REMEMBERED:
            self._remembered[index] = meta
        return meta

    def frames(self, index: int, choose: Choose) -> Tensor:
        """The chosen frames, uint8 (T, C, H, W): squares of the preprocessing's size from a cache, else as decoded.

        `choose` maps the number of frames there are (in the cache, or in the clip) and the seconds they last (0 in
        the cache, which holds no more than the first seconds that are asked for) to sorted indices.
        """
        if self.cache is None:
            return self._decode(index, choose)
        held = self.cache.get(index)
        if held is None:
            held = self._fill(self.cache, index)
        return from_decoder(held[choose(len(held), 0.0)])

    def _fill(self, cache: FrameCache, index: int) -> npt.NDArray[np.uint8]:
        try:
            decoded = self._decode(
                index,
                lambda n, seconds: spread_indices(
                    within_seconds(n, seconds, cache.spec.first_seconds), cache.spec.frames
                ),
            )
        except SampleError as error:
            cache.put_lost(index, error.reason)
            raise
        square = to_square(decoded, self.visual.image_size, self.visual.resize, self.visual.interpolation)
        held: npt.NDArray[np.uint8] = square.permute(0, 2, 3, 1).contiguous().numpy()
        cache.put(index, held)
        return held

    def _decode(self, index: int, choose: Choose) -> Tensor:
        sample = self.corpus.read(index)  # not watched: a slow disk or network is no fault of the sample
        with nullcontext() if self.watch is None else self.watch.over(self.number, index):
            return self.decode(sample, choose)

    def decode(self, sample: Sample, choose: Choose) -> Tensor:
        """The chosen frames of a sample that was read, uint8 (T, C, H, W)."""
        if self.kind == "image":
            return from_decoder(decode_image(sample.media, time_limit=self.time_limit))
        count = sample.probe.get("frames")
        return from_decoder(decode_video(sample.media, choose, count=count, time_limit=self.time_limit))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_remembered": {}}


@dataclass(frozen=True)
class Draws:
    """Everything random about some clips, row b from seed b, in [0, 1): drawn for a whole batch at once."""

    seeds_B: npt.NDArray[np.int64]
    frames_BT: npt.NDArray[np.float32]
    crop_BK: npt.NDArray[np.float32]
    flip_B: npt.NDArray[np.float32]
    caption_B: npt.NDArray[np.float32]

    @classmethod
    def of(cls, seeds_B: npt.NDArray[np.int64], T: int) -> "Draws":
        """The draws of clips of T frames."""
        return cls(
            seeds_B,
            uniform_np(seeds_B, "frames", T),
            uniform_np(seeds_B, "crop", CROP_DRAWS),
            uniform_np(seeds_B, "flip", 1)[:, 0],
            uniform_np(seeds_B, "caption", 1)[:, 0],
        )


@dataclass(frozen=True)
class Augment:
    """What a corpus's training frames go through: a random crop (scale (1, 1): none), a random mirror image, and
    whatever else `more` asks for."""

    visual: VisualPreprocess
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    more: AugmentConfig = field(default_factory=AugmentConfig)

    def __call__(self, frames_TCHW: Tensor, draws: Draws, row: int) -> Tensor:
        """uint8 (T, C, S, S), all frames cropped and mirrored alike."""
        frames = self._cropped(frames_TCHW, draws, row)
        if self.flip and draws.flip_B[row] < 0.5:
            frames = frames.flip(-1)
        return augment(frames, self.more, int(draws.seeds_B[row]), self.visual.mean, self.visual.std)

    def _cropped(self, frames_TCHW: Tensor, draws: Draws, row: int) -> Tensor:
        size, interpolation = self.visual.image_size, self.visual.interpolation
        height, width = frames_TCHW.shape[-2:]
        uniforms = draws.crop_BK[row].tolist()
        if self.more.crop == "multiscale":
            box = multi_scale_box(uniforms[:2], height, width, size)
        elif self.scale == (1.0, 1.0):
            return to_square(frames_TCHW, size, self.visual.resize, interpolation)
        else:
            box = crop_box(uniforms, height, width, self.scale, self.ratio)
        return crop_to_square(frames_TCHW, box, size, interpolation)
