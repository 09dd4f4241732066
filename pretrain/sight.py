"""What a task sees of a batch: the teacher's view, which tokens stay visible, and the student's view of those.

B samples of this rank, C channels, T frames, V visible tokens, K token frames, N patches a frame, J aligned layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.losses import alignment_loss, gather_visible
from pretrain.masking import visible_indices
from pretrain.models.config import VisionConfig
from pretrain.models.teacher import ClipTeacher
from pretrain.models.videomamba import VideoMamba, VisionOutput


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
        if config.teacher is not None:
            self.teacher = ClipTeacher.from_open_clip(
                config.teacher.source,
                config.teacher.weights,
                mean=self.visual.mean if config.teacher.pixels == "released" else None,
                std=self.visual.std if config.teacher.pixels == "released" else None,
                layers=config.teacher.layers,
                interval=config.teacher.interval,
                ln_post=config.teacher.ln_post,
                image_size=config.teacher.image_size,
                tubelet=config.vision.tubelet,
                stride=config.teacher.frame_stride,
                chunk=config.teacher.chunk,
                grid=(self.patches[0], self.patches[1]),
            ).to(device)
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

    def show(self, frames_BCTHW: Tensor, seeds_B: Tensor) -> Shown:
        """What the teacher makes of uint8 frames, without a graph."""
        attention_BKN = target_JBVC = None
        if self.teacher is not None:
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
