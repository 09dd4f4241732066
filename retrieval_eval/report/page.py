"""`report.html`: one page that holds everything it shows, its frames included, and asks the network for nothing.

Every text is escaped on its way in. The parts of the page stand in the order in which they are read: what this is,
what was reached, what was found, what is missing, how it was made; then what a demo adds, training and time.
"""

import re
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path

from configs.files import write_whole
from retrieval_eval.report.charts import Line, line_chart
from retrieval_eval.report.data import Departure, LossCurve, LostClip, ReportData, Similarity, StepTime
from retrieval_eval.report.histogram import rank_histogram
from retrieval_eval.report.protocol_list import facts, protocol_lists
from retrieval_eval.report.queries import query_article
from retrieval_eval.report.shell import whole_page
from retrieval_eval.report.similarity import STOPS
from retrieval_eval.report.tables import DIRECTIONS, headline, retrieval_tables, table, word_table

MOST_NAMED = 200
GALLERIES = {"t2v": "clips", "v2t": "captions"}


def write_report(data: ReportData, path: Path) -> Path:
    """Write the page to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(data).encode())
    return path


def render(data: ReportData) -> str:
    """The page as text."""
    sections = [(title, content) for title, content in _sections(data) if content]
    contents = "".join(f'<li><a href="#{_slug(title)}">{escape(title)}</a></li>' for title, _ in sections)
    body = "".join(
        f'<section id="{_slug(title)}"><h2>{escape(title)}</h2>{content}</section>' for title, content in sections
    )
    return whole_page(
        data.title,
        f"{_notices(data)}{headline(data.result)}"
        f'<nav aria-label="On this page"><ul class="contents">{contents}</ul></nav>{body}',
    )


def _sections(data: ReportData) -> Iterator[tuple[str, str]]:
    yield "Retrieval", retrieval_tables(data.result, data.single_frame)
    yield "Ranks", "".join(_histograms(data))
    yield "Similarity", _similarity(data.similarity) if data.similarity else ""
    yield "What was found", "".join(_queries(data))
    yield "Missing clips", _missing(data)
    yield "How it was made", protocol_lists(data.result)
    yield "Losses", f'<div class="charts">{"".join(map(_curve, data.curves))}</div>' if data.curves else ""
    yield "What was built", facts(data.facts) + facts(data.export_checks)
    yield "Time and memory", _steps(data.steps, data.peak_gb)
    yield "Clips that were lost", _lost(data.lost)
    yield "How this recipe differs from the released one", _departures(data.departures)


def _slug(title: str) -> str:
    return re.sub(r"[^a-z]+", "-", title.lower()).strip("-")


def _notices(data: ReportData) -> str:
    said = [data.world] if data.world else []
    if data.result.get("status") == "partial":
        count = len(data.result.get("missing", ()))
        said.append(f"This result is partial: {count:,} clips could not be read, and every number is without them.")
    return "".join(f'<p class="notice">{escape(text)}</p>' for text in said)


def _histograms(data: ReportData) -> Iterator[str]:
    if data.histograms:
        yield '<p class="quiet">Where the right answer stood. The further left, the better.</p><div class="charts">'
        for one in data.histograms:
            title = f"{DIRECTIONS[one.direction]}, among {one.gallery:,} {GALLERIES[one.direction]}"
            chart = rank_histogram(title, one.bars, one.gallery)
            yield f'<div class="card"><h3>{escape(title)}</h3>{chart}</div>'
        yield "</div>"


def _similarity(seen: Similarity) -> str:
    each = "one pair" if seen.block == 1 else f"the highest of {seen.block} × {seen.block} pairs"
    scale = ", ".join(f"rgb({red},{green},{blue})" for red, green, blue in STOPS)
    about = (
        f"Dual scores of {seen.clips:,} clips (rows) with the first caption of each (columns), in the corpus's order; "
        f"a dot is {each}. The right pairs are the diagonal from the upper left."
    )
    return (
        f'<p class="quiet">{escape(about)}</p><figure class="matrix"><img width="{seen.side}" height="{seen.side}" '
        f'src="data:image/png;base64,{escape(seen.image, quote=True)}" alt="{escape(about, quote=True)}"><figcaption>'
        f'<span>{seen.low:.3f}</span><span class="scale" style="background:linear-gradient(90deg,{scale})"></span>'
        f"<span>{seen.high:.3f}</span></figcaption></figure>"
    )


def _queries(data: ReportData) -> Iterator[str]:
    for group, queries in groupby(data.queries, key=lambda query: query.group):
        if group:
            yield f"<h3>{escape(group)}</h3>"
        yield from map(query_article, queries)


def _missing(data: ReportData) -> str:
    if data.missing:
        head = f"<p>{len(data.missing):,} clips could not be read. They are in no number above.</p>"
        return head + _named(data.missing)
    return '<p class="quiet">None: every clip was read.</p>' if "missing" in data.result else ""


def _lost(lost: tuple[LostClip, ...]) -> str:
    if not lost:
        return ""
    return f"<p>{len(lost):,} left out and counted; none was replaced by another.</p>{_named(lost)}"


def _named(clips: tuple[LostClip, ...]) -> str:
    rows = [(clip.name, clip.reason, clip.detail) for clip in clips[:MOST_NAMED]]
    more = len(clips) - len(rows)
    rest = f'<p class="quiet">And {more:,} more, which the result file names.</p>' if more else ""
    return word_table("Clips", ["Clip", "Reason", "Detail"], rows) + rest


def _curve(curve: LossCurve) -> str:
    lines = [
        Line(name, curve.steps, [float("nan") if value is None else value for value in values])
        for name, values in curve.series.items()
    ]
    note = f'<p class="quiet">{escape(curve.note)}</p>' if curve.note else ""
    chart = line_chart(curve.title, lines, "optimizer step", "loss")
    return f'<div class="card"><h3>{escape(curve.title)}</h3>{chart}{note}</div>'


def _steps(steps: tuple[StepTime, ...], peak_gb: float | None) -> str:
    if not steps:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(step.name)}{_small(step.note)}</th>{_cell(step.seconds, ".1f")}'
        f"{_cell(step.budget_seconds, '.0f')}{_cell(step.peak_gb, '.2f')}</tr>"
        for step in steps
    )
    seconds = sum(step.seconds for step in steps)
    total = f'<tr><th scope="row">Together</th>{_cell(seconds, ".1f")}<td></td>{_cell(peak_gb, ".2f")}</tr>'
    return table("Time and memory of each step", ["Step", "Seconds", "Budget (s)", "Peak memory (GB)"], rows + total)


def _cell(value: float | None, form: str) -> str:
    return f'<td class="number">{"" if value is None else format(value, form)}</td>'


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>" if text else ""


def _departures(departures: tuple[Departure, ...]) -> str:
    rows = [(one.what, one.released, one.here, one.why) for one in departures]
    return word_table("Differences", ["What", "Released recipe", "Here", "Why"], rows) if rows else ""
