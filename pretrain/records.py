"""A line of the log: what the steps since the last one measured, averaged (metrics_log.py says what a line holds)."""

import resource
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from pretrain.config import PretrainConfig
from pretrain.launch import World
from pretrain.tasks import Task


class Window:
    """Sums over the steps since the last line, so that a line tells of all of them."""

    def __init__(self) -> None:
        self.steps = 0
        self.skipped = 0
        self.clips = 0
        self.flops = 0.0
        self.samples = self.lost = 0
        self.waited = 0.0
        self.began = time.perf_counter()
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.counts: defaultdict[str, int] = defaultdict(int)

    def add(self, values: dict[str, float], clips: int, waited: float, flops: float, taken: bool = True) -> None:
        """One step: what it measured (a value may be missing in some steps), its clips, seconds of waiting and FLOPs.

        Of a step that was not `taken`, being not finite, the values are left out.
        """
        self.steps += 1
        self.clips += clips
        self.flops += flops
        self.waited += waited
        if not taken:
            self.skipped += 1
            return
        for name, value in values.items():
            self.sums[name] += value
            self.counts[name] += 1

    def means(self) -> dict[str, float]:
        """The mean of every value over the steps that had it."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def reached(self, samples: int, lost: int) -> None:
        """How many samples all ranks have seen and lost since the beginning of the run."""
        self.samples, self.lost = samples, lost

    def pause(self, seconds: float) -> None:
        """Leave so many seconds out of all rates: something else than training was done."""
        self.began += seconds

    def rates(self, ranks: int, steps_left: int, peak: float | None) -> dict[str, float | None]:
        """Seconds a step, clips and FLOPs a second, the share of waiting and of the `peak`, the seconds left."""
        seconds = max(1e-9, time.perf_counter() - self.began)
        used = self.flops / seconds / ranks
        return {
            "step_s": seconds / max(1, self.steps),
            "clips_per_s": self.clips / seconds,
            "clips_per_s_device": self.clips / seconds / ranks,
            "data_wait": self.waited / seconds,
            "tflops_device": used / 1e12,
            "mfu": None if peak is None else used / peak,
            "eta_s": steps_left * seconds / max(1, self.steps),
        }


def record(
    step: int,
    window: Window,
    rates: dict[str, float],
    task: Task,
    config: PretrainConfig,
    world: World,
    peak: float | None = None,
) -> dict[str, Any]:
    """A line of the log, as metrics_log.py describes it."""
    means = window.means()
    losses = {name.removeprefix("loss/"): value for name, value in means.items() if name.startswith("loss/")}
    return {
        "step": step,
        "samples": window.samples,
        "loss": sum(losses.values()) if losses else None,
        "losses": losses,
        "metrics": {name: float(value) for name, value in task.metrics.items()},
        "lr": rates,
        "grad_norm": means.get("grad_norm"),
        "skipped": window.skipped,
        "lost": window.lost,
        **window.rates(world.size, config.steps - step, peak),
        "memory_mb": peak_memory_mb(),
        "memory_now_mb": memory_now_mb(),
    }


def peak_memory_mb() -> float:
    """The most memory used so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_now_mb() -> float:
    """The memory used now, counted alike; of this process its resident pages (Linux)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
