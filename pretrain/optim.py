"""One optimizer for every run: AdamW for most parameters and, where a run asks for it, Muon for block matrices.

Muon (https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest
orthogonal one. Here matrices of one shape are stacked and orthogonalised together, since on a CPU, and
for small models on a GPU, the cost is in the calls and not in the arithmetic.

Letters: M matrices of one shape, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pretrain.groups import Group
from pretrain.optim_config import OptimConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration: steepest at zero, so that five steps do."""


def build_optimizer(groups: list[Group], config: OptimConfig, zero_stage: int) -> torch.optim.Optimizer:
    """The optimizer of a run. Where ZeRO cuts matrices into flat pieces, Muon has to be DeepSpeed's own.

    DeepSpeed's orthogonalises as the gradients are reduced, and is asked for the same iteration as ours.
    """
    if config.method == "adamw" or zero_stage == 0:
        optimizer: torch.optim.Optimizer = Optimizer(groups, config.betas, config.eps, config.momentum)
    else:
        optimizer = _deepspeed_muon(groups, config)
    optimizer.register_step_post_hook(_keep_within_bounds)
    return optimizer


@torch.no_grad()
def _keep_within_bounds(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """After an update; with ZeRO it is of the flat masters, from which the weights are copied."""
    for group in optimizer.param_groups:
        if "bounds" in group:
            for parameter in group["params"]:
                parameter.clamp_(*group["bounds"])


def _deepspeed_muon(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        group["use_muon"] = group["method"] == "muon"
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]  # type: ignore[attr-defined]
    own = {"momentum": config.momentum, "ns_method": "standard"}
    auxiliary = {"betas": config.betas, "eps": config.eps}
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(
        [{**group, **(own if group["use_muon"] else auxiliary)} for group in groups],
        adam_optimizer=torch.optim.AdamW,
        adam_optimizer_kwargs=auxiliary,
    )
    return optimizer


class Optimizer(torch.optim.Optimizer):
    """AdamW or Muon by each group's `method`; numerically torch.optim.AdamW and torch.optim.Muon.

    State names are AdamW's own (`step`, `exp_avg`, `exp_avg_sq`) and Muon's (`momentum_buffer`), so that
    DeepSpeed partitions and converts the first, and a reader finds the second where torch keeps it.
    """

    def __init__(
        self,
        groups: list[Group],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ) -> None:
        defaults = {
            "lr": 1e-3,
            "weight_decay": 0.0,
            "betas": betas,
            "eps": eps,
            "momentum": momentum,
            "method": "adamw",
        }
        super().__init__(groups, defaults)  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and group["method"] == "muon":
                self._muon(parameters, group)
            elif parameters:
                self._adamw(parameters, group)
        return loss

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        buffers: list[Tensor] = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffers.append(state["momentum_buffer"])
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"])  # Nesterov
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, parameter in enumerate(parameters):
            by_shape[parameter.shape].append(index)
        for (rows, columns), members in by_shape.items():
            update_MRC = orthogonalise(torch.stack([updates[i] for i in members])).to(parameters[members[0]].dtype)
            chosen = [parameters[i] for i in members]
            torch._foreach_mul_(chosen, 1 - group["lr"] * group["weight_decay"])
            scale = max(1.0, rows / columns) ** 0.5
            torch._foreach_add_(chosen, update_MRC.unbind(), alpha=-group["lr"] * scale)


def orthogonalise(matrices_MRC: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor of each matrix, roughly: singular values of (M, R, C) end between about 0.5 and 1.5.

    `steps` Newton-Schulz iterations in bfloat16 where the device multiplies it natively, else in float32.
    Source: Keller Jordan's post named above; equal to torch.optim.Muon's up to rounding.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices_MRC.size(1) > matrices_MRC.size(2)
    x_MRC = matrices_MRC.to(_product_dtype(matrices_MRC.device))
    if tall:
        x_MRC = x_MRC.mT
    x_MRC = x_MRC / x_MRC.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        gram_MRR = x_MRC @ x_MRC.mT
        polynomial_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c)
        x_MRC = torch.baddbmm(x_MRC, polynomial_MRR, x_MRC, beta=a)
    return x_MRC.mT if tall else x_MRC


def _product_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Give every group its base learning rate times `factor`; returns them by group name."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
