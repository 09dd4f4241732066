"""A run's task on paper: the very modules that it would train, without memory for their weights and without data.

Modules are made on the meta device and every tensor that passes through them is a fake one, which has a shape, a type
and a size but no numbers. What a run would read from disk (a teacher's weights, a tokenizer, cached features) is not
asked for: only the teacher's configuration is.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pretrain.ops.bidirectional as together
import pretrain.ops.dispatch as kernels
from configs.errors import UserError
from data_pipeline.batches import Batch
from data_pipeline.schema import Kind
from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.config import PretrainConfig
from pretrain.losses import gather_visible, mlm_loss
from pretrain.models.config import JointConfig
from pretrain.models.joint import JointModel
from pretrain.models.teacher import LOCAL, ClipTeacher
from pretrain.models.videomamba import VideoMamba
from pretrain.pairs import Known, Text, over_ranks
from pretrain.sight import Shown, Sight, teacher_options
from pretrain.stage2 import Stage2
from pretrain.tasks import Stage1

CPU = torch.device("cpu")


def teacher_on_paper(config: PretrainConfig) -> ClipTeacher | None:
    """The teacher that a config names, without weights; None where it names none.

    Raises UserError where neither a folder nor open_clip knows the source: an address cannot be asked offline.
    """
    rule, vision = config.teacher, config.vision
    if rule is None:
        return None
    settings = _model_config(rule.source)
    ensure_torchvision()
    from open_clip.model import _build_vision_tower

    with torch.device("meta"):
        visual = _build_vision_tower(
            settings["embed_dim"], settings["vision_cfg"], bool(settings.get("quick_gelu", False))
        )
    return ClipTeacher(visual, **teacher_options(rule, vision))


def _model_config(source: str) -> dict[str, Any]:
    """open_clip's configuration of a model: from a folder that it wrote, else by its name."""
    written = Path(source.removeprefix(LOCAL)) / "open_clip_config.json"
    if written.is_file():
        return dict(json.loads(written.read_text())["model_cfg"])
    ensure_torchvision()
    import open_clip

    found = None if ":" in source else open_clip.get_model_config(source)  # an address would be asked for online
    if found is None:
        raise UserError(
            f"The teacher '{source}' is neither a folder that open_clip wrote nor a model that it knows by name.",
            "Give teacher.source=NAME of the same architecture to plan with (such as ViT-B-16-quickgelu).",
        )
    return dict(found)


