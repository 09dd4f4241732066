"""`videomamba bench trainer`: what our trainer and DeepSpeed add to a bare PyTorch loop over the same model and clips.

Rows `stage1` and `stage2`: milliseconds of a step of ours (the engine's backward, the norm, what ranks tell one
another, the check for numbers that are not finite, the update and the line's sums: all that the training loop does to
a batch) and of the loop of baselines.py, in turns, from equal weights on equal batches that are in memory already.
Before anything is timed, the losses of both are compared. A ratio of 0.93 or more is an overhead of at most 8 %.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from videomamba.bench_plan import TEXT, Shape, build_config, make_batch
from videomamba.bench_table import Row, report, row

if TYPE_CHECKING:
    from data_pipeline.batches import Batch
    from pretrain.config import PretrainConfig

BASELINE = "pytorch"
OPTIM = {"clip_norm": 1.0, "lr": 1e-4}
STAGES: dict[str, Shape] = {
    "stage1": Shape(
        {
            "task": "stage1", "vision": {"depth": 6, "width": 192},
            "mask": {"kind": "tube", "ratio": 0.5}, "optim": OPTIM,
        },
        side=112, frames=8, clips=8, teacher={"width": 64, "layers": 3},
    ),
    "stage2": Shape(
        {
            "task": "stage2", "embed": 64, "text": TEXT, "vision": {"depth": 6, "width": 192},
            "mask": {"kind": "tube", "ratio": 0.5}, "optim": OPTIM,
        },
        side=112, frames=8, clips=8, teacher={"width": 64, "layers": 3},
    ),
}  # fmt: skip


def trainer(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Steps of each, in turns.")] = 41,
) -> None:
    """A step of our trainer on DeepSpeed against a step of a bare PyTorch loop, one process."""
    report("trainer", list(measure(repeats)), json_file)


def measure(repeats: int) -> Iterator[Row]:
    """A row a stage: medians over `repeats` steps of each."""
    for name, shape in STAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            ours, bare = _pair(shape, Path(folder))
            _compare(ours, bare)
            times: tuple[list[float], list[float]] = ([], [])
            for turn in range(repeats):
                pair = ((ours, times[0]), (bare, times[1]))
                for step, kept in pair if turn % 2 else reversed(pair):
                    began = time.perf_counter()
                    step()
                    kept.append((time.perf_counter() - began) * 1000)
        yield row(name, statistics.median(times[0]), statistics.median(times[1]), BASELINE)


def _compare(ours: Callable[[], float], bare: Callable[[], float]) -> None:
    """Three steps of both, whose losses have to agree: they are the warm-up as well."""
    for number in range(3):
        mine, theirs = ours(), bare()
        if abs(mine - theirs) > 2e-2 * abs(theirs):
            raise AssertionError(f"step {number}: our loss is {mine:.5f} and the bare loop's {theirs:.5f}")


def _pair(shape: Shape, folder: Path) -> tuple[Callable[[], float], Callable[[], float]]:
    """A step of ours and one of the baseline's, each with its own copy of one model."""
    import torch

    from pretrain import distributed
    from pretrain.tasks import build_task
    from pretrain.tokenizer import train_tokenizer
    from videomamba.baselines import bare_step
    from videomamba.bench_plan import WORDS

    distributed.init("cpu")
    config = build_config(shape, folder)
    train_tokenizer([" ".join(WORDS)], folder / "tokenizer", 256)
    task = build_task(config, torch.device("cpu"), folder / "tokenizer")
    batch = make_batch(config, shape)
    bare = bare_step(copy.deepcopy(task), batch, config.optim.lr, config.optim.clip_norm or 1.0)
    return _our_step(config, task, batch), bare


def _our_step(config: "PretrainConfig", task: Any, batch: "Batch") -> Callable[[], float]:
    """What the training loop does to a batch, from its random seed to the line's sums."""
    import torch

    from pretrain.cost.meter import Meter
    from pretrain.engine import Engine
    from pretrain.finite import Guard, share, step_seed
    from pretrain.launch import World
    from pretrain.records import Window
    from pretrain.schedule import warmup_cosine

    world, engine = World(), Engine(config, task, 1)
    guard, window = Guard(config, engine, world), Window()
    meter = Meter(config, task.see, torch.device("cpu"))

    def step() -> float:
        torch.manual_seed(step_seed(config, 0, 0))
        engine.set_learning_rates(warmup_cosine(0, config.steps, 0, 1.0))
        values = engine.backward(batch)
        norm = engine.gradient_norm()
        said = share(values, norm, {"stop": 0.0, "interrupt": 0.0}, world)
        if guard.passes(said, 0, batch):
            engine.step(norm)
        window.add(said, len(batch), 0.0, meter.flops(batch.kind, len(batch), task.words))
        return sum(value for name, value in said.items() if name.startswith("loss/"))

    return step
