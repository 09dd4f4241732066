"""What a task sees of a batch: the teacher's view, which tokens stay visible, and the student's view of those.

B samples of this rank, C channels, T frames, V visible tokens, K token frames, N patches a frame, J aligned layers.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError
from data_pipeline.batches import Batch
from pretrain.config import PretrainConfig, TeacherConfig
from pretrain.losses import alignment_loss, gather_visible
from pretrain.masking import visible_indices
from pretrain.models.config import VisionConfig
from pretrain.models.teacher import ClipTeacher
from pretrain.models.videomamba import VideoMamba, VisionOutput
from pretrain.teacher_cache import TeacherCache


class Shown(NamedTuple):
    """What a batch's student is shown: the visible tokens' indices (None: all), and the teacher's features of these."""

    visible_BV: Tensor | None
    target_JBVC: Tensor | None


class Sight:
    """The teacher, the mask and the pixels of a run."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.mask, self.visual, self.alignment = config.mask, config.data.visual(), config.losses.alignment
        # autocast would round the pixels at the first product anyway; before it, they move at half the cost
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.patches = (config.vision.image_size // config.vision.patch_size,) * 2
        self.teacher: ClipTeacher | None = None
        self.cache: TeacherCache | None = None
        if config.teacher is not None:
            cached = config.teacher.cache is not None
            self.teacher = open_teacher(config, torch.device("cpu") if cached else device)
            self.cache = TeacherCache.open(config, self.teacher) if cached else None
        self.tubelet = config.vision.tubelet
        self.vision = self._vision(config)

    def _vision(self, config: PretrainConfig) -> VisionConfig:
        """The student's config with the teacher's width, where it is aligned to one."""
        width = self.teacher.width if self.teacher is not None and self.alignment.weight else 0
        if config.vision.align_width not in (0, width):
            raise UserError(
                f"vision.align_width is {config.vision.align_width}, and what there is to align to is {width} wide.",
                "Leave vision.align_width out: it follows the teacher.",
            )
        return config.vision.model_copy(update={"align_width": width})

    def show(self, frames_BCTHW: Tensor, seeds_B: Tensor, batch: Batch) -> Shown:
        """What the teacher makes, or has made, of uint8 frames (those of `batch`, on the device), without a graph."""
        attention_BKN = target_JBVC = None
        if self.cache is not None:
            target_JBVC, attention_BKN = self.cache.read(batch, frames_BCTHW.device)
        elif self.teacher is not None:
            target_JBVC, attention_BKN = self.teacher(frames_BCTHW)
        visible_BV = self._visible(frames_BCTHW.shape[2], seeds_B, attention_BKN)
        if not self.alignment.weight:
            target_JBVC = None
        if target_JBVC is not None and visible_BV is not None:
            target_JBVC = gather_visible(target_JBVC, visible_BV)
        return Shown(visible_BV, target_JBVC)

    def look(self, encoder: VideoMamba, frames_BCTHW: Tensor, seeds_B: Tensor, shown: Shown) -> VisionOutput:
        """The student's output on the visible tokens of uint8 frames."""
        return encoder.forward_tokens(self.visual.normalise(frames_BCTHW, self.dtype), shown.visible_BV, seeds_B)

    def align(self, encoder: VideoMamba, seen: VisionOutput, shown: Shown) -> Tensor:
        """The alignment loss of the tokens that the student saw, cls among them, weighted."""
        assert shown.target_JBVC is not None  # asked only where there is a teacher to align to
        loss = alignment_loss(encoder.align(seen), shown.target_JBVC, self.alignment.kind)
        return self.alignment.weight * loss

    def _visible(self, frames: int, seeds_B: Tensor, attention_BKN: Tensor | None) -> Tensor | None:
        if self.mask is None:
            return None
        image = frames == 1
        grid = (1 if image else frames // self.tubelet, self.patches[0], self.patches[1])
        ratio = self.mask.image_ratio if image else self.mask.ratio
        return visible_indices(self.mask.kind, seeds_B, grid, ratio, attention_BKN)


def teacher_options(rule: TeacherConfig, vision: VisionConfig) -> dict[str, Any]:
    """How a run's teacher is asked, as the arguments of ClipTeacher beside its tower and its pixels."""
    return {
        "layers": rule.layers,
        "interval": rule.interval,
        "ln_post": rule.ln_post,
        "image_size": rule.image_size,
        "tubelet": vision.tubelet,
        "stride": rule.frame_stride,
        "chunk": rule.chunk,
        "grid": (vision.image_size // vision.patch_size,) * 2,
    }


def open_teacher(config: PretrainConfig, device: torch.device) -> ClipTeacher:
    """The teacher that a run names, on `device`.

    UserError if it cannot be built, does not fit the student, or lacks the attention that the run's mask is drawn by.
    """
    assert config.teacher is not None  # asked by the callers
    visual, rule, vision = config.data.visual(), config.teacher, config.vision
    teacher = ClipTeacher.from_open_clip(
        rule.source,
        rule.weights,
        mean=visual.mean if rule.pixels == "released" else None,
        std=visual.std if rule.pixels == "released" else None,
        **teacher_options(rule, vision),
    )
    if config.mask is not None and config.mask.kind == "attention" and not teacher.tower.attends:
        raise UserError(
            f"mask.kind is attention, and the teacher {rule.source} has none: it sums a frame up by a mean.",
            "Use mask.kind=tube, random, clip_row or frame_row, or a teacher with a cls token or an attention pooling.",
        )
    return teacher.to(device)
