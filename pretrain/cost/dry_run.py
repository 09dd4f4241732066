"""The memory of a step, by a dry run of it: the task's own losses and their backward pass on fake tensors.

Every tensor that the step would make is made without memory and counted while it lives, so what autograd keeps, what
autocast copies and what activation checkpointing spares are in the sum as torch has them, with no formula to go wrong
when the model changes.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from data_pipeline.schema import Kind
from pretrain.config import PretrainConfig
from pretrain.cost.paper import fake_tensors, fill_with_fakes, paper_batch, paper_task, teacher_on_paper


@dataclass(frozen=True)
class DryRun:
    """Bytes on one device: what is always there, and what a step adds at the moment when it holds the most.

    `gradients` are those that are there at that moment (in a step without accumulation few are, when the graph is
    largest), `activations` all the rest, frames and temporary values included. `whole_gradients` are all of them.
    """

    parameters: int
    trained: int
    weights: int
    teacher: int
    gradients: int
    activations: int
    whole_gradients: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it that still live; `peak` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count what it made."""
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return out

    def count(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until it is given back, once however many tensors share it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients
        weakref.finalize(storage, self._forget, key)

    def arrived(self, parameter: Tensor) -> None:
        """A parameter has its gradient, and keeps it."""
        self.gradients += parameter.numel() * parameter.element_size()

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


def dry_run(config: PretrainConfig, kind: Kind, clips: int, words: int, gpu: bool, rounds: int = 1) -> DryRun:
    """A step over `clips` samples of a kind at once on one device, `rounds` of them one after another.

    Gradients of an earlier round are there while a later one runs, as in a step that accumulates.
    """
    teacher = teacher_on_paper(config)
    task = paper_task(config, words, teacher)
    with fake_tensors(gpu):
        model = task.model.train()
        fill_with_fakes(model)
        if teacher is not None:
            fill_with_fakes(teacher.visual)
        cached = config.teacher is not None and config.teacher.cache is not None
        tower = 0 if teacher is None or cached else _bytes(teacher.visual)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with LiveBytes() as live:
            for number in range(rounds):
                if not number:
                    for parameter in trained:
                        parameter.register_post_accumulate_grad_hook(live.arrived)
                batch = paper_batch(config, kind, clips)
                with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                    losses = task.losses(batch)
                total = torch.stack([loss.float() for loss in losses.values()]).sum()
                total.backward()
                del losses, total, batch
        return DryRun(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            trained=sum(parameter.numel() for parameter in trained),
            weights=_bytes(model),
            teacher=tower,
            gradients=live.gradients_at_peak,
            activations=live.peak - live.gradients_at_peak,
            whole_gradients=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        )


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
