"""A pretraining run as a value: one frozen tree for both stages, with the rules that span its parts.

Every rule here speaks before torch is imported. What depends on the number of ranks, or on files being there, is in
config_checks.py; what needs the data or the weights themselves is checked where they are opened.
"""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from configs.loader import PACKAGED, Frozen
from data_pipeline.config import DataConfig
from data_pipeline.preprocess import TextPreprocess
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.models.config import TextConfig, VisionConfig
from pretrain.optim_config import OptimConfig

MaskKind = Literal["random", "tube", "clip_row", "frame_row", "attention"]
DEEPSPEED = PACKAGED / "deepspeed"


class TeacherConfig(Frozen):
    """The frozen CLIP whose visual features and attention guide the student.

    `source` is a folder that open_clip wrote (`videomamba teacher` writes one) or an open_clip model name, for
    which `weights` names a file or a tag of open_clip. `image_size` runs it at another resolution than its own.
    `pixels` are normalised as its own CLIP wants them, or as the student's (released). `layers` counts the blocks
    whose tokens are aligned to, `interval` apart, the last among them; `ln_post` puts its final norm before the
    projection (the release does not). `frame_stride` looks at every so-manieth frame of a tubelet alone (1: at all
    of them). `chunk` is how many frames go through it at a time. `cache` names a folder that `videomamba
    teacher-cache` filled, whose features take the tower's place, kept in `cache_width`: fp16, or int8 with a scale a
    token (half the disk).
    """

    source: str
    weights: str | None = None
    image_size: int | None = Field(None, ge=8)
    pixels: Literal["own", "released"] = "own"
    layers: int = Field(1, ge=1)
    interval: float = Field(1.0, ge=1)
    ln_post: bool = False
    frame_stride: int = Field(1, ge=1)
    chunk: int = Field(256, ge=1)
    cache: str | None = None
    cache_width: Literal["fp16", "int8"] = "fp16"


class MaskConfig(Frozen):
    """Which tokens the student sees: `ratio` of a clip's patches are hidden, `image_ratio` of an image's."""

    kind: MaskKind = "attention"
    ratio: float = Field(0.8, gt=0, lt=1)
    image_ratio: float = Field(0.5, gt=0, lt=1)


class AlignmentConfig(Frozen):
    """Student tokens towards the teacher's."""

    weight: float = Field(1.0, ge=0)
    kind: Literal["l2", "mse", "smooth_l1"] = "l2"


class ContrastiveConfig(Frozen):
    """Videos and their captions towards one another, over the global batch."""

    weight: float = Field(1.0, ge=0)


class MatchingConfig(Frozen):
    """Does this caption belong to this video? Negatives are hard ones of this rank's micro-batch, or of all.

    `hardness` scales the scores that negatives are drawn by: 1 as released, 0 draws them evenly. Where a batch has
    near doubles, the hardest alone would be seen at 1, and nothing learned of what tells other pairs apart.
    """

    weight: float = Field(1.0, ge=0)
    hardness: float = Field(1.0, ge=0)
    negatives: Literal["local", "global"] = "local"


class MlmConfig(Frozen):
    """Masked words, read with the video beside them; `probability` is the share of words masked.

    `every` asks one caption in so many of a batch, for less work a step; the release asks all (1).
    """

    weight: float = Field(1.0, ge=0)
    probability: float = Field(0.5, gt=0, lt=1)
    every: int = Field(1, ge=1)


class LossConfig(Frozen):
    """The losses and their weights; stage 1 uses the alignment alone. A weight of 0 does not compute the loss."""

    alignment: AlignmentConfig = AlignmentConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    matching: MatchingConfig = MatchingConfig()
    mlm: MlmConfig = MlmConfig()


class WandbConfig(Frozen):
    """Weights & Biases: `name` null takes the run folder's; `offline` keeps all in the run folder for `wandb sync`."""

    project: str
    entity: str | None = None
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class LogConfig(Frozen):
    """A line every so many steps, in log.jsonl always and in tensorboard/ and wandb if asked."""

    every_steps: int = Field(10, ge=1)
    tensorboard: bool = True
    wandb: WandbConfig | None = None


class EvaluateConfig(Frozen):
    """Zero-shot retrieval while training, every so many steps, by the dual encoder.

    `config` is a retrieval config, as `videomamba eval` takes it (a file, or a packaged name), and `overrides` are
    assignments over it, such as data.path=shards/test. Its checkpoint and out are not asked: they are the run's.
    """

    every_steps: int = Field(ge=1)
    config: str
    overrides: tuple[str, ...] = ()


