"""A result as people read it: a table for a terminal of 80 columns, and a row of Markdown to paste."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from retrieval_eval.collection import ClipInfo
from retrieval_eval.comparison import RESULT, Comparison

MEASURES = ("R@1", "R@5", "R@10", "MedR")
WAYS = {"t2v": "text to video", "v2t": "video to text"}
VIEWS = {"shuffled": ", frames shuffled", "single": ", one frame repeated"}


def table(result: dict[str, Any]) -> Table:
    """A row a direction, scoring and view; in multiple choice a row a scoring and view."""
    made = Table(title="Zero-shot retrieval", title_justify="left")
    made.add_column("")
    views = [("", result["results"])] + [(VIEWS[n], scored) for n, scored in result["results"]["controls"].items()]
    if multiple_choice(result):
        made.add_column("accuracy", justify="right")
        for view, scored in views:
            for scoring, column in result["columns"].items():
                if scoring in scored:
                    made.add_row(f"multiple choice ({column}){view}", f"{scored[scoring]['choice']['accuracy']:.1f}")
        return made
    for measure in MEASURES:
        made.add_column(measure, justify="right")
    for way, title in WAYS.items():
        for view, scored in views:
            for scoring, column in result["columns"].items():
                if scoring in scored:
                    numbers = [f"{scored[scoring][way][measure]:.1f}" for measure in MEASURES]
                    made.add_row(f"{title} ({column}){view}", *numbers)
        if way == "t2v":
            made.add_section()
    return made


def closing(result: dict[str, Any], out: Path) -> str:
    """What stands under the table: how many clips, what is missing, chance, and where the rest is."""
    protocol = result["protocol"]
    lost = len(result["missing"])
    missing = ""
    if lost:
        missing = f", {lost} clip{'s' if lost > 1 else ''} could not be read (named in it): the result is partial"
    chance = "" if multiple_choice(result) else f"; chance R@1 {result['chance']['t2v']['R@1']:.2f} %"
    lines = [f"{protocol['clips']} clips, {protocol['captions']} captions{missing}{chance}."]
    lines.append(f"Everything else: {out / RESULT}; to paste: {out / ROW}; to look at: {out / REPORT}")
    if "note" in protocol:
        lines.append(f"{protocol['note']} World version {protocol['world'].get('version', 'unknown')}.")
    return "\n".join(lines)


ROW, REPORT = "row.md", "report.html"


def markdown(result: dict[str, Any]) -> str:
    """A table with a row a scoring, R@1 / R@5 / R@10 both ways, and a line that says how it was made."""
    protocol = result["protocol"]
    if multiple_choice(result):
        rows = ["| scoring | accuracy |", "|---|---|"]
        rows += [f"| {column} | {result['results'][name]['choice']['accuracy']:.1f} |"
                 for name, column in result["columns"].items()]  # fmt: skip
    else:
        rows = ["| scoring | text to video R@1 / R@5 / R@10 | video to text R@1 / R@5 / R@10 |", "|---|---|---|"]
        for name, column in result["columns"].items():
            ways = [result["results"][name][way] for way in WAYS]
            cells = [" / ".join(f"{way[measure]:.1f}" for measure in ("R@1", "R@5", "R@10")) for way in ways]
            rows.append(f"| {column} | {' | '.join(cells)} |")
    made = (
        f"{protocol['split']}, {protocol['clips']} clips, {protocol['captions']} captions, {result['status']}; "
        f"{protocol['frames']} frames, {protocol['precision']}, checkpoint {protocol['checkpoint_digest']} at step "
        f"{protocol['checkpoint_step']}, data {protocol['corpus_digest'][:16]}, ties {protocol['ties']}"
    )
    return "\n".join([*rows, "", made, ""])


def multiple_choice(result: dict[str, Any]) -> bool:
    """Whether each video was asked for its right caption among its own."""
    return "choice" in result["results"]["dual"]


def differences(found: Comparison) -> Table:
    """A row a scoring, direction and measure: a, b, and b - a with its interval."""
    made = Table(title="Paired bootstrap over the same queries", title_justify="left")
    for heading in ("", "a", "b", "b - a", "95 % interval", "p"):
        made.add_column(heading, justify="left" if not heading else "right")
    for one in found.differences:
        made.add_row(
            f"{one.direction} {one.measure} ({one.scoring})",
            f"{one.a:.1f}",
            f"{one.b:.1f}",
            f"{one.b - one.a:+.1f}",
            f"{one.low:+.1f} to {one.high:+.1f}",
            f"{one.p:.3f}",
        )
    return made


def hits(query: str, found: Sequence[tuple[float, ClipInfo]]) -> Table:
    """The clips that a sentence found, best first: where each is, and what it was called."""
    made = Table(title=Text(f"“{query}”"), title_justify="left", box=SIMPLE_HEAD)
    for heading, justify in (("", "right"), ("score", "right"), ("key", "left"), ("caption", "left"),
                             ("shard", "left"), ("time", "right")):  # fmt: skip
        made.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for rank, (score, clip) in enumerate(found, start=1):
        words = (clip.key, clip.captions[0] if clip.captions else "", clip.shard, clip.time)
        made.add_row(str(rank), f"{score:.4f}", *map(Text, words))
    return made
