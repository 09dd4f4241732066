"""What tests plant in a rank before it trains (on_ranks.py calls these by name, in the rank's own process)."""

import hashlib
import json
import logging
import os
import signal
from pathlib import Path

import torch

from pretrain import finite, trainer
from pretrain.zero import own_share

BATCH, GRADIENT, WEIGHT = 1, 3, 5
"""The steps in which something is not finite; the weight stays so."""

POISONED = "layers.1.norm.weight"


def eager() -> None:
    """Let nothing be compiled, which would take a minute."""
    torch.compiler.set_stance("force_eager")


def stop_after_two_steps() -> None:
    """Ask for a stop as the second batch of this process comes."""
    loader_type = trainer.TrainLoader

    class Loader(loader_type):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == 1:
                    signal.raise_signal(signal.SIGUSR2)
                yield batch

    trainer.TrainLoader = Loader


def not_finite() -> None:
    """On the last rank: a NaN in the second sample of a batch, in a gradient, in a weight. What was said is kept."""
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    now = {"step": 0}
    build_task, loader_type, passes = trainer.build_task, trainer.TrainLoader, finite.Guard.passes
    parameters = {}

    def build(config, device, tokenizer):
        _keep_what_is_said(Path(config.out))
        task = build_task(config, device, tokenizer)
        parameters.update(task.model.named_parameters())

        def poison(gradient):
            return gradient * float("nan") if last and now["step"] == GRADIENT else gradient

        parameters[POISONED].register_hook(poison)
        return task

    class Loader(loader_type):
        def __iter__(self):
            for batch in super().__iter__():
                now["step"] = batch.step
                if last and batch.step == BATCH:
                    batch.frames = batch.frames.float()
                    batch.frames[1] = float("nan")
                if last and batch.step == WEIGHT:
                    for held in (own_share(parameters[POISONED]), parameters[POISONED].data):
                        held.view(-1)[:1] = float("nan")  # ZeRO 3 keeps small weights whole beside their shares
                yield batch

    def watched(guard, said, step, batch):
        before = _digest(guard.engine)
        passed = passes(guard, said, step, batch)
        if not passed:
            line = {"step": step, "keys": batch.keys, "untouched": before == _digest(guard.engine)}
            with (Path(guard.config.out) / f"skipped.{guard.world.rank}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        return passed

    trainer.build_task, trainer.TrainLoader, finite.Guard.passes = build, Loader, watched


def _keep_what_is_said(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("pretrain.finite")
    logger.addHandler(logging.FileHandler(folder / f"warnings.{os.environ['RANK']}.log"))


def _digest(engine) -> str:
    """Of everything that an update changes: weights, DeepSpeed's masters, the optimizer's state, the average."""
    found = hashlib.sha256()
    tensors = [own_share(p) for p in engine.parameters]
    for group in engine.deepspeed.basic_optimizer.param_groups:
        tensors += [p.detach() for p in group["params"]]
    for state in engine.deepspeed.basic_optimizer.state.values():
        tensors += [torch.as_tensor(value) for value in state.values()]
    tensors += engine.ema.state_dict().values()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
