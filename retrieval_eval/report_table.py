"""The retrieval numbers as HTML: the headline and one table a direction, controls and chance beneath."""

from collections.abc import Mapping
from html import escape
from typing import Any

from retrieval_eval.report_data import SingleFrameModel

MEASURES = ("R@1", "R@5", "R@10", "MedR")
DIRECTIONS = {"t2v": "Text to video", "v2t": "Video to text"}
CONTROLS = {"shuffled": "Frames shuffled", "single": "One frame repeated"}


def headline(result: Mapping[str, Any]) -> str:
    """The first numbers of the page: R@1 of text to video in every scoring, with its controls and chance."""
    columns, results = result.get("columns", {}), result.get("results", {})
    cards = [
        (results[scoring]["t2v"]["R@1"], f"R@1 ({name}), text to video")
        for scoring, name in columns.items()
        if scoring in results
    ]
    for control, per_scoring in results.get("controls", {}).items():
        for scoring in list(per_scoring)[:1]:
            name = CONTROLS.get(control, control).lower()
            cards.append((per_scoring[scoring]["t2v"]["R@1"], f"R@1 ({columns.get(scoring, scoring)}), {name}"))
    if "t2v" in result.get("chance", {}):
        cards.append((result["chance"]["t2v"]["R@1"], "R@1 by chance"))
    boxes = "".join(
        f'<div class="card"><b>{value:{_form("R@1", value)}} %</b><span>{escape(name)}</span></div>'
        for value, name in cards
    )
    return f'<div class="cards">{boxes}</div>' if boxes else ""


def retrieval_tables(result: Mapping[str, Any], single_frame: SingleFrameModel | None = None) -> str:
    """One table a direction: a row for the model, each control and chance; a column a measure and scoring."""
    results = result.get("results", {})
    columns = {scoring: name for scoring, name in result.get("columns", {}).items() if scoring in results}
    if not columns:
        return '<p class="quiet">No retrieval result.</p>'
    head = "".join(
        f'<th class="number">{measure}<small>({escape(name)})</small></th>'
        for name in columns.values()
        for measure in MEASURES
    )
    parts = []
    for direction, title in DIRECTIONS.items():
        rows = _rows(result, columns, direction, single_frame)
        first = results[next(iter(columns))][direction]
        parts.append(
            f'<h3>{title}</h3><p class="quiet">{first["n"]:,} queries, {first["gallery"]:,} to choose from. Recalls in '
            "percent, below them the 95 % bootstrap interval over queries; MedR is the median rank.</p>"
            f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
    return "".join(parts)


def _rows(
    result: Mapping[str, Any], columns: Mapping[str, str], direction: str, single: SingleFrameModel | None
) -> str:
    results = result["results"]
    rows = [_row("Whole clips", "", results, columns, direction, "main-row")]
    for control, scored in results.get("controls", {}).items():
        rows.append(_row(CONTROLS.get(control, control), "the same clips, the same model", scored, columns, direction))
    if single is not None:
        rows.append(_row("Model that only ever saw one frame", single.origin, single.results, columns, direction))
    level = result.get("chance", {}).get(direction)
    if level:
        rows.append(
            _row("Chance", "a random order", {scoring: {direction: level} for scoring in columns}, columns, direction)
        )
    return "".join(rows)


def _row(
    name: str, note: str, scored: Mapping[str, Any], columns: Mapping[str, str], direction: str, style: str = ""
) -> str:
    cells = []
    for scoring in columns:
        numbers = scored.get(scoring, {}).get(direction, {})
        for measure in MEASURES:
            if measure not in numbers:
                cells.append('<td class="number">–</td>')
                continue
            form = _form(measure, numbers[measure])
            low, high = numbers.get("interval_95", {}).get(measure, (None, None))
            interval = f"<small>{low:{form}}–{high:{form}}</small>" if low is not None else ""
            cells.append(f'<td class="number">{numbers[measure]:{form}}{interval}</td>')
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<tr class="{style}"><th>{escape(name)}{small}</th>{"".join(cells)}</tr>'


def _form(measure: str, value: float) -> str:
    """A rank as it is; a recall with one decimal, as the intervals deserve, and with two where it is small."""
    if not measure.startswith("R@"):
        return ".4g"
    return ".2f" if value < 3 else ".1f"
