"""The card of a corpus as a page of Markdown, for people and for the hubs that show a README."""

from collections.abc import Sequence
from typing import Any

_EXAMPLES = 5  # files named of one reason


def page(card: dict[str, Any]) -> str:
    """The README of a corpus, from its card."""
    return "\n".join([f"# {card['name']}", "", *_what(card), *_captions(card), *_lost(card), *_made(card), ""])


def _what(card: dict[str, Any]) -> list[str]:
    rows = [
        ("samples", f"{card['samples']:,} ({card['videos']:,} videos, {card['images']:,} images)"),
        ("captions", f"{card['captions']:,}"),
        ("hours of video", f"{card['hours']:,.2f}"),
        ("bytes", f"{card['bytes']:,}"),
        ("shards", f"{len(card['shards']):,}"),
        ("seconds a video", _told(card["seconds"])),
        ("sizes", ", ".join(f"{size} ({count:,})" for size, count in list(card["sizes"].items())[:8])),
        ("attributes", ", ".join(card["attributes"]) or "none"),
        ("content digest", f"`{card['content']}`"),
    ]
    note = [str(card["world"].get("note", "A rendered world.")), ""] if "world" in card else []
    return [*note, *_table(("what", "how much"), rows)]


def _captions(card: dict[str, Any]) -> list[str]:
    told = card["caption_statistics"]
    rows = [("words", _told(told["words"])), ("a clip", _told(told["a_clip"])), ("distinct", f"{told['distinct']:,}")]
    return ["## Captions", "", *_table(("of", "spread"), rows)]


def _lost(card: dict[str, Any]) -> list[str]:
    if not card["lost"]:
        return ["## Lost", "", "No clip was lost.", ""]
    rows = []
    for reason, losses in card["lost"].items():
        named = ", ".join(f"`{loss['file']}`" for loss in losses["files"][:_EXAMPLES])
        rows.append((reason, f"{losses['count']:,}", named + (", ..." if losses["count"] > _EXAMPLES else "")))
    table = _table(("reason", "clips", "for example"), rows)
    return ["## Lost", "", *table, "`ledger.sqlite` has a row for every clip, with what was wrong with it.", ""]


def _made(card: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    command = ["```", str(card["command"]), "```", ""]
    reading = (
        "Plain WebDataset shards: `<key>.<mp4|jpg|...>` and `<key>.json`, with wds2idx indexes (v1.2) beside them."
    )
    return ["## Made", "", f"{card['created']}, with {versions}:", "", *command, reading]


def _told(spread: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in spread.items()) or "none"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return [*("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines), ""]
