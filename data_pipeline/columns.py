"""Which columns of a table are the file, the captions and the span of a clip, and how a row becomes a clip.

    columns = Columns.parse(["file={page_dir}/{videoid}.mp4", "caption=name"]).bound(table.columns, path)
    clip = columns.clip(row, table)

A role is given by a column, or by a template of columns in braces (`{time_start:06d}` pads a number with zeros). The
columns that no role takes become attributes of the clip.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipeline.schema import as_captions
from data_pipeline.tables import Row, Table

ROLES = ("file", "caption", "start", "end")
# Where nothing is said; of several that a table has, each row takes the first that it fills.
DEFAULTS = {"file": ("file", "filename", "video", "image"), "caption": ("caption",)}
PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    # WebVid-2M and -10M: videoid, contentUrl, duration, page_dir, name; files as its download scripts name them.
    "webvid": {"file": ("{page_dir}/{videoid}.mp4",), "caption": ("name",)},
    # Kinetics-400, 600, 700: label, youtube_id, time_start, time_end, split; files cut and named as the archives of
    # the Common Visual Data Foundation have them, so that nothing is left to trim.
    "kinetics": {"file": ("{youtube_id}_{time_start:06d}_{time_end:06d}.mp4",), "caption": ("label",)},
    # The annotation files of UMT and VideoMamba: lists of {"video" or "image": path, "caption": text or texts}.
    "umt": {"file": ("video", "image"), "caption": ("caption",)},
}
_FIELD = re.compile(r"\{(\w+)(?::(\d+)d)?\}")
_CLOCK = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:[.,]\d*)?|[.,]\d+)")


@dataclass(frozen=True)
class Clip:
    """One clip of a source: its file as written there, its captions that are not empty, its attributes.

    `start` and `end`, in seconds, cut it out of a longer file. A file inside a tar has its `inside`: the tar (relative
    to the source), the offset and the size in bytes. `fault` says what is wrong with its row already.
    """

    file: str
    captions: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    start: float | None = None
    end: float | None = None
    inside: tuple[str, int, int] | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Columns:
    """Role to columns or templates. Several of `caption` are several captions, of others the first that is filled."""

    roles: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, texts: Sequence[str], preset: str | None = None) -> "Columns":
        """From `role=column,role=column` texts, over a preset. Raises UserError for a role or preset it does not know.

        A comma ends a column only where another `role=` follows it, so names and templates may hold commas.
        """
        if preset is not None and preset not in PRESETS:
            raise UserError(
                f"There is no preset '{preset}'.", f"{_nearest(preset, PRESETS)}The presets: {_list(PRESETS)}."
            )
        given: dict[str, tuple[str, ...]] = {}
        for part in (part for text in texts for part in re.split(r",(?=\s*\w+=)", text)):
            role, equals, column = (word.strip() for word in part.partition("="))
            if not equals or not column or role not in ROLES:
                cure = (
                    f"Write it as in --columns file=path,caption=title. {_nearest(role, ROLES)}Roles: {_list(ROLES)}."
                )
                raise UserError(f"'{part}' maps no column to a role.", cure)
            given[role] = (*given.get(role, ()), column)
        return cls({**(PRESETS[preset] if preset else {}), **given})

    def bound(self, header: Sequence[str], path: Path) -> "Columns":
        """The mapping for a table with this header; raises UserError naming the nearest column for one that lacks."""
        roles = {}
        for role in ROLES:
            asked = self.roles.get(role) or DEFAULTS.get(role, ())
            lacking = [column for column in asked if not set(_names(column)) <= set(header)]
            every = role == "caption" and role in self.roles  # each of them is a caption; else one is enough
            if lacking and (every or len(lacking) == len(asked)):
                raise _no_column(path, next(name for name in _names(lacking[0]) if name not in header), header)
            if asked:
                roles[role] = asked  # all of them: rows may name other keys than the first one did
        return Columns(roles)

    def clip(self, row: Row, table: Table) -> Clip | None:
        """The clip of a row; None where the row names no file."""
        name = next((text for column in self.roles["file"] if (text := _cell(column, row).strip())), "")
        if not name:
            return None
        attributes = {
            column: value
            for column, cell in row.items()
            if column and column not in self._taken and (value := table.attribute(column, cell)) is not None
        }
        start = end = fault = None
        try:
            start, end = (self._seconds(role, row) for role in ("start", "end"))
        except ValueError as error:
            fault = str(error)
        if start is not None and end is not None and end <= start:
            fault = f"it ends at {end:g} s and begins at {start:g} s"
        return Clip(name, _captions(row, self.roles["caption"]), attributes, start, end, fault=fault)

    @cached_property
    def _taken(self) -> frozenset[str]:
        """The columns that are no attributes: those with a role, but for the parts of a file's name."""
        columns = [
            column for role, given in self.roles.items() for column in given if role != "file" or "{" not in column
        ]
        return frozenset(name for column in columns for name in _names(column))

    def _seconds(self, role: str, row: Row) -> float | None:
        cells = (row.get(column) for column in self.roles.get(role, ()))
        value = next((cell for cell in cells if cell is not None and str(cell).strip()), None)
        return None if value is None else seconds(value)


def seconds(value: Any) -> float:
    """A time given as a number of seconds or as text: `12.5`, `1:02.5`, `00:01:02`. Raises ValueError for others."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    else:
        clock = _CLOCK.fullmatch(str(value).strip())
        if clock is None:
            raise ValueError(f"'{value}' is no time: expected seconds or hh:mm:ss")
        hours, minutes, rest = clock.groups()
        number = 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(rest.replace(",", "."))
    if not 0 <= number < float("inf"):
        raise ValueError(f"'{value}' is no time: expected 0 or more seconds")
    return number


def _captions(row: Row, columns: Iterable[str]) -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    for column in columns:
        found += as_captions(_cell(column, row) if "{" in column else row.get(column))
    return found


def _names(column: str) -> list[str]:
    """The columns that a role's column or template needs."""
    return [match[0] for match in _FIELD.findall(column)] or [column]


def _cell(column: str, row: Row) -> str:
    """The text of a column or template; empty where a cell of it is."""
    if not _FIELD.search(column):
        value = row.get(column)
        return "" if value is None else str(value)
    if any(row.get(name) is None or not str(row[name]).strip() for name in _names(column)):
        return ""

    def filled(match: re.Match[str]) -> str:
        text = str(row[match[1]]).strip()
        return text if match[2] is None else f"{int(float(text)):0{int(match[2])}d}"

    try:
        return _FIELD.sub(filled, column)
    except ValueError:  # a padded field that is no number: the file as written there cannot exist, and is missed
        return _FIELD.sub(lambda match: str(row[match[1]]), column)


def _no_column(path: Path, name: str, header: Sequence[str]) -> UserError:
    return UserError(
        f"{path} has no column '{name}'; it has {', '.join(header) or 'nothing in it'}.",
        f"{_nearest(name, header)}Name the columns with --columns file=...,caption=... or --preset.",
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.3)
    return f"Did you mean '{near[0]}'? " if near else ""


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
