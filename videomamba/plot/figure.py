"""Panels as one PNG, by matplotlib: for a paper's draft or a message, where a page cannot go."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.files import write_whole
from videomamba.plot.curves import Panel, Unit, run_numbers, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B25D91", "#7A6400", "#555555")
"""After the palette of Okabe and Ito ("Color Universal Design", 2008), which common colour blindness tells apart; its
pale colours are darker here, to be seen on white. Dashes tell lines apart without colour as well."""

DASHES: tuple[Any, ...] = ("-", (0, (6, 3)), (0, (2, 2)))
COLUMNS = 3


def write_figure(panels: Sequence[Panel], path: Path, unit: Unit, smooth: float) -> None:
    """Draw `panels`, three in a row, and write the PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, 3.1 * rows + 0.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    runs = run_numbers(panels)
    for panel, axes in zip(panels, places, strict=False):
        _draw(axes, panel, runs, unit, smooth)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    handles = [Line2D([], [], label=run, **_style(number)) for run, number in runs.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(runs)), frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": "videomamba plot"})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, image.getvalue())


def _draw(axes: "Axes", panel: Panel, runs: Mapping[str, int], unit: Unit, smooth: float) -> None:
    """One panel: what was measured faintly, what it comes to smoothed, restarts as dotted uprights."""
    weight = panel.weight(smooth)
    for curve in panel.curves:
        style = _style(runs[curve.run])
        if weight:
            axes.plot(curve.xs, curve.ys, color=style["color"], alpha=0.3, linewidth=0.8)
        axes.plot(curve.xs, smoothed(curve.ys, weight), **style)
        for x in curve.restarts:
            axes.axvline(x, color=style["color"], linewidth=0.8, linestyle=":", alpha=0.7)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, color="#e4e4e0", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _style(number: int) -> dict[str, Any]:
    """How the run of that number is drawn in every panel."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)], "linewidth": 1.5}
