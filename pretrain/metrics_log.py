"""What a run says about itself: log.jsonl always, the console, and TensorBoard and wandb if asked (sinks/).

A line of steps holds, averaged over ranks and over the steps since the last line where it is a mean:

    step, samples             steps taken; samples seen by all ranks since the beginning
    loss, losses, metrics     the weighted sum; each loss, weighted; what the task wants told (the temperature)
    lr                        learning rate by group
    grad_norm                 before clipping
    skipped, lost             steps since the last line that were not finite; samples lost since the beginning
    step_s, eta_s             seconds a step; seconds that are left
    clips_per_s, clips_per_s_device
    data_wait                 the share of time spent waiting for batches
    tflops_device, mfu        FLOPs of the model (cost/step.py) a second and device, in 10^12; their share of the
                              device's peak (cost/devices.py), null where that is not known
    memory_mb, memory_now_mb  of the GPU's allocator, or of this process where there is none: the most, and now
    start, time               the step that this process began at, which shows restarts; seconds since 1970

A line of an evaluation holds step, samples, evaluation (by name), seconds, start and time. Only rank 0 writes.
"""

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from pretrain.config import PretrainConfig
from pretrain.sinks import Line, Sink, flatten
from pretrain.sinks.console import Console
from pretrain.sinks.jsonl import Jsonl, read_log
from pretrain.sinks.tensorboard import TensorBoard
from pretrain.sinks.wandb import Wandb

__all__ = ["MetricsLog", "flatten", "read_log"]


class MetricsLog:
    """The sinks of a run that goes on from step `start`; use as a context. Not `active`, as on all ranks but 0: none.

    Raises UserError, when entered, for wandb that is not installed.
    """

    def __init__(self, folder: Path, start: int, config: PretrainConfig, active: bool = True) -> None:
        self.folder, self.start, self.config, self.active = folder, start, config, active
        self.sinks: list[Sink] = []

    def __enter__(self) -> Self:
        if self.active:
            self.sinks.append(Jsonl(self.folder, self.start))
            if self.config.log.tensorboard:
                self.sinks.append(TensorBoard(self.folder, self.start))
            if self.config.log.wandb is not None:
                self.sinks.append(Wandb(self.folder, self.config))
            self.sinks.append(Console(f"{self.config.task} {self.folder.name}", self.start, self.config.steps))
        return self

    def advance(self, step: int) -> None:
        """A step was taken."""
        for sink in self.sinks:
            sink.advance(step)

    def write(self, line: Line) -> None:
        """One line into every sink; `line` is what this module's head describes, without `start` and `time`."""
        for sink in self.sinks:
            sink.write(line | {"start": self.start, "time": time.time()})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in reversed(self.sinks):
            sink.close()