class PaperSight(Sight):
    """Teacher and mask of a run; cached features are there without a cache."""

    def __init__(self, config: PretrainConfig, teacher: ClipTeacher | None) -> None:
        self.mask, self.visual, self.alignment = config.mask, config.data.visual(), config.losses.alignment
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.patches = (config.vision.image_size // config.vision.patch_size,) * 2
        self.teacher, self.cache, self.tubelet = teacher, None, config.vision.tubelet
        self.cached = config.teacher is not None and config.teacher.cache is not None
        self.layers = config.teacher.layers if config.teacher is not None else 0
        self.vision = self._vision(config)

    def show(self, frames_BCTHW: Tensor, seeds_B: Tensor, batch: Batch) -> Shown:
        """As the run's own. Of a teacher that takes the frames in many chunks one is run: the others are alike."""
        if self.teacher is None:
            return super().show(frames_BCTHW, seeds_B, batch)
        clips, frames = len(frames_BCTHW), frames_BCTHW.shape[2]
        if not self.cached:
            at_once = max(1, self.teacher.chunk // frames)
            if clips <= 2 * at_once:
                return super().show(frames_BCTHW, seeds_B, batch)
            self.teacher(frames_BCTHW[:at_once])
        grid = max(1, frames // self.tubelet), self.patches[0] * self.patches[1]
        visible_BV = self._visible(frames, seeds_B, torch.zeros(clips, *grid))
        if not self.alignment.weight:
            return Shown(visible_BV, None)
        target_JBLC = torch.zeros(self.layers, clips, 1 + grid[0] * grid[1], self.teacher.width)
        return Shown(visible_BV, target_JBLC if visible_BV is None else gather_visible(target_JBLC, visible_BV))


class PaperStage1(Stage1):
    """Stage 1 without anything from disk."""

    def __init__(self, config: PretrainConfig, teacher: ClipTeacher | None) -> None:
        self.config, self.device = config, CPU
        self.see: PaperSight = PaperSight(config, teacher)
        with torch.device("meta"):
            self.encoder = VideoMamba(self.see.vision)
        self.model: nn.Module = self.encoder
        self.metrics: dict[str, Tensor] = {}


class PaperStage2(Stage2):
    """Stage 2 without anything from disk; every caption is `words` tokens long."""

    def __init__(self, config: PretrainConfig, teacher: ClipTeacher | None, words: int) -> None:
        assert config.text is not None  # the config's rules
        self.config, self.device, self.rules = config, CPU, config.losses
        self.length, self.words = words, words
        self.see = PaperSight(config, teacher)
        text = config.text.model_copy(update={"init": None})
        with torch.device("meta"):
            self.joint = JointModel(JointConfig(vision=self.see.vision, text=text, embed=config.embed))
        self.model: nn.Module = self.joint
        self.metrics: dict[str, Tensor] = {}
        self.pools_all = bool(self.rules.matching.weight) and self.rules.matching.negatives == "global"

    def losses(self, batch: Batch, known: Known | None = None) -> dict[str, Tensor]:
        """As the run's own, with captions that need no tokenizer."""
        if known is None:
            words_BL = torch.ones(len(batch), self.length, dtype=torch.int64)
            text = Text(words_BL.clone(), words_BL, words_BL.clone(), words_BL.clone())
            shown = self.see.show(batch.frames, batch.seeds, batch)
            known = Known(text, shown, torch.ones(()), torch.ones(()), 1)
        return super().losses(batch, known)

    def _mlm(self, text: Text, patches_BVD: Tensor, known: Known) -> Tensor:
        """As the run's own, for as many hidden words as are expected: which ones depends on the data."""
        every = slice(None, None, self.rules.mlm.every)
        texts = len(text.masked_BL[every])
        hidden = max(1, round(texts * (self.length - 1) * self.rules.mlm.probability))
        at: Any = (torch.zeros(hidden, dtype=torch.int64),) * 2
        logits = self.joint.mlm_logits(text.masked_BL[every], text.words_BL[every], patches_BVD[every], at)
        total, _ = mlm_loss(logits, text.label_BL[every][at])
        return over_ranks(total, known.asked, known.parts)


def paper_task(config: PretrainConfig, words: int, teacher: ClipTeacher | None = None) -> PaperStage1 | PaperStage2:
    """The task of a config, its model on the meta device; `teacher` as `teacher_on_paper` gave it."""
    if config.task == "stage1":
        return PaperStage1(config, teacher)
    return PaperStage2(config, teacher, words)


def paper_batch(config: PretrainConfig, kind: Kind, clips: int) -> Batch:
    """A batch of so many samples that holds no data; its tensors are fake where a FakeTensorMode is on."""
    frames = config.vision.frames if kind == "video" else 1
    side = config.vision.image_size
    numbers = torch.zeros(clips, dtype=torch.int64)
    return Batch(
        frames=torch.zeros(clips, 3, frames, side, side, dtype=torch.uint8),
        captions=[""] * clips,
        identity=numbers,
        seeds=numbers.clone(),
        keys=[""] * clips,
        kind=kind,
        step=0,
        corpus=0,
        attributes=[{} for _ in range(clips)],
        all_captions=[("",)] * clips,
        index=numbers.clone(),
    )


def fill_with_fakes(module: nn.Module) -> None:
    """Put fake tensors in the place of a meta module's; call it inside `fake_tensors`. What is shared stays shared."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in made:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            part._parameters[name] = None if parameter is None else made[id(parameter)]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def fake_tensors(gpu: bool) -> Iterator[None]:
    """Inside, tensors have no memory, and our operators are those of a GPU or of the CPU, kernels or not.

    The kernels of a GPU walk one direction at a time and so keep more for the backward pass (ops/bidirectional.py).
    Nothing is computed here, so what is chosen need not be there.
    """
    chosen = "triton" if gpu else "cpu"
    with (
        patch.object(together, "choose_backend", lambda *_: chosen),
        patch.object(kernels, "choose_backend", lambda *_: "cpu"),
        FakeTensorMode(),
    ):
        yield
