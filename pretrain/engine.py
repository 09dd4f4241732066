"""DeepSpeed around a task: one step's backward passes, gradient norm, clipping and update, whatever the ZeRO stage.

What DeepSpeed does is set here and in configs/deepspeed/NAME.json, and nowhere else. Three of its habits matter:
it clips gradients to 1.0 unless told otherwise; it applies a step that is not finite (ZeRO 0) or skips it in
silence (1 to 3), so the norm is asked for before the update; and with one process it would flatten and copy every
gradient only to reduce it with nobody.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.loader import Batch
from pretrain.config import DEEPSPEED, PretrainConfig
from pretrain.distributed import quiet_deepspeed
from pretrain.optim import Optimizer, set_learning_rates
from pretrain.tasks import Task


class _Trained(nn.Module):
    """What DeepSpeed wraps: the task's model, whose forward pass is the task's losses."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._losses = task.losses

    def forward(self, batch: Batch, known: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the task's losses, and each of them without gradient."""
        losses = {name: loss.float() for name, loss in self._losses(batch, known).items()}
        return torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()}


def settings(config: PretrainConfig, ranks: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a run: the named file, and what the run's config implies."""
    named: dict[str, Any] = json.loads((DEEPSPEED / f"{config.deepspeed}.json").read_text())
    share = config.data.batch // ranks
    micro = config.micro_batch or share
    clips = config.zero_stage > 0 and config.optim.clip_norm is not None
    return named | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
        "gradient_clipping": config.optim.clip_norm if clips else 0.0,
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }


class Engine:
    """A task under training. Every rank calls the same methods in the same order: backward, gradient_norm, step."""

    def __init__(self, config: PretrainConfig, task: Task, ranks: int) -> None:
        optim = config.optim
        self.task, self.rounds = task, config.precision == "bf16"
        self.stage, self.micro, self.limit = config.zero_stage, config.micro_batch, optim.clip_norm
        optimizer = Optimizer(task.parameter_groups(), optim.betas, optim.eps, optim.momentum)
        self.deepspeed, *_ = quiet_deepspeed().initialize(
            model=_Trained(task), optimizer=optimizer, config=settings(config, ranks)
        )
        self.parameters = [p for p in self.deepspeed.module.parameters() if p.requires_grad]
        self.reduces = ranks > 1 or self.stage > 0
        self.deepspeed.enable_backward_allreduce = self.reduces

    def set_learning_rates(self, factor: float) -> dict[str, float]:
        """Every group's base rate times `factor`; the rates by group name."""
        return set_learning_rates(self.deepspeed.basic_optimizer, factor)

    def backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of this rank's batch, a micro-batch at a time, reduced over ranks; this rank's mean losses."""
        micro = self.micro or len(batch)
        parts = len(batch) // micro
        pieces = [batch] if parts == 1 else [batch.part(n * micro, (n + 1) * micro) for n in range(parts)]
        sums: dict[str, Tensor] = {}
        for number, (piece, known) in enumerate(zip(pieces, self._survey(pieces), strict=True)):
            self.deepspeed.set_gradient_accumulation_boundary(number == parts - 1)
            loss, losses = self.deepspeed(piece, known)
            self.deepspeed.backward(loss / parts, scale_wrt_gas=False)
            for name, value in losses.items():
                sums[name] = sums[name] + value / parts if name in sums else value / parts
        if not self.reduces:
            for parameter in self.parameters:  # as the reduction does: a gradient that nobody gave is zero, not absent
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return sums

    def _survey(self, pieces: Sequence[Batch]) -> Sequence[Any]:
        """What the task's micro-batches have to know of one another; nothing where there is one alone."""
        if len(pieces) == 1:
            return [None]
        # No cache of rounded weights: one made where no graph is wanted would be found where one is.
        with torch.autocast(self.deepspeed.device.type, torch.bfloat16, enabled=self.rounds, cache_enabled=False):
            return self.task.survey(pieces)

    def gradient_norm(self) -> Tensor:
        """The norm of the whole reduced gradient before clipping, a scalar, the same on every rank."""
        optimizer = self.deepspeed.optimizer
        if self.stage == 0:
            return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.stage == 3:
            from deepspeed.runtime.utils import get_global_norm

            return torch.as_tensor(get_global_norm(optimizer._get_norm_groups()))
        return torch.as_tensor(optimizer.scaled_global_norm())

    def step(self, norm: Tensor) -> None:
        """Clip the gradient, whose norm is `norm`, and update the weights; with ZeRO, DeepSpeed clips as it updates."""
        if self.limit is not None and self.stage == 0:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_mul_(gradients, (self.limit / (norm + 1e-6)).clamp(max=1.0))
        self.deepspeed.step()
