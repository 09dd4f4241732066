"""`videomamba plot RUN...`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.errors import UserError

Unit = Literal["steps", "samples"]


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, drawn in one figure.", metavar="RUN...")],
    out: Annotated[
        Path | None, typer.Option(help="The folder for curves.png and curves.html (default: the first run's).")
    ] = None,
    x: Annotated[Unit, typer.Option(help="What the runs are compared by.")] = "steps",
    smooth: Annotated[
        float, typer.Option(help="Weight of the past in the moving average; 0 draws what was logged.")
    ] = 0.6,
    only: Annotated[
        list[str] | None, typer.Option(help="Draw the quantities whose name begins so, such as loss or lr.")
    ] = None,
) -> None:
    """Draw what runs logged: losses, rates, speed, memory, evaluations, as a PNG and as a page.

    Example: videomamba plot runs/stage2 runs/other --only loss
    """
    if not 0 <= smooth < 1:
        raise UserError(f"--smooth is {smooth:g}, and it is a weight from 0 to below 1.", "Give 0.6, or 0 for none.")
    from videomamba.plot.curves import read_panels
    from videomamba.plot.figure import write_figure
    from videomamba.plot.page import write_page

    panels = read_panels(runs, x)
    if only:
        names = [panel.name for panel in panels]
        panels = [panel for panel in panels if panel.name.startswith(tuple(only))]
        if not panels:
            raise UserError(
                f"Nothing that was logged begins with {' or '.join(only)}.", f"Use one of {', '.join(names)}."
            )
    folder = runs[0] if out is None else out
    write_figure(panels, folder / "curves.png", x, smooth)
    write_page(panels, folder / "curves.html", x, smooth)
    typer.echo(f"{len(panels)} charts: {folder / 'curves.png'}, {folder / 'curves.html'}")
