"""How many queries found their answer at which rank: bars as inline SVG, and the same numbers as a table."""

from collections.abc import Mapping
from html import escape
from itertools import pairwise

import numpy as np

from retrieval_eval.metrics import Ranks
from retrieval_eval.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, ticks

EDGES = (1, 2, 3, 6, 11, 21, 51, 101, 201, 501, 1001, 2001, 5001, 10_001, 20_001, 50_001)


def bins(gallery: int) -> list[tuple[int, int]]:
    """First and last rank of each bar, for ranks from 1 to `gallery`."""
    edges = [edge for edge in EDGES if edge <= gallery] + [gallery + 1]
    return [(first, stop - 1) for first, stop in pairwise(edges)]


def shares(ranks_Q: Ranks, gallery: int) -> list[float]:
    """Percent of the queries in each bin; a rank between two, where scores tie, counts as the better one."""
    edges = [first for first, _ in bins(gallery)] + [gallery + 1]
    counts, _ = np.histogram(np.floor(ranks_Q), edges)
    found: list[float] = (100.0 * counts / max(1, len(ranks_Q))).tolist()
    return found


def rank_histogram(title: str, bars: Mapping[str, list[float]], gallery: int) -> str:
    """Bars side by side for each scoring in `bars` (percent a bin), a legend, and a table of the same."""
    spans = bins(gallery)
    names = [f"{first}" if first == last else f"{first:,}–{last:,}" for first, last in spans]
    y_ticks = ticks(0, max((value for values in bars.values() for value in values), default=1) or 1)
    height, width = HEIGHT - TOP - BOTTOM, (WIDTH - LEFT - RIGHT) / len(spans)
    each = 0.8 * width / max(1, len(bars))
    rows = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in y_ticks
        for y in [HEIGHT - BOTTOM - height * tick / y_ticks[-1]]
    ]
    drawn = [
        f'<rect class="bar s{series % 6}" x="{LEFT + place * width + 0.1 * width + series * each:.1f}" '
        f'y="{HEIGHT - BOTTOM - height * value / y_ticks[-1]:.1f}" width="{each:.1f}" '
        f'height="{height * value / y_ticks[-1]:.1f}"/>'
        for series, values in enumerate(bars.values())
        for place, value in enumerate(values)
    ]
    labels = [
        f'<text x="{LEFT + (place + 0.5) * width:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{first}</text>'
        for place, (first, _) in enumerate(spans)
        if len(spans) <= 10 or place % 2 == 0
    ]
    legend = "".join(
        f'<li><span class="swatch block s{i % 6}"></span>{escape(name)}</li>' for i, name in enumerate(bars)
    )
    axis = (
        f'<text class="axis" x="{LEFT + (WIDTH - LEFT - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">rank of the '
        f'right answer, from</text><text class="axis" transform="translate(11 {TOP + height / 2}) rotate(-90)" '
        'text-anchor="middle">% of queries</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f'{"".join(rows + drawn + labels)}{axis}</svg><ul class="legend">{legend}</ul>{_numbers(names, bars)}'
    )


def _numbers(names: list[str], bars: Mapping[str, list[float]]) -> str:
    head = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in bars)
    cells = [
        "".join(f'<td class="number">{values[place]:.1f} %</td>' for values in bars.values())
        for place in range(len(names))
    ]
    rows = "".join(f'<tr><th scope="row">{name}</th>{row}</tr>' for name, row in zip(names, cells, strict=True))
    return (
        '<details><summary>As numbers</summary><div class="scroll" tabindex="0" role="region" aria-label="Ranks">'
        f'<table><thead><tr><th scope="col">Rank</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>'
    )
