"""One query of the report: the clip it was written for, and beside it what was found."""

from html import escape

from retrieval_eval.report.data import QueryStrips, Strip


def query_article(query: QueryStrips) -> str:
    """The query with its strips; the right clip stands first, then the clips that were found, best first."""
    hit = query.rank < 2
    word = "found first" if hit else f"found at rank {query.rank:,g}"
    note = f" {escape(query.note)}" if query.note else ""
    strips = "".join(_strip(strip, f"Found {_ordinal(place)}") for place, strip in enumerate(query.found, start=1))
    return (
        f'<article class="card query"><h4>“{escape(query.text)}”</h4>'
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
    return f"{place}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(place, 'th') }"
