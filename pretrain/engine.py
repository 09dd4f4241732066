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
from pretrain.config_checks import micro_batch
from pretrain.distributed import quiet_deepspeed
from pretrain.ema import Ema
from pretrain.models.videomamba import Block
from pretrain.optim import build_optimizer, set_learning_rates
from pretrain.tasks import Task
from pretrain.zero import clear_gradients, gradient_norm, held


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
    micro = micro_batch(config, share)
    clips = config.zero_stage > 0 and config.optim.clip_norm is not None
    if config.zero_stage > 0 and config.optim.method == "muon":
        # a rank orthogonalises whole matrices, of which it would get its own pieces alone
        named["zero_optimization"] |= {"reduce_scatter": False}
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
    """A task under training. Every rank calls the same methods in the same order: backward, gradient_norm, step.

    `discard` instead of `step` leaves everything as it was before `backward`. `ema` is the average of the weights,
    where the run keeps one.
    """

    def __init__(self, config: PretrainConfig, task: Task, ranks: int) -> None:
        optim = config.optim
        self.config, self.task, self.rounds = config, task, config.precision == "bf16"
        self.stage, self.limit = config.zero_stage, optim.clip_norm
        named = [(name, p) for name, p in task.model.named_parameters() if p.requires_grad]
        if config.compile:
            compile_blocks(task.model)
        if self.stage == 3:  # a block reads its parts' weights by itself, so that ZeRO has to fetch it as one
            quiet_deepspeed().utils.set_z3_leaf_modules(task.model, [Block])
        deepspeed = quiet_deepspeed()
        optimizer = build_optimizer(task.parameter_groups(), optim, self.stage)
        self.deepspeed, *_ = deepspeed.initialize(
            model=_Trained(task), optimizer=optimizer, config=settings(config, ranks)
        )
        self.parameters = [parameter for _, parameter in named]
        self.ema = Ema(named, optim.ema_decay) if optim.ema_decay is not None else None
        self.reduces = ranks > 1 or self.stage > 0
        self.deepspeed.enable_backward_allreduce = self.reduces

    def set_learning_rates(self, factor: float) -> dict[str, float]:
        """Every group's base rate times `factor`; the rates by group name."""
        return set_learning_rates(self.deepspeed.basic_optimizer, factor)

    def backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of this rank's batch, a micro-batch at a time, reduced over ranks; this rank's mean losses."""
        micro = micro_batch(self.config, len(batch))
        parts = len(batch) // micro
        pieces = [batch] if parts == 1 else [batch.part(n * micro, (n + 1) * micro) for n in range(parts)]
        sums: dict[str, Tensor] = {}
        if self.stage == 3:
            clear_gradients(self.deepspeed, self.parameters)
        with held(self.task.bare_parameters()):
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
        return gradient_norm(self.deepspeed, self.parameters)

    def step(self, norm: Tensor) -> None:
        """Clip the gradient, whose norm is `norm`, and update the weights; with ZeRO, DeepSpeed clips as it updates."""
        if self.limit is not None and self.stage == 0:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_mul_(gradients, (self.limit / (norm + 1e-6)).clamp(max=1.0))
        self.deepspeed.step()
        if self.ema is not None:
            self.ema.update()

    def discard(self) -> None:
        """Take no step: weights, optimizer and average stay, and the gradients are gone."""
        clear_gradients(self.deepspeed, self.parameters)


def compile_blocks(model: nn.Module) -> None:
    """Have torch.compile make the encoder's blocks, which are alike, so that one compilation does for all.

    The text layers stay as they are: dropout inside them has to fall alike with and without a graph.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()
