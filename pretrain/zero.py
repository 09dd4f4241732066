"""Where DeepSpeed keeps gradients and weights at each ZeRO stage, for what it has no public call for.

Read in 0.19.8: stage 0 leaves gradients on the parameters; 1 and 2 gather this rank's share in
`averaged_gradients`; 3 keeps shares of weights (`ds_tensor`) and of gradients, one flat buffer of the latter for the
whole run. That buffer is written only where a parameter got a gradient, so that one which a step leaves unused (a
temporal embedding, in a step of images) would be updated by what an earlier step left there: it is cleared first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.distributed import world_size


def gradient_norm(engine: Any, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of the whole reduced gradient, a scalar, the same on every rank; with Muon at 1 and 2, of its update.

    Infinite where it is not finite.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    from deepspeed.runtime.utils import get_global_norm

    optimizer = engine.optimizer
    norm = optimizer.scaled_global_norm() if stage < 3 else get_global_norm(optimizer._get_norm_groups())
    return torch.as_tensor(norm)


def clear_gradients(engine: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Forget what the backward passes since the last update have left, as if there had been none."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        for parameter in parameters:
            parameter.grad = None
        return
    optimizer.zero_grad(set_to_none=True)
    if stage == 3:
        optimizer.grad_partitions_flat_buffer.zero_()
        optimizer.averaged_gradients = {}
        return
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    optimizer._release_preflattened_grad_buffers()
    for group in optimizer.averaged_gradients:
        optimizer.averaged_gradients[group] = None
        optimizer.all_grad_tensors[group] = None


HELD = "held by the trainer"


@contextmanager
def held(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Have these whole on every rank meanwhile, where ZeRO 3 has cut them; every rank calls this.

    For parameters that a loss reads or differentiates by outside the module that owns them. DeepSpeed lets go of a
    parameter when no module is at work with it, so here one more is said to be.
    """
    cut: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    if not cut:
        yield
        return
    cut[0].all_gather(param_list=cut)
    for parameter in cut:
        parameter.ds_active_sub_modules.add(HELD)
    try:
        yield
    finally:
        for parameter in cut:
            parameter.ds_active_sub_modules.discard(HELD)
        cut[0].partition(param_list=cut)


def own_share(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a weight: all of it, and with ZeRO 3 its flat share, padded to equal lengths."""
    share: Tensor = getattr(parameter, "ds_tensor", parameter).data
    return share


def whole(share: Tensor, parameter: nn.Parameter) -> Tensor:
    """A tensor of the parameter's shape of which every rank holds its `share`; every rank calls this."""
    if not hasattr(parameter, "ds_tensor"):
        return share
    shares = [torch.empty_like(share) for _ in range(world_size())]
    if len(shares) > 1:
        torch.distributed.all_gather(shares, share.contiguous())
    else:
        shares = [share]
    return torch.cat(shares)[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]


def share_of(value: Tensor, parameter: nn.Parameter, rank: int) -> Tensor:
    """This rank's share of a whole tensor: the other way round."""
    if not hasattr(parameter, "ds_tensor"):
        return value
    size = parameter.ds_tensor.numel()
    mine = value.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(mine, (0, size - mine.numel()))
