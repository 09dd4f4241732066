"""`videomamba pretrain`, `teacher`, `checkpoint inspect` and `checkpoint convert`; torch is imported only to train."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.errors import UserError
from configs.loader import load_config, to_yaml
from pretrain.config import PretrainConfig
from pretrain.config_checks import check_inputs, check_world
from pretrain.launch import find_world, launch
from pretrain.length import resolve_length
from pretrain.run_folder import RunFolder
from pretrain.stopping import forget_unfinished, listening

app = typer.Typer(no_args_is_help=True, add_completion=False)

Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged config such as demo/stage1.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Assignments over the config, such as optim.lr=1e-4.", metavar="[KEY=VALUE]..."),
]


@app.command(
    "pretrain", epilog="Example: videomamba pretrain demo/stage1 out=runs/stage1 data.train.0.path=shards --ranks 2"
)
def pretrain(
    context: typer.Context,
    config: Config,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(help="Start so many ranks on this machine.", min=1)] = 1,
    check: Annotated[bool, typer.Option("--check", help="Validate the run completely, without starting it.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show the resolved config and leave.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what a run left in the out folder first.")] = False,
) -> None:
    """Train stage 1 or stage 2 as a config says. The same command goes on where a run was interrupted.

    SIGTERM, SIGUSR2 or a file called stop in the run folder have all ranks save after the next step and leave with 0.
    """
    run = load_config(config, PretrainConfig, overrides or [])
    world = find_world()
    if "RANK" in os.environ and ranks > 1:
        raise UserError("--ranks starts ranks, but this process is one already (RANK is set).", "Leave --ranks out.")
    check_world(run, max(ranks, world.size))
    if print_config:
        typer.echo(to_yaml(run), nl=False)
        return
    check_inputs(run)
    run = resolve_length(run)
    if check:
        _check(run, max(ranks, world.size))
        return
    joined = context.find_root().obj  # what the whole command was started with (videomamba/joined.py)
    if run.evaluate is not None and joined is not None and world.first:
        for line in joined.evaluation_lines(run):
            typer.echo(line, err=True)
    folder = RunFolder(run)
    if world.first:
        forget_unfinished()
    if world.size == 1:
        if fresh:
            folder.clear()
        folder.check()
        if folder.done is not None:
            typer.echo(f"{folder.path} is finished (--fresh begins again).", err=True)
            return
    if ranks > 1:
        raise typer.Exit(launch(ranks, ["pretrain", config, *(overrides or [])]))
    with listening() as heard:  # before torch is imported, which takes seconds
        from pretrain.trainer import train

        code = train(run, fresh and world.size > 1, heard, None if joined is None else joined.evaluator)
    raise typer.Exit(code)


def _check(run: PretrainConfig, ranks: int) -> None:
    """Open everything that a run opens, build what it builds, and say what that is."""
    from pretrain.setup import describe

    for line in describe(run, ranks):
        typer.echo(line)


@app.command("teacher", epilog="Example: videomamba teacher demo/teacher out=runs/teacher data.train.0.path=shards")
def teacher(config: Config, overrides: Overrides = None) -> None:
    """Train a tiny CLIP with open_clip on frames and captions, to be a teacher where none can be fetched."""
    from pretrain.clip_config import ClipTinyConfig

    run = load_config(config, ClipTinyConfig, overrides or [])
    from pretrain.clip_tiny import train_clip

    train_clip(run)


@app.command(
    "teacher-cache", epilog="Example: videomamba teacher-cache stage1.yaml teacher.cache=shards/teacher --batch 32"
)
def teacher_cache(
    config: Config,
    overrides: Overrides = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips at once.")] = 16,
) -> None:
    """Keep what a run's teacher makes of every clip, so that training need not ask it again.

    The same command goes on where it was interrupted, and does nothing where all is there.
    """
    run = load_config(config, PretrainConfig, overrides or [])
    if run.teacher is None or run.teacher.cache is None:
        raise UserError("The config names no teacher.cache to fill.", "Give teacher.source and teacher.cache=FOLDER.")
    check_inputs(run)
    import torch
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from pretrain.setup import pick_device, set_threads
    from pretrain.sight import open_teacher
    from pretrain.teacher_cache import fill

    device = torch.device(pick_device(run))
    set_threads(run)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task("clips")
        todo = 0
        for done, todo in fill(run, open_teacher(run, device), device, batch):
            bar.update(line, completed=done, total=todo)
    kept = f"{todo} clips were kept now" if todo else "nothing was left to do"
    typer.echo(f"{run.teacher.cache} is complete: {kept}.")


checkpoint_app = typer.Typer(no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint", help="Look into checkpoints, or write one in a published layout.")


@checkpoint_app.callback()
def _checkpoints() -> None:
    """Look into checkpoints, or write one in a published layout."""


@checkpoint_app.command("inspect", epilog="Example: videomamba checkpoint inspect runs/stage1")
def checkpoint_inspect(
    path: Annotated[Path, typer.Argument(help="A run folder (its newest checkpoint) or a checkpoint folder.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its shape.")] = False,
) -> None:
    """Verify a checkpoint's files and say what it holds."""
    from pretrain.checkpoint.describe import described, listed

    for name, value in described(path):
        typer.echo(f"{name:<11}{value}")
    for line in listed(path) if tensors else ():
        typer.echo(f"  {line}")


@checkpoint_app.command("convert", epilog="Example: videomamba checkpoint convert runs/stage2 videomamba_m16.pth")
def checkpoint_convert(
    path: Annotated[Path, typer.Argument(help="A run folder (its newest checkpoint) or a checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="The file to write: .pth or .safetensors.")],
    layout: Annotated[
        Literal["image", "video", "masked", "joint"] | None,
        typer.Option(help="Default: the one that has a place for all of it."),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The average of the weights, where the run kept one.")] = False,
) -> None:
    """Write a checkpoint's weights in a published layout, for the release's own code."""
    from pretrain.released.back import convert

    for line in convert(path, out, layout, ema):
        typer.echo(line)


@checkpoint_app.command("average", epilog="Example: videomamba checkpoint average runs/stage2 runs/stage2_average")
def checkpoint_average(
    path: Annotated[Path, typer.Argument(help="A run folder (its newest checkpoint) or a checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write: a checkpoint, as every other command takes one.")],
) -> None:
    """Write the average of the weights that a run kept (optim.ema_decay) as a checkpoint of its own."""
    from pretrain.averaged import write_average

    typer.echo(f"written: {write_average(path, out)}")
