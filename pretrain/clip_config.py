"""The run of a small CLIP as a value; importing this needs no torch."""

from pydantic import Field

from configs.loader import Frozen
from data_pipeline.config import DataConfig


class ClipTinyConfig(Frozen):
    """A small CLIP and how to train it; widths in channels, learning rate for AdamW."""

    out: str
    data: DataConfig
    seed: int = 0
    steps: int = Field(gt=0)
    width: int = 128
    layers: int = 3
    text_layers: int = 2
    head_width: int = 32
    embed: int = 128
    patch_size: int = 16
    max_tokens: int = 32
    lr: float = 1.5e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    log_every: int = 20
    vocab_size: int = 2000
