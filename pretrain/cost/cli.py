"""`videomamba plan`: what a run needs and how long it takes, before it is submitted."""

import json
from typing import Annotated

import typer

from configs.loader import load_config
from pretrain.config import PretrainConfig
from pretrain.cost.devices import device_of

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Assignments over the config, such as data.batch=512.", metavar="[KEY=VALUE]..."),
]


def plan(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged config.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs.")] = 1,
    gpu: Annotated[str, typer.Option(help="Which GPU: h200, h100, a100, a100-40gb, l40s ...")] = "h100",
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="The share of the peak that is reached.")
    ] = 0.35,
    words: Annotated[int | None, typer.Option(min=2, help="Tokens of a caption (default: the most it reads).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every figure as JSON.")] = False,
) -> None:
    """Parameters, memory of each GPU by part, FLOPs, time, checkpoints and network of a run that nobody has started.

    Exit code 1 if it does not fit into the GPUs. The time follows from --utilisation, which you state: runs on other
    machines are the only guide to it.

    Example: videomamba plan stage1/k400 --gpus 32 --gpu a100
    """
    run = load_config(config, PretrainConfig, overrides or [])
    device = device_of(gpu)
    from rich.console import Console

    from pretrain.cost.plan import Asked, make_plan
    from pretrain.cost.show import show

    with Console(stderr=True).status("A step without memory ..."):
        made = make_plan(run, Asked(gpus, device, utilisation, words))
    if as_json:
        typer.echo(json.dumps(made.tree(), indent=2))
    else:
        show(made, Console(soft_wrap=True))
    if not made.fits:
        raise typer.Exit(1)
