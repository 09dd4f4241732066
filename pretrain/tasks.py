"""The two tasks: a model and its losses each. The trainer knows neither; it sums what `losses` gives.

Stage 1 aligns the visible tokens of a masked clip with a CLIP teacher's. Stage 2 (stage2.py) teaches a joint model
with four losses, masked (with the teacher) or unmasked (one vector a frame). Everything random comes from the
samples' own seeds, apart from dropout inside BERT, which is torch's.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from configs.errors import UserError
from data_pipeline.draws import derive
from data_pipeline.loader import Batch
from pretrain.checkpoint import ModelMeta, Preprocess, load_init
from pretrain.config import PretrainConfig
from pretrain.groups import Group, parameter_groups
from pretrain.models.videomamba import VideoMamba
from pretrain.sight import Sight
from pretrain.stage2 import Stage2

log = logging.getLogger(__name__)


class Task(Protocol):
    """What the trainer needs of a task."""

    model: nn.Module
    meta: ModelMeta
    preprocess: Preprocess
    tokenizer_folder: Path | None
    metrics: dict[str, Tensor]
    see: Sight
    words: int | None
    """Tokens that the captions of the last batch were padded to; None without text."""

    def survey(self, pieces: Sequence[Batch]) -> Sequence[Any]:
        """What each micro-batch has to know of the others, for `losses`; asked where there are several."""
        ...

    def losses(self, batch: Batch, known: Any = None) -> dict[str, Tensor]:
        """Scalars by name, already weighted; their mean over micro-batches and ranks is the global batch's loss.

        `known` is what `survey` said of this micro-batch; None where it is a rank's whole slice.
        """
        ...

    def parameter_groups(self) -> list[Group]:
        """Every trainable parameter in one group."""
        ...

    def bare_parameters(self) -> list[nn.Parameter]:
        """Parameters that the losses read, or differentiate by, outside the forward pass of the module they are in."""
        ...


def build_task(config: PretrainConfig, device: torch.device, tokenizer_folder: Path | None = None) -> Task:
    """The task of a config, its model freshly drawn from the config's seed or started from `init`, on `device`.

    Raises UserError if the teacher, tokenizer or checkpoint that it names does not fit.
    """
    torch.manual_seed(derive(config.seed, "model"))
    if config.task == "stage1":
        return Stage1(config, device)
    if tokenizer_folder is None:
        raise UserError("stage2 reads text and has no tokenizer.", "Give `tokenizer`, a folder that holds one.")
    return Stage2(config, device, tokenizer_folder)


class Stage1:
    """Masked video modelling: the visible tokens of the student towards the teacher's."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.see = Sight(config, device)
        self.encoder = VideoMamba(self.see.vision)
        self.model: nn.Module = self.encoder
        if config.init is not None:
            log.info("init: %s", load_init(self.encoder, config.init))
        self.encoder.to(device)
        self.meta = ModelMeta(kind="vision", vision=self.see.vision)
        self.preprocess = Preprocess(visual=self.see.visual)
        self.tokenizer_folder: Path | None = None
        self.metrics: dict[str, Tensor] = {}
        self.words: int | None = None

    def parameter_groups(self) -> list[Group]:
        """By the rules of groups.py."""
        return parameter_groups(self.encoder.named_parameters(), self.config.optim, self.config.rate_scale)

    def bare_parameters(self) -> list[nn.Parameter]:
        """None: everything is read by its own module."""
        return []

    def survey(self, pieces: Sequence[Batch]) -> Sequence[None]:
        """Nothing: equally many tokens of every sample are aligned, so the mean of means is the mean."""
        return [None] * len(pieces)

    def losses(self, batch: Batch, known: None = None) -> dict[str, Tensor]:  # noqa: ARG002
        """`alignment`, weighted."""
        frames_BCTHW, seeds_B = batch.frames.to(self.device), batch.seeds.to(self.device)
        shown = self.see.show(frames_BCTHW, seeds_B, batch)
        seen = self.see.look(self.encoder, frames_BCTHW, seeds_B, shown)
        return {"alignment": self.see.align(self.encoder, seen, shown)}
