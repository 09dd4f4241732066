"""What every rank measured in a step, brought together, and the refusal of a step that is not finite."""

import math

import torch
from torch import Tensor

from configs.errors import UserError
from data_pipeline.loader import Batch
from pretrain import distributed
from pretrain.launch import World


def share(values: dict[str, Tensor], norm: Tensor, told: dict[str, float], world: World) -> dict[str, float]:
    """The losses' means over ranks by name (`loss/...`), the norm, and the sums over ranks of what each has `told`."""
    numbers = [*values.values(), norm.to(torch.float32).reshape(())]
    names = [*(f"loss/{name}" for name in values), "grad_norm"]
    if world.size == 1:
        return dict(zip(names, torch.stack(numbers).tolist(), strict=True)) | told
    row = torch.cat([torch.stack(numbers).double().cpu(), torch.tensor([*told.values()], dtype=torch.float64)])
    total = distributed.all_reduce_sum(row.to(norm.device)).tolist()
    means = {name: value / world.size for name, value in zip(names, total[: len(names)], strict=True)}
    return means | dict(zip(told, total[len(names) :], strict=True))


def require_finite(said: dict[str, float], values: dict[str, Tensor], norm: Tensor, step: int, batch: Batch) -> None:
    """Raise UserError on every rank, naming ranks, step and sample keys, unless all losses and the norm are finite."""
    if all(math.isfinite(value) for value in said.values()):
        return
    bad = [name for name, value in values.items() if not bool(value.isfinite())]
    mine = (bad, batch.keys[:8])
    everyone = distributed.gather_objects(mine)
    ranks = {number: entry for number, entry in enumerate(everyone) if entry[0]}
    if ranks:
        seen = "; ".join(f"rank {n}: {', '.join(names)} of {', '.join(keys)}" for n, (names, keys) in ranks.items())
        cause = f"A loss is not finite at step {step} ({seen})."
    else:
        keys = ", ".join(everyone[0][1])
        cause = f"The gradient norm is {float(norm)} at step {step}, with finite losses (rank 0's samples: {keys})."
    raise UserError(
        f"{cause} The step was not applied; the last checkpoint stands.",
        "Lower the learning rate, set optim.clip_norm, or use precision=fp32, with another out=.",
        exit_code=1,
    )
