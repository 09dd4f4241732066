"""What a checkpoint says about itself: meta.json and preprocess.json as values."""

import platform
from importlib.metadata import version
from typing import Any, Literal

import torch

from configs.loader import Frozen
from data_pipeline.preprocess import TextPreprocess, VisualPreprocess
from pretrain.models.config import JointConfig, VisionConfig

FORMAT = 2
"""Format 1 kept DeepSpeed's own files, cut for one number of ranks: its weights are read, no run goes on from it."""


class Preprocess(Frozen):
    """Everything a model's inputs went through: pixels, and captions where it reads them."""

    visual: VisualPreprocess
    text: TextPreprocess | None = None


class ModelMeta(Frozen):
    """The model as it was built, with what only the run knew (such as the teacher's width) filled in."""

    kind: Literal["vision", "joint"]
    vision: VisionConfig
    joint: JointConfig | None = None


class Imported(Frozen):
    """Where the weights of an imported checkpoint come from: a published file, and what was done to its tensors."""

    file: str
    sha256: str
    layout: str
    target: str
    notes: tuple[str, ...] = ()


class Meta(Frozen):
    """meta.json: where the run stood, what was built, and what every file must hash to.

    `ranks` and `zero_stage` tell who wrote it; any others can read it. `metrics` are numbers of the step by name.
    """

    format: int = FORMAT
    step: int
    task: str
    config: str
    ranks: int
    zero_stage: int
    model: ModelMeta
    counters: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    imported: Imported | None = None
    versions: dict[str, str]
    files: dict[str, str] = {}


def versions() -> dict[str, str]:
    """The versions that wrote a checkpoint."""
    return {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": version("deepspeed")}
