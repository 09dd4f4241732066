"""Line charts as inline SVG: axes with labels, gridlines, a legend; colours come from the page's CSS.

A chart is drawn 420 units wide, about the width it is shown at on a telephone and on a desk alike, so its
letters keep their size. Long runs are drawn as means over equal stretches of steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 12, 40
POINTS = 160


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name in the legend, and its points. A value that is not finite leaves a gap.

    `faint` is drawn behind it, on the same x: what was measured, where `ys` is smoothed. `marks` are the x at which
    something happened to it, such as a restart. `colour` is the number of its colour (its place in the chart, if None).
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    faint: Sequence[float] | None = None
    marks: Sequence[float] = ()
    colour: int | None = None


def line_chart(title: str, lines: Sequence[Line], x_label: str, y_label: str, from_zero: bool = True) -> str:
    """An SVG element and its legend; nothing finite gives a sentence. `from_zero` keeps both axes' zero in sight."""
    drawn = [value for line in lines for values in (line.ys, line.faint or ()) for value in values]
    finite = [value for value in drawn if math.isfinite(value)]
    xs = [x for line in lines for x in line.xs]
    if not finite:
        return f'<p class="quiet">{escape(title)}: nothing was logged.</p>'
    right, floor = max(1, *xs), [0.0] if from_zero else []
    x_ticks = [tick for tick in ticks(min(*floor, *xs, right), right) if tick <= right]
    y_ticks = ticks(min([*floor, *finite]), max(finite))
    frame = _Frame(x_ticks[0], right, y_ticks[0], y_ticks[-1])
    marks, faint, paths, legend = [], [], [], []
    for place, line in enumerate(lines):
        shade = f"s{(place if line.colour is None else line.colour) % 6}"
        marks += [_upright(frame, x, shade) for x in line.marks]
        if line.faint is not None:
            faint.append(f'<path class="line faint {shade}" d="{_path(frame, *thin(line.xs, line.faint))}"/>')
        paths.append(f'<path class="line {shade}" d="{_path(frame, *thin(line.xs, line.ys))}"/>')
        legend.append(
            f'<li><span class="swatch {shade}"></span>{escape(line.name)} <b>{_last(line.faint or line.ys)}</b></li>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{_grid(frame, x_ticks, y_ticks)}{''.join(marks + faint + paths)}{_labels(x_label, y_label)}</svg>"
        f'<ul class="legend">{"".join(legend)}<li>(bold: the last value)</li></ul>'
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `about` of them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / about
    size = 10 ** math.floor(math.log10(rough))
    step = size * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    return [round(i * step, 12) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def thin(steps: Sequence[float], values: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """At most `points` pairs: means over equal stretches; a stretch with nothing finite in it gives nan."""
    size = max(1, math.ceil(len(steps) / points))
    thin_steps, thin_values = [], []
    for start in range(0, len(steps), size):
        kept = [value for value in values[start : start + size] if math.isfinite(value)]
        thin_steps.append(sum(steps[start : start + size]) / len(steps[start : start + size]))
        thin_values.append(sum(kept) / len(kept) if kept else math.nan)
    return thin_steps, thin_values


class _Frame:
    """The plotting area: data units to SVG units."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        self.x_low, self.x_scale = x_low, (WIDTH - LEFT - RIGHT) / ((x_high - x_low) or 1)
        self.y_low, self.y_scale = y_low, (HEIGHT - TOP - BOTTOM) / ((y_high - y_low) or 1)

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.x_low) * self.x_scale, 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - self.y_low) * self.y_scale, 1)


def _path(frame: _Frame, steps: Sequence[float], values: Sequence[float]) -> str:
    parts, pen = [], "M"
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            parts.append(f"{pen}{frame.x(step)} {frame.y(value)}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def _upright(frame: _Frame, x: float, shade: str) -> str:
    return f'<line class="mark {shade}" x1="{frame.x(x)}" x2="{frame.x(x)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'


def _grid(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
    rows = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{frame.y(y)}" y2="{frame.y(y)}"/>'
        f'<text x="{LEFT - 6}" y="{frame.y(y) + 4}" text-anchor="end">{y:g}</text>'
        for y in y_ticks
    ]
    columns = [
        f'<line class="grid" x1="{frame.x(x)}" x2="{frame.x(x)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{frame.x(x)}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{x:g}</text>'
        for x in x_ticks
    ]
    return "".join(rows + columns)


def _labels(x_label: str, y_label: str) -> str:
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    return (
        f'<text class="axis" x="{LEFT + (WIDTH - LEFT - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="axis" transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )


def _last(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{finite[-1]:.3g}" if finite else "none"
