"""A step that was not finite, taken again with hooks that say where it began: same batch, same seeds, same rank.

What is looked at, in this order, and the first that is not finite is reported: the weights themselves; each module's
output, innermost first, as the forward pass makes it; the losses; then, as the backward pass goes, the gradient of
each module's output and of each parameter. The step is undone afterwards, as if it had not been taken.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data_pipeline.loader import Batch
from pretrain import distributed
from pretrain.engine import Engine
from pretrain.zero import own_share

SHOWN = 8  # keys of samples in a message


@dataclass
class Finding:
    """The first things on one rank that were not finite; None and empty for what was."""

    weight: str | None = None
    output: str | None = None
    loss: list[str] = field(default_factory=list)
    output_gradient: str | None = None
    parameter_gradient: str | None = None
    keys: list[str] = field(default_factory=list)

    @property
    def place(self) -> int:
        """How near the beginning it was: 0 is a weight, and 4 nothing at all."""
        found = (self.weight, self.output, self.loss, self.output_gradient or self.parameter_gradient, True)
        return next(number for number, what in enumerate(found) if what)

    def told(self) -> str:
        """In words: module, parameter and samples."""
        seen = [f"the weight {self.weight} (module {_module_of(self.weight)})"] if self.weight else []
        if self.output and not self.weight:
            seen.append(f"the output of module {self.output}, whose weights are finite")
        if self.loss and not (self.output or self.weight):
            seen.append(f"the loss {', '.join(self.loss)}, of outputs that are finite")
        if self.output_gradient and self.place == 3:
            seen.append(f"the gradient of module {self.output_gradient}'s output")
        if self.parameter_gradient:
            module = _module_of(self.parameter_gradient)
            seen.append(f"the gradient of parameter {self.parameter_gradient} (module {module})")
        if not seen:
            return "nothing: every weight, output, loss and gradient is finite by itself, but their norm is not"
        return ", then ".join(seen)


class _Watch:
    """Hooks on a model that fill a Finding while a step is taken."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, Finding()
        self.piece: Batch | None = None

    @contextmanager
    def around(self, trained: nn.Module) -> Iterator[Finding]:
        """Watch `model`, whose losses `trained` computes from (batch, what it knows)."""
        handles: list[RemovableHandle] = [trained.register_forward_pre_hook(self._begin)]
        handles.append(trained.register_forward_hook(self._losses))
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_hook(self._output_hook(name or "the whole model")))
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_hook(self._parameter_hook(name)))
        try:
            yield self.found
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.piece = args[0]

    def _losses(self, _module: nn.Module, _args: Any, out: tuple[Tensor, dict[str, Tensor]]) -> None:
        bad = [name for name, value in out[1].items() if not bool(value.isfinite())]
        if bad and not self.found.loss:
            self.found.loss = bad
            self._blame(None)

    def _output_hook(self, name: str) -> Any:
        def look(_module: nn.Module, _args: Any, out: Any) -> None:
            if self.piece is None:  # a survey, whose passes are made again with a graph
                return
            for value in _tensors(out):
                if self.found.output is None and not bool(value.isfinite().all()):
                    self.found.output = name
                    self._blame(value)
                if value.requires_grad:
                    value.register_hook(self._gradient_hook(name))

        return look

    def _gradient_hook(self, name: str) -> Any:
        def look(gradient: Tensor) -> None:
            if self.found.output_gradient is None and not bool(gradient.isfinite().all()):
                self.found.output_gradient = name
                self._blame(gradient)

        return look

    def _parameter_hook(self, name: str) -> Any:
        def look(gradient: Tensor) -> None:
            if self.found.parameter_gradient is None and not bool(gradient.isfinite().all()):
                self.found.parameter_gradient = name
                self._blame(None)

        return look

    def _blame(self, value: Tensor | None) -> None:
        """Note the samples whose rows are not finite, or all where rows are not samples; the first time alone."""
        if self.found.keys or self.piece is None:
            return
        keys = self.piece.keys
        if value is not None and value.ndim > 0 and len(value) == len(keys):
            bad_B = ~value.detach().isfinite().reshape(len(keys), -1).all(1)
            keys = [key for key, bad in zip(keys, bad_B.tolist(), strict=True) if bad]
        self.found.keys = list(keys)


def find_in_replay(engine: Engine, batch: Batch, seed: int) -> list[Finding]:
    """Take the step of `batch` again and undo it; what each rank found, in rank order. Every rank calls this."""
    engine.discard()
    torch.manual_seed(seed)
    with _Watch(engine.task.model).around(engine.deepspeed.module) as found, torch.compiler.set_stance("force_eager"):
        engine.backward(batch)
    for name, parameter in engine.task.model.named_parameters():
        held = (
            parameter.detach(),
            own_share(parameter),
        )  # with ZeRO 3 the first may be empty, or whole beside its share
        if found.weight is None and not all(bool(values.isfinite().all()) for values in held):
            found.weight = name
    engine.discard()
    found.keys = (found.keys or list(batch.keys))[:SHOWN]
    everyone: list[Finding] = distributed.gather_objects(found)
    return everyone


def _tensors(out: Any) -> list[Tensor]:
    """The floating tensors in a module's output."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, (tuple, list)):
        return [tensor for part in out for tensor in _tensors(part)]
    return [tensor for part in out.values() for tensor in _tensors(part)] if isinstance(out, dict) else []


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0] or "the whole model"
