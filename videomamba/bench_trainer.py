"""`videomamba bench trainer`: what our trainer and DeepSpeed cost over a bare PyTorch loop, on one process.

Rows `stage1` and `stage2` against `pytorch`: the demo's two stages, with AdamW, on clips that are made first, in
milliseconds a step. Both sides train the same model from the same weights on the same batches of the same loader, in
turns of some steps each; their losses are compared before anything is reported. Ours is `videomamba pretrain` itself
with what it writes; the times are those of its own log.
"""

import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from configs.errors import UserError
from configs.loader import load_config
from videomamba.bench_loader import make_clips
from videomamba.bench_table import Row, report, row

if TYPE_CHECKING:
    from pretrain.config import PretrainConfig

Stage = Literal["stage1", "stage2"]


@dataclass(frozen=True)
class Size:
    """How large the measured problem is. The first `window` steps of a turn warm up and are not counted."""

    clips: int = 128
    batch: int = 64
    window: int = 5
    windows: int = 4
    turns: int = 3
    overrides: tuple[str, ...] = ()


QUICK = Size(16, 8, 1, 2, 1, ("vision.depth=1", "vision.width=64", "vision.stem_width=8"))

CLOSE = 0.02
"""How far two mean losses may lie apart. The sides sum gradients in another order, and weights take it further."""


def measure(size: Size, stages: tuple[Stage, ...] = ("stage1", "stage2")) -> Iterator[Row]:
    """A row for each stage."""
    from pretrain.setup import set_threads

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_clips(root / "clips", size.clips, 16, 64, 64)
        _make_teacher(root, size)
        for stage in stages:
            set_threads(_config(stage, root, "bare", size))
            yield _compare(stage, root, size)


def _compare(stage: Stage, root: Path, size: Size) -> Row:
    ours: list[float] = []
    bare: list[float] = []
    for turn in range(size.turns):
        run = _config(stage, root, f"turn{turn}", size)
        times, loss = _run_ours(run)
        other_times, other_loss = _run_bare(run, size)
        if not math.isclose(loss, other_loss, rel_tol=CLOSE):
            raise UserError(
                f"{stage}: the trainer reached a loss of {loss:g} and the bare loop one of {other_loss:g}.",
                "Please report this.",
                exit_code=1,
            )
        ours += times
        bare += other_times
    return row(stage, statistics.median(ours), statistics.median(bare), "pytorch")


def _make_teacher(root: Path, size: Size) -> None:
    """A tiny CLIP of one step: what it knows does not change what it costs."""
    from pretrain.clip_config import ClipTinyConfig
    from pretrain.clip_tiny import train_clip

    made = [
        f"out={root / 'teacher'}",
        f"data.train=[{{path: '{root / 'clips'}'}}]",
        f"data.batch={min(16, size.clips)}",
    ]
    train_clip(load_config("demo/teacher", ClipTinyConfig, [*made, "data.cache=null", "steps=1", "warmup_steps=0"]))


def _config(stage: Stage, root: Path, name: str, size: Size) -> "PretrainConfig":
    """A stage of the demo on the bench's clips."""
    from pretrain.config import PretrainConfig

    steps = size.window * (size.windows + 1)
    overrides = [
        f"out={root / f'{stage}-{name}'}",
        f"data.train=[{{path: '{root / 'clips'}'}}]",
        f"teacher.source={root / 'teacher'}",
        f"data.batch={size.batch}",
        f"steps={steps}",
        f"log.every_steps={size.window}",
        *("init=null", "optim.method=adamw", "optim.warmup_steps=1", "data.cache=null", "data.workers=1"),
    ]
    return load_config(f"demo/{stage}", PretrainConfig, [*overrides, *size.overrides])


def _run_ours(run: "PretrainConfig") -> tuple[list[float], float]:
    """Milliseconds a step of each counted window, and the last window's mean loss."""
    from pretrain.metrics_log import read_log
    from pretrain.trainer import train

    train(run)
    lines = read_log(Path(run.out))
    return [1000 * line["step_s"] for line in lines[1:]], lines[-1]["loss"]


def _run_bare(run: "PretrainConfig", size: Size) -> tuple[list[float], float]:
    """The same of the bare loop, with the tokenizer of our run, whose captions are the same."""
    import torch

    from data_pipeline.loader import TrainLoader
    from pretrain.setup import pick_device
    from pretrain.tasks import build_task
    from videomamba.baselines import bare_training

    device = torch.device(pick_device(run))
    task = build_task(run, device, Path(run.out) / "tokenizer" if run.text else None)
    batches = iter(TrainLoader(run.data, run.seed, steps=run.steps, pin_memory=device.type == "cuda"))
    windows = list(bare_training(task, batches, run, device, size.window))
    return [1000 * seconds for seconds, _ in windows[1:]], windows[-1][1]


def trainer(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that it runs.")] = False,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = Size.turns,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
) -> None:
    """The trainer with DeepSpeed against a bare PyTorch loop of the same model, on one process."""
    from dataclasses import replace

    report("trainer", list(measure(QUICK if quick else replace(Size(), turns=turns))), json_file)
