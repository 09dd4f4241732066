"""In-loop evaluation: what the trainer asks of an evaluator, which it neither has nor imports.

An evaluator measures the model as it stands, on all ranks together, and gives numbers by name. Whoever starts a
training joins one to it (the `videomamba` command: videomamba/joined.py). Training goes on afterwards as if nothing had
been: random state and modules are put back, and the order of the data is a function of the step alone.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from configs.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.distributed import all_reduce_max
from pretrain.stopping import StopRequests
from pretrain.tasks import Task

Agreed = Callable[[], bool]
"""Whether any rank was asked to stop; every rank calls it at the same moments."""


class Evaluator(Protocol):
    """Measures a run's model; every rank calls it, and every rank gets the same numbers."""

    def __call__(self, stopping: Agreed) -> dict[str, float] | None:
        """Numbers by name (such as t2v_R@1); None where `stopping()` became true, and nothing was measured."""
        ...


Factory = Callable[[PretrainConfig, Task], Evaluator]
"""Makes the evaluator that `config.evaluate` asks for; UserError where it cannot begin."""


class Evaluation:
    """The evaluations of a run: when they are due, and their numbers as a line of the log."""

    def __init__(
        self, config: PretrainConfig, task: Task, make: Factory | None, requests: StopRequests, device: torch.device
    ) -> None:
        self.every = None if config.evaluate is None else config.evaluate.every_steps
        self.task, self.requests, self.device = task, requests, device
        self.evaluator: Evaluator | None = None
        if self.every is not None:
            if make is None:
                raise UserError(
                    "The config asks for an evaluation while training, and nobody gave the trainer an evaluator.",
                    "Start the run with `videomamba pretrain`, give train(..., evaluator=...), or set evaluate=null.",
                )
            self.evaluator = make(config, task)

    def due(self, step: int) -> bool:
        """Whether the model is to be measured after so many steps."""
        return self.every is not None and step % self.every == 0

    def line(self, step: int, samples: int) -> dict[str, Any] | None:
        """Measure the model now; None where a wish to stop came meanwhile. Every rank calls this."""
        assert self.evaluator is not None  # it is due
        began = time.perf_counter()
        with undisturbed(self.task):
            found = self.evaluator(self._stopping)
        if found is None:
            return None
        seconds = round(time.perf_counter() - began, 3)
        return {"step": step, "samples": samples, "evaluation": found, "seconds": seconds}

    def _stopping(self) -> bool:
        asked = any(self.requests.told().values())
        return bool(all_reduce_max(torch.tensor(float(asked), device=self.device)))


@contextmanager
def undisturbed(task: Task) -> Iterator[None]:
    """The task's model in eval mode, and all random state and modes of modules as they were afterwards."""
    modes = [(module, module.training) for module in task.model.modules()]
    ours, theirs = random.getstate(), np.random.get_state()
    task.model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(ours)
        np.random.set_state(theirs)
