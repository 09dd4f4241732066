"""The data part of a run's config: which corpora, which frames, how large a batch. Needs no torch.

Rules that span keys are checked here, before anything heavy is imported; what needs the data itself (is the
corpus large enough for one batch?) is checked by order.py.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from configs.loader import Frozen
from data_pipeline.preprocess import IMAGENET_MEAN, IMAGENET_STD, Interpolation, ResizeRule, Triple, VisualPreprocess
from data_pipeline.rand_policy import RandAugment

Kind = Literal["video", "image"]
FrameRuleName = Literal[
    "uniform",
    "middle",
    "single",
    "dense",
    "fps",
    "released_random",
    "released_tsn",
    "released_sparse",
    "released_fps",
]
TIMED_RULES = ("dense", "fps", "released_fps")  # these ask for frames at a pace, which a cache of a few cannot give
Tail = Literal["drop", "wrap"]
CaptionRule = Literal["random", "first"]
IdentityRule = Literal["sha256", "row"]

DECODE_TIMEOUT = 60.0  # seconds
MAX_CACHE_FRAMES = 200  # the cache keeps a clip's frame count in one byte, beside the codes of lost samples


class CorpusConfig(Frozen):
    """One folder or address of shards and how it takes part.

    `weight` is its share of the steps (null: in proportion to its number of batches times `epochs`, so that by
    default all corpora go round together, and one with `epochs: 2` goes round twice meanwhile).
    `shard_window` keeps an epoch local, so many shards at a time (null: the whole corpus is shuffled at once).
    `flip` mirrors clips half of the time, and is refused where `directional` says that left and right are what
    captions or labels tell ("pushing something from left to right").
    `group_by` names attributes; samples with equal values stand together in a batch, `group_size` at a time.
    `unlike_by` names attributes in which the members of a group shall differ, as far as the epoch allows it.
    """

    path: str
    kind: Kind = "video"
    weight: float | None = Field(None, gt=0)
    epochs: float = Field(1.0, gt=0)
    shard_window: int | None = Field(None, ge=1)
    flip: bool = False
    directional: bool = False
    group_by: tuple[str, ...] = ()
    group_size: int = Field(1, ge=1)
    unlike_by: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _direction_is_not_mirrored(self) -> Self:
        if self.flip and self.directional:
            raise ValueError(
                f"flip mirrors the clips of {self.path}, and directional says that left and right are what is told. "
                "Use flip: false there, or directional: false if a mirrored clip keeps its captions."
            )
        return self

    @model_validator(mode="after")
    def _one_rule_for_the_share_and_one_for_the_order(self) -> Self:
        if self.weight is not None and self.epochs != 1:
            raise ValueError(f"weight is {self.weight:g} and epochs {self.epochs:g}: either sets the share. Give one.")
        if self.shard_window is not None and self.group_by:
            raise ValueError(
                "shard_window shuffles a few shards at a time, and group_by needs all samples of a label. "
                "Give one of them; a corpus in groups is best kept on a local disk."
            )
        return self

    @model_validator(mode="after")
    def _groups_have_a_size(self) -> Self:
        if bool(self.group_by) != (self.group_size > 1):
            raise ValueError(
                f"group_by is {list(self.group_by)} and group_size {self.group_size}, but each needs the other. "
                "Give attribute names with a group_size of 2 or more, or neither."
            )
        if self.unlike_by and not self.group_by:
            raise ValueError(
                f"unlike_by is {list(self.unlike_by)}, but there are no groups. Give group_by and group_size too."
            )
        return self


class RemoteConfig(Frozen):
    """How shards behind an address (http, https, s3, gs) are read.

    `cache` is a local folder (null: videomamba/shards under the user's cache folder) that holds at most `cache_gb`
    10^9 bytes, shared by all processes. `fetch` brings whole shards, or only the samples that are wanted (ranges).
    A request may take `timeout` seconds and is made `attempts` times, `pause` seconds after the first, then doubling.
    """

    cache: str | None = None
    cache_gb: float = Field(50.0, gt=0)
    fetch: Literal["shards", "ranges"] = "shards"
    attempts: int = Field(6, ge=1)
    pause: float = Field(1.0, ge=0)
    timeout: float = Field(60.0, gt=0)


class FrameConfig(Frozen):
    """Which frames of a clip: `count` equal intervals, with a random frame of each (uniform) or the middle one.

    "dense" takes every `stride`-th frame and "fps" `fps` a second, both from a random start; the "released" rules
    are the release's own (data_pipeline/frames.py says how they differ). "single" draws one frame and repeats it
    `count` times: a control that sees no motion. `first_seconds` looks no further into a clip, in evaluations too.
    """

    count: int = Field(8, ge=1)
    rule: FrameRuleName = "uniform"
    stride: int = Field(4, ge=1)
    fps: float = Field(2.0, gt=0)
    first_seconds: float | None = Field(None, gt=0)


class AugmentConfig(Frozen):
    """What training frames go through besides a mirror image; nothing by default but the resized crop.

    `crop` is "resized" (`crop_scale` and `crop_ratio` say how) or "multiscale" (the release's stage 1: 1, 7/8, 3/4 or
    0.66 of the short side, at one of 13 places). `color_jitter` is the strength of brightness, contrast, saturation
    and hue. `rand_augment` is a name of timm's, as rand-m7-n4-mstd0.5-inc1. `erase` is the probability with which a
    box of each clip becomes noise.
    """

    crop: Literal["resized", "multiscale"] = "resized"
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    rand_augment: str | None = None
    erase: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _strengths_are_possible(self) -> Self:
        if min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            raise ValueError(f"color_jitter is {list(self.color_jitter)}. Give strengths from 0, the last up to 0.5.")
        if self.rand_augment is not None:
            RandAugment.parse(self.rand_augment)
        return self


class DataConfig(Frozen):
    """The corpora of a run and how they become batches.

    `batch` counts the clips of a step over all ranks, `image_batch` the images of an image step (null: the same).
    `crop_scale` is the share of the area that a random crop keeps; (1, 1) with no flip leaves frames as they are.
    `cache` names a folder where `cache_frames` decoded frames a clip are kept, at `image_size`; a random frame is
    then drawn among those. `identity` says which samples are one medium to the losses: those of equal content
    (sha256), or none but itself (row: its number in the corpus, as released). `max_bad_fraction` is the share of
    lost samples past which a run stops; `decode_timeout` the seconds after which a worker that decodes one sample is
    killed and the sample counted lost.
    """

    train: tuple[CorpusConfig, ...] = Field(min_length=1)
    batch: int = Field(64, ge=1)
    image_batch: int | None = Field(None, ge=1)
    frames: FrameConfig = FrameConfig()
    image_size: int = Field(224, ge=8)
    resize: ResizeRule = "stretch"
    interpolation: Interpolation = "bicubic"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    augment: AugmentConfig = AugmentConfig()
    caption: CaptionRule = "random"
    identity: IdentityRule = "sha256"
    tail: Tail = "drop"
    workers: int = Field(2, ge=0)
    prefetch: int = Field(2, ge=1)
    cache: str | None = None
    cache_frames: int = Field(16, ge=1, le=MAX_CACHE_FRAMES)
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    decode_timeout: float = Field(DECODE_TIMEOUT, gt=0)
    remote: RemoteConfig = RemoteConfig()

    def batch_of(self, kind: Kind) -> int:
        """The global batch of a step of this media kind."""
        return self.image_batch if kind == "image" and self.image_batch is not None else self.batch

    def visual(self) -> VisualPreprocess:
        """The preprocessing that these batches need and that travels with the weights."""
        return VisualPreprocess(
            frames=self.frames.count,
            image_size=self.image_size,
            resize=self.resize,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            first_seconds=self.frames.first_seconds,
        )

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"crop_scale is ({low}, {high}), which is no range within 0..1. Write it as [smallest, largest]."
            )
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio is ({low}, {high}), no range above 0. Write it as [lowest, highest].")
        return self

    @model_validator(mode="after")
    def _batches_divide_into_groups(self) -> Self:
        for corpus in self.train:
            batch = self.batch_of(corpus.kind)
            if batch % corpus.group_size:
                nearest = max(corpus.group_size, round(batch / corpus.group_size) * corpus.group_size)
                raise ValueError(
                    f"a batch of {batch} does not divide into groups of {corpus.group_size} ({corpus.path}). "
                    f"Use a batch of {nearest}."
                )
        return self

    @model_validator(mode="after")
    def _weights_are_all_or_none(self) -> Self:
        given = [corpus.path for corpus in self.train if corpus.weight is not None]
        if given and len(given) != len(self.train):
            raise ValueError(
                f"{len(given)} of {len(self.train)} corpora have a weight, so the shares are unclear. "
                "Give every corpus a weight, or none."
            )
        return self

    @model_validator(mode="after")
    def _cache_holds_enough_frames(self) -> Self:
        if self.cache is not None and self.cache_frames < self.frames.count:
            raise ValueError(
                f"cache_frames is {self.cache_frames}, fewer than the {self.frames.count} frames of a clip. "
                f"Use {2 * self.frames.count} or so."
            )
        if self.cache is not None and self.frames.rule in TIMED_RULES:
            raise ValueError(
                f"frames.rule is {self.frames.rule}, which needs a clip's frames at their own pace, and data.cache "
                "keeps a few evenly spaced ones. Use frames.rule=uniform, or cache=null."
            )
        return self
