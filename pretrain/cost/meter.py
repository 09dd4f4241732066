"""How much of its device a run uses: FLOPs of every step, and the peak that they are measured against."""

import logging
from functools import lru_cache

import torch

from data_pipeline.schema import Kind
from pretrain.config import PretrainConfig
from pretrain.cost.devices import find_peak
from pretrain.cost.measure import frame_flops
from pretrain.cost.step import step_flops
from pretrain.sight import Sight

log = logging.getLogger(__name__)


class Meter:
    """FLOPs of the model in a step of `config`, whose student and teacher are those of `see`."""

    def __init__(self, config: PretrainConfig, see: Sight, device: torch.device) -> None:
        self.config, self.see = config, see
        live = see.teacher is not None and see.cache is None
        self.teacher_frame = frame_flops(see.teacher) if live and see.teacher is not None else 0.0
        self.peak = find_peak(device, config.precision)
        self.flops = lru_cache(self._flops)

    def _flops(self, kind: Kind, samples: int, words: int | None) -> float:
        """Of a global batch of so many samples, whose captions are `words` tokens long."""
        parts = step_flops(self.config, self.see.vision, kind, samples, words, self.teacher_frame)
        return sum(part.model for part in parts)

    def announce(self) -> None:
        """Say what utilisation will be measured against, or why it will not be."""
        if self.peak.flops is None:
            log.info("model FLOPs utilisation is not given: %s", self.peak.source)
        else:
            log.info("peak of this device: %.4g TFLOP/s (%s)", self.peak.flops / 1e12, self.peak.source)
