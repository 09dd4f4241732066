"""A CSV or TSV of files and captions becomes the list of clips to build.

One row is one caption of one file; several rows with the same file are several captions of that clip. Columns other
than the two named become attributes of the clip (its first row decides): a column whose cells are all whole numbers,
all numbers or all true/false is read as such, any other is text.
"""

import csv
import difflib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError

logger = logging.getLogger(__name__)

_WHOLE = re.compile(r"[-+]?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Clip:
    """One file of the manifest: its path as written there, its captions that are not empty, its attributes."""

    file: str
    captions: tuple[str, ...]
    attributes: dict[str, Any]


def find_manifest(source: Path) -> Path:
    """The one CSV or TSV in a folder of media; raises UserError where there is none, or a choice."""
    if not source.is_dir():
        raise UserError(f"There is no source folder {source}.", "Give the folder that holds the media.")
    if not any(source.iterdir()):
        raise UserError(f"The source folder {source} is empty.", "Give the folder that holds the media.")
    found = sorted(path for path in source.iterdir() if path.suffix.lower() in (".csv", ".tsv"))
    if not found:
        raise UserError(f"There is no CSV or TSV in {source}.", "Name the file with the captions: --csv PATH.")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{source} holds {len(found)} manifests ({names}).", "Choose one of them: --csv PATH.")
    return found[0]


def read_manifest(path: Path, file_column: str, caption_column: str) -> list[Clip]:
    """The clips that a manifest names, in the order of their first rows.

    Raises UserError for a missing file, text that is not UTF-8, a column that is not there (naming the nearest), a row
    with another number of fields than the header, a row without a file, no rows, or captions that are all empty.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = next(rows, [])
            named = {column: _column(header, column, path) for column in (file_column, caption_column)}
            table = list(_complete(rows, header, path))
    except FileNotFoundError as error:
        raise UserError(
            f"There is no manifest {path}.", "Give --csv the file that lists files and captions."
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a UTF-8 table: {error}.", "Save it as UTF-8 CSV or TSV.") from error
    if not table:
        raise UserError(f"{path} has a header and no rows.", "Give a manifest with a row a caption.")
    others = [(i, name) for i, name in enumerate(header) if i not in named.values() and name]
    parsed = {name: _typed([row[i] for row in table]) for i, name in others}
    clips: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for line, row in enumerate(table):
        name, caption = row[named[file_column]].strip(), row[named[caption_column]]
        if not name:
            raise UserError(f"Row {line + 1} of {path} names no file.", "Fill that cell or remove the row.")
        if name not in clips:
            attributes = {column: values[line] for column, values in parsed.items() if values[line] is not None}
            clips[name] = ([], attributes)
        if caption.strip():
            clips[name][0].append(caption)  # as given: cleaning texts belongs to the preprocessing
    if not any(captions for captions, _ in clips.values()):
        raise UserError(
            f"Every caption in column '{caption_column}' of {path} is empty.",
            f"Name the column that holds them: --caption-column, one of {', '.join(header)}.",
        )
    if empty := len(table) - sum(len(captions) for captions, _ in clips.values()):
        logger.warning("%d of %d rows of %s have an empty caption: left out.", empty, len(table), path)
    return [Clip(name, tuple(captions), attributes) for name, (captions, attributes) in clips.items()]


def _column(header: list[str], name: str, path: Path) -> int:
    if name in header:
        return header.index(name)
    near = difflib.get_close_matches(name, header, n=1, cutoff=0.3)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    raise UserError(
        f"{path} has no column '{name}'; it has {', '.join(header) or 'nothing in it'}.",
        f"{hint}Name the columns with --file-column and --caption-column.",
    )


def _complete(rows: Iterator[list[str]], header: list[str], path: Path) -> Iterator[list[str]]:
    for number, row in enumerate(rows, start=1):
        if not row:
            continue
        if len(row) != len(header):
            raise UserError(
                f"Row {number} of {path} has {len(row)} fields, the header has {len(header)}.",
                'Put texts that hold the delimiter between double quotes ("...").',
            )
        yield row


def _typed(cells: list[str]) -> list[Any]:
    """A column's values, None where a cell is empty."""
    stripped = [cell.strip() for cell in cells]
    filled = [cell for cell in stripped if cell]
    convert: Any = str
    if all(_WHOLE.fullmatch(cell) for cell in filled):
        convert = int
    elif all(_NUMBER.fullmatch(cell) for cell in filled) and not any(re.match(r"[-+]?0\d", cell) for cell in filled):
        convert = float
    elif all(cell.lower() in _TRUTH for cell in filled):
        convert = lambda cell: _TRUTH[cell.lower()]  # noqa: E731
    return [convert(cell) if cell else None for cell in stripped]
