"""What every rank measured in a step, brought together, and what becomes of a step that is not finite."""

import logging
import math

import torch
from torch import Tensor

from configs.errors import UserError
from data_pipeline.draws import derive
from data_pipeline.loader import Batch
from pretrain import distributed
from pretrain.config import PretrainConfig
from pretrain.engine import Engine
from pretrain.launch import World
from pretrain.replay import Finding, find_in_replay

log = logging.getLogger(__name__)


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


def step_seed(config: PretrainConfig, step: int, rank: int) -> int:
    """Where torch's own generator starts in a step of a rank."""
    return derive(config.seed, "torch", step, rank)


class Guard:
    """Lets finite steps pass, and replays the others: the run stops there, or skips a few in a row.

    `skipped` counts the skipped steps since this process began.
    """

    def __init__(self, config: PretrainConfig, engine: Engine, world: World) -> None:
        self.config, self.engine, self.world = config, engine, world
        self.skipped = self._in_a_row = 0

    def passes(self, said: dict[str, float], step: int, batch: Batch) -> bool:
        """Whether what all ranks `said` of a step is finite; if not, its gradients are gone, and nothing else.

        Raises UserError (exit code 1), on every rank, where the step may not be skipped.
        """
        if all(math.isfinite(value) for value in said.values()):
            self._in_a_row = 0
            return True
        cause = self._cause(said, step, batch)
        self._in_a_row += 1
        if self.config.nonfinite == "stop" or self._in_a_row > self.config.max_skips:
            row = f" It is the {_nth(self._in_a_row)} in a row." if self.config.nonfinite == "skip" else ""
            raise UserError(
                f"{cause}{row} The step was not applied; the last checkpoint stands.",
                "Mend or remove what is named, lower optim.lr, set optim.clip_norm or use precision=fp32 in a new "
                "run (out=), or go on past such steps with nonfinite=skip.",
                exit_code=1,
            )
        self.skipped += 1
        if self.world.first:
            log.warning("%s The step was skipped (%d so far).", cause, self.skipped)
        return False

    def _cause(self, said: dict[str, float], step: int, batch: Batch) -> str:
        bad = [name for name, value in said.items() if not math.isfinite(value)]
        what = " and ".join(name.removeprefix("loss/") if name != "grad_norm" else "gradient norm" for name in bad)
        everyone = find_in_replay(self.engine, batch, step_seed(self.config, step, self.world.rank))
        return f"Step {step} is not finite ({what}). {blame(everyone)}"


def blame(everyone: list[Finding]) -> str:
    """One sentence on the ranks, of all in rank order, whose finding lies nearest to the beginning of the step."""
    first = min(finding.place for finding in everyone)
    guilty = [(rank, finding) for rank, finding in enumerate(everyone) if finding.place == first]
    rank, finding = guilty[0]
    others = f" (and on {len(guilty) - 1} more)" if len(guilty) > 1 else ""
    return f"Replayed on rank {rank}{others}, it began with {finding.told()}; samples {', '.join(finding.keys)}."


def _nth(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if 10 < number % 100 < 14 else endings.get(number % 10, 'th')}"
