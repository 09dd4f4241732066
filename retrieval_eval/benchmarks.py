"""A published test set as a value: its videos in the file's order, each with its captions, and where the text is from.

The choices that change a number (what one video is, paragraphs, several captions) are fields of BenchmarkData; here
they are carried out, and counted for the result.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from retrieval_eval.config import BenchmarkData, KeyRule, Paragraph
from retrieval_eval.readers import READERS, Line, read_msvd

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".3g2", ".mts", ".m2ts"}
    | {".ts", ".ogv", ".gif"}
)
MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES


@dataclass(frozen=True)
class Entry:
    """One video (or image) of a set, by the name its annotation gives it, with its captions."""

    name: str
    captions: tuple[str, ...]
    answer: int | None = None
    """In multiple choice: which caption is the right one."""


@dataclass(frozen=True)
class Benchmark:
    """A test set as annotated; `sentences` counts the file's lines, `files` holds the sha256 of each file read."""

    entries: list[Entry]
    sentences: int
    files: dict[str, str]

    @property
    def multiple_choice(self) -> bool:
        """Whether each video has one right caption among its own, instead of all others' to be told from."""
        return self.entries[0].answer is not None


def load(data: BenchmarkData) -> Benchmark:
    """Read the annotations of a set and carry out its protocol; UserError for another file, or one without videos."""
    paths = [Path(data.annotations), *([Path(data.videos)] if data.videos is not None else [])]
    lines = read_msvd(*paths) if data.type == "msvd" else READERS[data.type](paths[0])
    entries = group(lines, data.key, data.paragraph)
    if not entries:
        raise UserError(f"{data.annotations} annotates no video.", "Give the whole file of that set.")
    if len({entry.answer is None for entry in entries}) > 1:
        raise UserError(
            f"{data.annotations} has an `answer` for some videos and none for others.",
            "Give every video one for multiple choice, or none for retrieval.",
        )
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return Benchmark(entries, len(lines), files)


def group(lines: list[Line], key: KeyRule, paragraph: Paragraph) -> list[Entry]:
    """The lines of each video together, in the order in which the file first names it."""
    by_video: dict[str, list[Line]] = {}
    for line in lines:
        by_video.setdefault(line.video if key == "name" else stem(line.video), []).append(line)
    return [Entry(name, _captions(found, paragraph), found[0].answer) for name, found in by_video.items()]


def _captions(lines: list[Line], paragraph: Paragraph) -> tuple[str, ...]:
    if paragraph == "none":
        return tuple(line.text for line in lines)
    if paragraph == "number":
        lines = sorted(lines, key=lambda line: line.number)
    elif paragraph == "start":
        lines = sorted(lines, key=lambda line: (line.start, line.number))
    return (" ".join(line.text for line in lines),)


def stem(name: str) -> str:
    """A name without its media extension. Ids with dots of their own (LSMDC's times) keep them; DiDeMo's bare
    trailing dot goes.
    """
    path = Path(name)
    suffix = path.suffix.lower()
    return name[: -len(path.suffix)] if suffix in MEDIA_SUFFIXES else name.removesuffix(".")
