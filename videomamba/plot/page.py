"""Panels as an HTML page that needs nothing else, light and dark, with the figures of each run's last line."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from configs.files import write_whole
from retrieval_eval.report.charts import Line, line_chart
from retrieval_eval.report.shell import whole_page
from videomamba.plot.curves import Panel, Unit, run_numbers, smoothed


def write_page(panels: Sequence[Panel], path: Path, unit: Unit, smooth: float) -> None:
    """Write the page, whole or not at all."""
    runs = run_numbers(panels)
    title = "Training of " + (", ".join(runs) if len(runs) <= 3 else f"{len(runs)} runs")
    cards = "".join(
        f'<div class="card"><h2>{escape(p.title)}</h2>{_chart(p, runs, unit, smooth)}</div>' for p in panels
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, whole_page(title, f'{_notes(panels, smooth)}<div class="charts">{cards}</div>').encode())


def _chart(panel: Panel, runs: Mapping[str, int], unit: Unit, smooth: float) -> str:
    weight = panel.weight(smooth)
    lines = [
        Line(
            curve.run,
            curve.xs,
            smoothed(curve.ys, weight),
            faint=curve.ys if weight else None,
            marks=curve.restarts,
            colour=runs[curve.run],
        )
        for curve in panel.curves
    ]
    return line_chart(panel.title, lines, unit, "", from_zero=False)


def _notes(panels: Sequence[Panel], smooth: float) -> str:
    """What a reader has to know of the lines."""
    said = []
    if smooth:
        said.append(f"Strong lines are smoothed (exponential moving average, {smooth:g}); what was logged is faint.")
    if any(curve.restarts for panel in panels for curve in panel.curves):
        said.append("Dotted uprights are restarts.")
    return f'<p class="quiet">{escape(" ".join(said))}</p>' if said else ""