class PretrainConfig(Frozen):
    """A run of stage 1 (masked video modelling) or stage 2 (joint vision and text).

    `init` names a checkpoint or a run folder whose weights to start from. `tokenizer` is a folder; null trains
    one from this run's captions. `embed` is the width of the space that both towers meet in. `micro_batch` is
    how many samples a rank takes at once at the most (null: its whole slice): losses and gradients stay those of the
    whole batch, in stage 2 for a second forward pass, so that a run may go on with other numbers of ranks and the same
    config. `threads` is the torch threads of a rank (null: the cores shared among the ranks here). `deepspeed` names a
    file in configs/deepspeed. `compile` has torch.compile make one kernel of many, block by block.

    A run is `steps` long, or `samples` or `epochs` (each corpus once through, as often as its own `epochs` says),
    from which the steps follow when it starts. A step whose loss or gradient is not finite is replayed to find where
    it comes from; then `nonfinite: stop` ends the run, and `skip` leaves weights, optimizer and average as they were
    and goes on, unless more than `max_skips` steps in a row were such.
    """

    task: Literal["stage1", "stage2"]
    out: str
    seed: int = 0
    steps: int = Field(0, ge=0)
    samples: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    init: str | None = None
    vision: VisionConfig
    text: TextConfig | None = None
    text_clean: Literal["released", "lower", "none"] = "released"
    embed: int = Field(512, ge=1)
    tokenizer: str | None = None
    teacher: TeacherConfig | None = None
    mask: MaskConfig | None = None
    losses: LossConfig = LossConfig()
    data: DataConfig
    micro_batch: int | None = Field(None, ge=1)
    optim: OptimConfig = OptimConfig()
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skips: int = Field(3, ge=1)
    deepspeed: str = "zero0"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    evaluate: EvaluateConfig | None = None

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that the name of the DeepSpeed file gives."""
        return int(self.deepspeed[-1])

    @property
    def rate_scale(self) -> float:
        """What every base rate is multiplied by for this global batch."""
        return self.optim.scale(self.data.batch)

    @property
    def text_preprocess(self) -> TextPreprocess:
        """How captions become tokens in this run (meaningful where there is a text tower)."""
        return TextPreprocess(max_tokens=self.text.max_tokens if self.text else 32, clean=self.text_clean)

    @model_validator(mode="after")
    def _teacher_is_there_and_used(self) -> Self:
        attention = self.mask is not None and self.mask.kind == "attention"
        aligned = self.losses.alignment.weight > 0
        if self.teacher is None:
            if self.task == "stage1":
                raise ValueError("stage1 learns from a teacher, and there is none. Give teacher.source.")
            if attention:
                raise ValueError(
                    "mask.kind is attention, which is the teacher's, and there is none. "
                    "Give teacher.source, or mask.kind=random."
                )
            if aligned:
                raise ValueError(
                    f"losses.alignment.weight is {self.losses.alignment.weight:g} but there is no teacher to align to. "
                    "Give teacher.source, or losses.alignment.weight=0."
                )
        elif self.task == "stage1" and not aligned:
            raise ValueError("losses.alignment.weight is 0, but stage1 has no other loss. Give it a weight above 0.")
        elif not attention and not aligned:
            raise ValueError("The teacher is used by no loss and no mask. Leave it out (teacher=null).")
        return self

    @model_validator(mode="after")
    def _cached_teacher_sees_unchanged_clips(self) -> Self:
        if self.teacher is None or self.teacher.cache is None:
            return self
        data, more = self.data, self.data.augment
        changes = [f"data.train.{i}.flip mirrors them" for i, corpus in enumerate(data.train) if corpus.flip]
        if more.crop != "resized" or data.crop_scale != (1.0, 1.0):
            changes.append("they are cropped at random (data.crop_scale is not [1, 1])")
        if any(more.color_jitter) or more.rand_augment is not None or more.erase:
            changes.append("data.augment changes their pixels")
        if data.frames.rule != "middle":
            changes.append(f"data.frames.rule={data.frames.rule} sees other frames in every epoch")
        if data.cache is not None and data.cache_frames != data.frames.count:
            changes.append(f"data.cache_frames is {data.cache_frames} and data.frames.count {data.frames.count}")
        if changes:
            raise ValueError(
                f"teacher.cache holds what the teacher sees of unchanged clips, but {', and '.join(changes)}: "
                "a cached feature would be of another view. Set data.crop_scale=[1,1], data.frames.rule=middle and "
                "no augmentation, or teacher.cache=null."
            )
        return self

    @model_validator(mode="after")
    def _text_belongs_to_stage2(self) -> Self:
        if self.task == "stage2" and self.text is None:
            raise ValueError(
                "stage2 needs a text tower, and `text` is missing. Give text.width, text.layers and so on."
            )
        if self.task == "stage1" and (self.text is not None or self.tokenizer is not None):
            raise ValueError("stage1 reads no text, but text or tokenizer is given. Remove them, or use task=stage2.")
        losses = self.losses
        if self.task == "stage2" and not any(
            part.weight for part in (losses.alignment, losses.contrastive, losses.matching, losses.mlm)
        ):
            raise ValueError("Every loss has weight 0, so nothing would be learned. Give one a weight above 0.")
        if self.text is not None and not self.text.fusion_layers and (losses.matching.weight or losses.mlm.weight):
            raise ValueError(
                "losses.matching and losses.mlm read the fusion layers, and text.fusion_layers is 0. "
                "Give text.fusion_layers, or set both weights to 0."
            )
        return self

    @model_validator(mode="after")
    def _evaluation_can_be_made(self) -> Self:
        if self.evaluate is not None and self.task == "stage1":
            raise ValueError(
                "evaluate asks for retrieval by text, and stage1 has no text tower. "
                "Leave evaluate out (null), and give it to stage2."
            )
        if self.evaluate is not None and self.zero_stage == 3:
            raise ValueError(
                "evaluate needs whole weights on every rank, and deepspeed=zero3 spreads them. "
                "Use deepspeed=zero2, or evaluate=null and `videomamba eval` on the checkpoints."
            )
        return self

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        if self.data.image_size != self.vision.image_size:
            raise ValueError(
                f"data.image_size is {self.data.image_size} and vision.image_size {self.vision.image_size}. "
                "Make them equal."
            )
        if self.data.frames.count != self.vision.frames:
            raise ValueError(
                f"data.frames.count is {self.data.frames.count} and vision.frames {self.vision.frames}. "
                "Make them equal."
            )
        taught = self.teacher.layers if self.teacher is not None and self.losses.alignment.weight else None
        if taught not in (None, self.vision.align_layers):
            raise ValueError(
                f"teacher.layers is {taught} and vision.align_layers {self.vision.align_layers}, "
                "but each layer of the one is aligned to one of the other. Make them equal."
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in ("steps", "samples", "epochs") if getattr(self, name)]
        if len(given) != 1:
            seen = f"{' and '.join(given)} both say" if given else "nothing says"
            raise ValueError(f"{seen} how long the run is. Give one of steps, samples and epochs (0 or null: not).")
        optim = self.optim
        for warmup, length in (
            (optim.warmup_steps, self.steps),
            (optim.warmup_samples, self.samples),
            (optim.warmup_epochs, self.epochs),
        ):
            if warmup and length and warmup >= length and length > 1:
                raise ValueError(
                    f"optim.warmup_{given[0]} is {warmup:g} of {length:g} {given[0]}, so the rate would only rise. "
                    f"Use {math.ceil(length / 10)} or so."
                )
        return self

    @model_validator(mode="after")
    def _optimizer_can_run(self) -> Self:
        if not (DEEPSPEED / f"{self.deepspeed}.json").is_file():
            names = ", ".join(sorted(path.stem for path in DEEPSPEED.glob("zero*.json")))
            raise ValueError(f"there is no DeepSpeed config '{self.deepspeed}'. Use one of: {names}.")
        if self.optim.method == "muon" and self.zero_stage > 0 and self.optim.clip_norm is not None:
            raise ValueError(
                f"optim.clip_norm is {self.optim.clip_norm:g}, but with Muon and {self.deepspeed} DeepSpeed would clip "
                "the orthogonal update, whose norm says nothing of the gradient. "
                "Use optim.clip_norm=null, deepspeed=zero0, or optim.method=adamw."
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile is true, and deepspeed=zero3 fetches weights in hooks on every module, at each of which a "
                "compiled block would fall apart. Use deepspeed=zero2, or compile=false."
            )
        return self
