"""The retrieval numbers as HTML: the headline and one table a direction, controls and chance beneath.

Tables scroll in themselves, and can be scrolled by keyboard.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from retrieval_eval.report.data import SingleFrameModel

MEASURES = ("R@1", "R@5", "R@10", "MedR")
DIRECTIONS = {"t2v": "Text to video", "v2t": "Video to text"}
CONTROLS = {"shuffled": "Frames shuffled", "single": "One frame repeated"}


def headline(result: Mapping[str, Any]) -> str:
    """The first numbers of the page: R@1 of text to video in every scoring, with its controls and chance."""
    columns, results = result.get("columns", {}), result.get("results", {})
    choice = _is_choice(results)
    way, measure = ("choice", "accuracy") if choice else ("t2v", "R@1")
    what = "multiple choice" if choice else "text to video"
    cards = [(results[key][way], f"{measure} ({name}), {what}") for key, name in columns.items() if key in results]
    for control, per_scoring in results.get("controls", {}).items():
        for key in list(per_scoring)[:1]:
            name = CONTROLS.get(control, control).lower()
            cards.append((per_scoring[key][way], f"{measure} ({columns.get(key, key)}), {name}"))
    if not choice and way in result.get("chance", {}):
        cards.append((result["chance"][way], f"{measure} by chance"))
    boxes = "".join(
        f'<div class="card"><b>{numbers[measure]:{_form(measure, numbers[measure])}} %</b>'
        f"<span>{escape(name)}{_between(numbers, measure)}</span></div>"
        for numbers, name in cards
    )
    return f'<div class="cards">{boxes}</div>' if boxes else ""


def retrieval_tables(result: Mapping[str, Any], single_frame: SingleFrameModel | None = None) -> str:
    """One table a direction: a row for the model, each control and chance; a column a measure and scoring."""
    results = result.get("results", {})
    columns = {scoring: name for scoring, name in result.get("columns", {}).items() if scoring in results}
    if not columns:
        return '<p class="quiet">No retrieval result.</p>'
    ways, measures = ({"choice": "Multiple choice"}, ("accuracy",)) if _is_choice(results) else (DIRECTIONS, MEASURES)
    head = "".join(
        f'<th scope="col" class="number">{measure}<small>({escape(name)})</small></th>'
        for name in columns.values()
        for measure in measures
    )
    parts = []
    for way, title in ways.items():
        rows = _rows(result, columns, way, measures, single_frame)
        first = results[next(iter(columns))][way]
        among = f", {first['gallery']:,} to choose from" if "gallery" in first else ""
        parts.append(
            f'<h3>{title}</h3><p class="quiet">{first["n"]:,} queries{among}. Shares in percent, below them the 95 % '
            "bootstrap interval over queries; MedR is the median rank.</p>"
            f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table><thead><tr><td></td>{head}'
            f"</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    return "".join(parts)


def table(title: str, head: Sequence[str], rows: str, kind: str = "") -> str:
    """A table that scrolls in itself; `rows` are HTML."""
    titles = "".join(
        f'<th scope="col"{"" if place == 0 or kind else " class=number"}>{escape(name)}</th>'
        for place, name in enumerate(head)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title, quote=True)}">'
        f'<table class="{kind}"><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def word_table(title: str, head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """A table of texts."""
    lines = [
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(text)}</td>" for text in row[1:])}</tr>'
        for row in rows
    ]
    return table(title, head, "".join(lines), "words")


def _is_choice(results: Mapping[str, Any]) -> bool:
    return any("choice" in scored for name, scored in results.items() if name != "controls")


def _between(numbers: Mapping[str, Any], measure: str) -> str:
    if measure not in numbers.get("interval_95", {}):
        return ""
    low, high = numbers["interval_95"][measure]
    form = _form(measure, numbers[measure])
    return f"<br>95 %: {low:{form}}–{high:{form}}"


def _rows(
    result: Mapping[str, Any],
    columns: Mapping[str, str],
    direction: str,
    measures: Sequence[str],
    single: SingleFrameModel | None,
) -> str:
    results = result["results"]

    def row(name: str, note: str, scored: Mapping[str, Any], style: str = "") -> str:
        return _row(name, note, scored, columns, direction, measures, style)

    rows = [row("Whole clips", "", results, "main-row")]
    for control, scored in results.get("controls", {}).items():
        rows.append(row(CONTROLS.get(control, control), "the same clips, the same model", scored))
    if single is not None:
        rows.append(row("Model that only ever saw one frame", single.origin, single.results))
    level = result.get("chance", {}).get(direction)
    if level:
        rows.append(row("Chance", "a random order", {scoring: {direction: level} for scoring in columns}))
    return "".join(rows)


def _row(
    name: str,
    note: str,
    scored: Mapping[str, Any],
    columns: Mapping[str, str],
    direction: str,
    measures: Sequence[str],
    style: str,
) -> str:
    cells = []
    for scoring in columns:
        numbers = scored.get(scoring, {}).get(direction, {})
        for measure in measures:
            if measure not in numbers:
                cells.append('<td class="number">–</td>')
                continue
            form = _form(measure, numbers[measure])
            low, high = numbers.get("interval_95", {}).get(measure, (None, None))
            interval = f"<small>{low:{form}}–{high:{form}}</small>" if low is not None else ""
            cells.append(f'<td class="number">{numbers[measure]:{form}}{interval}</td>')
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<tr class="{style}"><th scope="row">{escape(name)}{small}</th>{"".join(cells)}</tr>'


def _form(measure: str, value: float) -> str:
    """A rank as it is; a recall with one decimal, as the intervals deserve, and with two where it is small."""
    if not measure.startswith(("R@", "acc")):
        return ".4g"
    return ".2f" if value < 3 else ".1f"
