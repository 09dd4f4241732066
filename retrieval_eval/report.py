"""`report.html`: one page that holds everything it shows, its frames included, and asks the network for nothing.

Every text is escaped on its way in. The parts of the page stand in the order in which they are read:
what this is, what was reached, what was found, how it was trained, what it was built from.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from configs.files import write_whole
from retrieval_eval.charts import line_chart
from retrieval_eval.report_data import Departure, LossCurve, LostClip, QueryStrips, ReportData, StepTime, Strip
from retrieval_eval.report_table import headline, retrieval_tables

STYLE = Path(__file__).with_name("report.css")


def write_report(data: ReportData, path: Path) -> Path:
    """Write the page to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(data).encode())
    return path


def render(data: ReportData) -> str:
    """The page as text."""
    world = f'<p class="notice">{escape(data.world)}</p>' if data.world else ""
    body = "".join(
        [
            f"<h1>{escape(data.title)}</h1>{world}",
            headline(data.result),
            _section("Retrieval", retrieval_tables(data.result, data.single_frame)),
            _section("What was found", "".join(map(_query, data.queries))),
            _section("Losses", f'<div class="charts">{"".join(map(_curve, data.curves))}</div>' if data.curves else ""),
            _section("What was built", _facts(data.facts) + _facts(data.export_checks)),
            _section("Time and memory", _steps(data.steps, data.peak_gb)),
            _section("Clips that were lost", _lost(data.lost)),
            _section("How this recipe differs from the released one", _departures(data.departures)),
            _section("Protocol", _protocol(data.result)),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(data.title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _curve(curve: LossCurve) -> str:
    series = {
        name: [float("nan") if value is None else value for value in values] for name, values in curve.series.items()
    }
    note = f'<p class="quiet">{escape(curve.note)}</p>' if curve.note else ""
    chart = line_chart(curve.title, curve.steps, series, "optimizer step", "loss")
    return f'<div class="card"><h3 style="margin-top:0">{escape(curve.title)}</h3>{chart}{note}</div>'


def _query(query: QueryStrips) -> str:
    hit = query.rank < 2
    word = "found first" if hit else f"found at rank {query.rank:g}"
    note = f" {escape(query.note)}" if query.note else ""
    strips = "".join(
        _strip(strip, f"Found {place}{_ordinal(place)}") for place, strip in enumerate(query.found, start=1)
    )
    return (
        f'<article class="card query"><h3>“{escape(query.text)}”</h3>'
        f'<p class="quiet"><span class="{"right" if hit else "wrong"}-word">{word}</span> '
        f"({escape(query.column)}).{note}</p>"
        f'<div class="strips">{_strip(query.truth, "The clip that this was written for", mark=False)}{strips}</div>'
        "</article>"
    )


def _strip(strip: Strip, place: str, mark: bool = True) -> str:
    score = f" score {strip.score:.3f}" if strip.score is not None else ""
    right = ' <span class="right-word">✓ right</span>' if strip.right and mark else ""
    style = ' class="right"' if strip.right and mark else ""
    alternative = escape(f"Frames of {strip.key}: {strip.caption}", quote=True)
    return (
        f'<figure{style}><img src="data:image/jpeg;base64,{escape(strip.image, quote=True)}" alt="{alternative}">'
        f"<figcaption><b>{escape(place)}</b>{right}{score}<br>{escape(strip.caption)} "
        f'<span class="quiet">{escape(strip.key)}</span></figcaption></figure>'
    )


def _ordinal(place: int) -> str:
    return {1: "st", 2: "nd", 3: "rd"}.get(place, "th")


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{rows}</dl>" if rows else ""


def _steps(steps: tuple[StepTime, ...], peak_gb: float | None) -> str:
    if not steps:
        return ""
    rows = "".join(
        f"<tr><th>{escape(step.name)}{_small(step.note)}</th>{_cell(step.seconds, '.1f')}"
        f"{_cell(step.budget_seconds, '.0f')}{_cell(step.peak_gb, '.2f')}</tr>"
        for step in steps
    )
    total = (
        f"<tr><th>Together</th>{_cell(sum(step.seconds for step in steps), '.1f')}<td></td>{_cell(peak_gb, '.2f')}</tr>"
    )
    return _table(["Step", "Seconds", "Budget (s)", "Peak memory (GB)"], rows + total)


def _cell(value: float | None, form: str) -> str:
    return f'<td class="number">{"" if value is None else format(value, form)}</td>'


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>" if text else ""


def _table(head: list[str], rows: str, kind: str = "") -> str:
    titles = "".join(
        f"<th{'' if place == 0 or kind else ' class=number'}>{escape(title)}</th>" for place, title in enumerate(head)
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _lost(lost: tuple[LostClip, ...]) -> str:
    if not lost:
        return ""
    head = f"<p>{len(lost)} left out and counted; none was replaced by another.</p>"
    return head + _words(["Clip", "Reason", "Detail"], [(clip.name, clip.reason, clip.detail) for clip in lost])


def _departures(departures: tuple[Departure, ...]) -> str:
    rows = [(one.what, one.released, one.here, one.why) for one in departures]
    return _words(["What", "Released recipe", "Here", "Why"], rows) if rows else ""


def _words(head: list[str], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(text)}</td>' for text in row[1:])}</tr>" for row in rows
    ]
    return _table(head, "".join(lines), "words")


def _protocol(result: dict[str, Any]) -> str:
    choices = {name: str(value) for name, value in result.get("protocol", {}).items()}
    if not choices:
        return ""
    return f"<details><summary>Every choice behind the numbers</summary>{_facts(choices)}</details>"
