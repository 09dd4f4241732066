"""Line charts as inline SVG: axes with labels, gridlines, a legend; colours come from the page's CSS.

A chart is drawn 420 units wide, about the width it is shown at on a telephone and on a desk alike, so its
letters keep their size. Long runs are drawn as means over equal stretches of steps.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 12, 40
POINTS = 160


def line_chart(
    title: str, steps: Sequence[int], series: Mapping[str, Sequence[float]], x_label: str, y_label: str
) -> str:
    """An SVG element and its legend; values that are not finite leave a gap. Empty series give a sentence."""
    finite = [value for values in series.values() for value in values if math.isfinite(value)]
    if not steps or not finite:
        return f'<p class="quiet">{escape(title)}: nothing was logged.</p>'
    x_ticks = [tick for tick in ticks(min(0, steps[0]), max(steps[-1], 1)) if tick <= max(steps[-1], 1)]
    y_ticks = ticks(min(0.0, *finite), max(finite))
    frame = _Frame(x_ticks[0], max(steps[-1], 1), y_ticks[0], y_ticks[-1])
    lines = [
        f'<path class="line s{i % 6}" d="{_path(frame, *thin(steps, values))}"/>'
        for i, values in enumerate(series.values())
    ]
    legend = "".join(
        f'<li><span class="swatch s{i % 6}"></span>{escape(name)} <b>{_last(values)}</b></li>'
        for i, (name, values) in enumerate(series.items())
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{_grid(frame, x_ticks, y_ticks)}{''.join(lines)}{_labels(x_label, y_label)}</svg>"
        f'<ul class="legend">{legend}<li>(bold: the last value)</li></ul>'
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `about` of them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / about
    size = 10 ** math.floor(math.log10(rough))
    step = size * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    return [round(i * step, 12) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def thin(steps: Sequence[int], values: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
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
