"""`videomamba demo`: from raw clips to exported encoders and a page to look at."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="The folder everything goes into.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(help="How long it may take on two CPU cores; 10 is the full demo.")] = 10.0,
    ranks: Annotated[int, typer.Option(help="Train with so many ranks on this machine.", min=1, max=8)] = 1,
    seed: Annotated[int, typer.Option(help="Of the world and of every run in it.", min=0)] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what an earlier demo left in --out first.")] = False,
    ablate: Annotated[bool, typer.Option("--ablate", help="Afterwards, show what stage 1 adds at equal time.")] = False,
    single_frame: Annotated[
        bool, typer.Option("--single-frame", help="Afterwards, train the control that only ever sees one frame.")
    ] = False,
) -> None:
    """Everything once, small and real: clips, shards, a teacher, stages 1 and 2, retrieval, encoders, a page.

    Run again, it skips what is finished. Example: videomamba demo --minutes 3 --out /tmp/demo
    """
    from videomamba.demo.plan import make_plan
    from videomamba.demo.run import run_demo

    extras = [name for name, asked in (("ablate", ablate), ("single_frame", single_frame)) if asked]
    run_demo(make_plan(out, minutes, seed, ranks), extras, fresh, ctx.find_root().command)
