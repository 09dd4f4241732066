"""The annotation files of the retrieval benchmarks, as their authors publish them: each to ids and texts.

    MSR-VTT      csv `key,vid_key,video_id,sentence`, the 1k-A split          (JSFusion, arXiv 1808.02559)
    MSVD         json {video: [caption, ...]} and a list of the split's ids   (Chen and Dolan, ACL 2011)
    DiDeMo       json [{video, description, times, annotation_id}, ...]       (arXiv 1708.01641)
    ActivityNet  json {video: {timestamps, sentences, duration}}, val_1       (arXiv 1705.00754)
    LSMDC        tab separated, no header, the id first, the sentence last    (arXiv 1605.03705)
    processed    json [{"video" or "image", "caption"}, ...]                  (UMT and VideoMamba)

A reader changes no letter of a caption: cleaning belongs to the checkpoint's text preprocessing, joining of
sentences to benchmarks.py. It keeps the file's order and what paragraphs can be ordered by.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError


@dataclass(frozen=True)
class Line:
    """One annotated sentence: the video's name as written, the text, and what may decide its place in a paragraph."""

    video: str
    text: str
    start: float = 0.0
    """Where it begins in the video, in seconds or in segments of its set; 0 where the set has no times."""
    number: int = 0
    """The set's own number of the annotation; 0 where it has none."""
    answer: int | None = None
    """In multiple choice: which of the video's texts, in the file's order, is the right one."""


def read_msrvtt(path: Path) -> list[Line]:
    """The 1k-A test split: one sentence a row. Duplicate sentences on other videos stay (there are five surplus)."""
    with _opened(path) as text:
        rows = csv.DictReader(text)
        names = rows.fieldnames or []
        absent = [name for name in ("video_id", "sentence") if name not in names]
        if absent:
            raise _unlike(path, f"its header is {', '.join(names) or 'empty'}, without {' and '.join(absent)}")
        return [Line(row["video_id"], row["sentence"]) for row in rows]


def read_msvd(path: Path, videos: Path) -> list[Line]:
    """Every caption of the videos that `videos` lists, one id a line; empty lines at its end are no ids."""
    captions = _parsed(path)
    if not isinstance(captions, dict):
        raise _unlike(path, "it is no object of video ids with lists of captions")
    with _opened(videos) as text:
        listed = [line.strip() for line in text if line.strip()]
    unknown = [video for video in listed if video not in captions]
    if unknown:
        raise UserError(
            f"{len(unknown)} of the {len(listed)} ids in {videos} have no captions in {path}, such as {unknown[0]}.",
            "Take the list and the captions of one release.",
        )
    return [Line(video, caption, number=place) for video in listed for place, caption in enumerate(captions[video])]


def read_didemo(path: Path) -> list[Line]:
    """Every description; `start` is the earliest segment that most annotators gave, `number` the annotation's id."""
    return [
        Line(entry["video"], entry["description"], _usual_start(entry["times"]), entry["annotation_id"])
        for entry in _entries(path, "video", "description", "times", "annotation_id")
    ]


def _usual_start(times: list[list[int]]) -> float:
    """The first segment on which most annotators agree, the earliest of equals."""
    starts = [begin for begin, _ in times]
    return float(min(set(starts), key=lambda begin: (-starts.count(begin), begin))) if starts else 0.0


def read_activitynet(path: Path) -> list[Line]:
    """Every sentence with the second at which it starts; the file's order within a video is kept."""
    tree = _parsed(path)
    if not isinstance(tree, dict):
        raise _unlike(path, "it is no object of video ids")
    lines = []
    for video, entry in tree.items():
        if not isinstance(entry, dict) or len(entry.get("sentences", ())) != len(entry.get("timestamps", (None,))):
            raise _unlike(path, f"'{video}' has no `sentences` and `timestamps` of one length")
        spans = zip(entry["timestamps"], entry["sentences"], strict=True)
        lines += [Line(video, text, float(begin), place) for place, ((begin, _), text) in enumerate(spans)]
    return lines


def read_lsmdc(path: Path) -> list[Line]:
    """One sentence a row of six columns; `start` is the extracted start, hh.mm.ss.mmm, in seconds."""
    lines = []
    with _opened(path) as text:
        for place, row in enumerate(csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            if not row:
                continue
            if len(row) < 2:
                raise _unlike(path, f"line {place} has no tab in it")
            start = _seconds(row[3]) if len(row) >= 6 else 0.0
            lines.append(Line(row[0], row[-1], start, place))
    return lines


def _seconds(stamp: str) -> float:
    """hh.mm.ss.mmm in seconds; 0 for what is no time, since it decides nothing but an order."""
    parts = stamp.split(".")
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        return 0.0
    hours, minutes, seconds, milliseconds = map(int, parts)
    return 3600 * hours + 60 * minutes + seconds + milliseconds / 1000


def read_processed(path: Path) -> list[Line]:
    """The list that UMT and VideoMamba read: `caption` is a text, or a list of texts, of one video or image.

    An `answer` (the number of the right caption, from 0) makes it multiple choice.
    """
    tree = _parsed(path)
    if not isinstance(tree, list):
        raise _unlike(path, "it is no list")
    lines = []
    for place, entry in enumerate(tree):
        name = entry.get("video", entry.get("image")) if isinstance(entry, dict) else None
        captions = entry.get("caption") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(captions, str | list):
            raise _unlike(path, f"entry {place} has no `video` (or `image`) with a `caption`")
        texts = [captions] if isinstance(captions, str) else captions
        lines += [Line(name, text, number=number, answer=entry.get("answer")) for number, text in enumerate(texts)]
    return lines


def _entries(path: Path, *wanted: str) -> Iterator[dict[str, Any]]:
    tree = _parsed(path)
    if not isinstance(tree, list):
        raise _unlike(path, "it is no list")
    for place, entry in enumerate(tree):
        absent = [key for key in wanted if not isinstance(entry, dict) or key not in entry]
        if absent:
            raise _unlike(path, f"entry {place} has no {' and no '.join(f'`{key}`' for key in absent)}")
        yield entry


def _parsed(path: Path) -> Any:
    with _opened(path) as text:
        try:
            return json.load(text)
        except ValueError as error:
            raise _unlike(path, f"it is no JSON ({error})") from error


def _opened(path: Path) -> Any:
    try:
        # A leading byte-order mark is no part of the first id; newlines inside quotes belong to csv.
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise UserError(
            f"There is no annotation file {path} ({error.strerror}).", "Give data.annotations the file of that set."
        ) from error


def _unlike(path: Path, what: str) -> UserError:
    return UserError(f"{path} is not the annotation file of this benchmark: {what}.", "Give the file of that set.")


READERS: dict[str, Callable[[Path], list[Line]]] = {
    "msrvtt": read_msrvtt,
    "didemo": read_didemo,
    "activitynet": read_activitynet,
    "lsmdc": read_lsmdc,
    "processed": read_processed,
}
"""Those that need one file; MSVD needs a list beside it."""
