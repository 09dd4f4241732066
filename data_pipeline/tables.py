"""Tables of files and captions as streams of rows: CSV, TSV, JSON, JSONL, Parquet and SQLite.

    for number, row in open_table(Path("captions.jsonl"), "jsonl").rows(): ...

A row is a mapping of column to value, `number` counts from 1. No format is held in memory: what is, is one row of a
CSV, JSON or SQLite table (and a block of `_BLOCK` characters of a JSON list), or a row group
of a Parquet file as it is stored, of which `_BATCH` rows at a time are unpacked.
"""

import csv
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from configs.errors import UserError

SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".sqlite": "sqlite",
    ".sqlite3": "sqlite",
    ".db": "sqlite",
}

Row = dict[str, Any]

_BLOCK = 1 << 16
_BATCH = 1024
_LONGEST = 1 << 24  # characters of one element of a JSON list; more is taken for a fault in it
_BLANK = re.compile(r"[ \t\r\n]*")
_WHOLE = re.compile(r"[-+]?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_PADDED = re.compile(r"[-+]?0\d")
_TRUTH = {"true": True, "false": False}


class Table(Protocol):
    """A table on the disk. `columns` are those of its header, or of its first row where rows name their own."""

    @property
    def columns(self) -> list[str]:
        """The names of its columns."""

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Its rows with their numbers, from 1. Raises UserError where the file is damaged."""

    def attribute(self, column: str, value: Any) -> Any:
        """What a cell says: text, a number or a truth value; None for an empty one."""


def open_table(path: Path, kind: str, table: str | None = None) -> Table:
    """A table of the given kind (a value of `SUFFIXES`); `table` chooses one of an SQLite database.

    Raises UserError for a file that is missing, empty, or not of that kind.
    """
    if not path.is_file():
        raise UserError(f"There is no manifest {path}.", "Give --manifest the file that lists files and captions.")
    if kind in ("csv", "tsv"):
        return _Delimited(path, "\t" if kind == "tsv" else ",")
    if kind == "parquet":
        return _Parquet(path)
    if kind == "sqlite":
        return _Database(path, table)
    return _Records(path, lines=kind == "jsonl")


def flat(value: Any) -> Any:
    """A value as an attribute may be: text, a number, a truth value; None where it says nothing."""
    if value is None or isinstance(value, str | bool | int):
        return value if value != "" else None
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None  # JSON has neither NaN nor infinity
    if isinstance(value, bytes | bytearray):
        return None  # media inside a table, or a thumbnail: no attribute
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str) if value else None
    return str(value)  # a date, a decimal


class _Delimited:
    """CSV or TSV. A column whose cells are all whole numbers, all numbers or all true/false is read as such."""

    def __init__(self, path: Path, delimiter: str) -> None:
        self._path = path
        self._delimiter = delimiter
        self._kinds: dict[str, type] | None = None
        self.columns = next(self._cells(), [])

    def rows(self) -> Iterator[tuple[int, Row]]:
        """One mapping of text a row; a row with another number of fields than the header is a UserError."""
        cells = self._cells()
        width = len(next(cells, []))
        for number, row in enumerate(cells, start=1):
            if len(row) != width:
                raise UserError(
                    f"Row {number} of {self._path} has {len(row)} fields, the header has {width}.",
                    'Put texts that hold the delimiter between double quotes ("...").',
                )
            yield number, dict(zip(self.columns, row, strict=True))

    def attribute(self, column: str, value: Any) -> Any:
        """A cell in the type of its whole column, which takes one more reading of the file, once."""
        if self._kinds is None:
            self._kinds = self._read_kinds()
        text = str(value).strip()
        if not text:
            return None
        kind = self._kinds[column]
        return _TRUTH[text.lower()] if kind is bool else kind(text)

    def _cells(self) -> Iterator[list[str]]:
        try:
            with self._path.open(encoding="utf-8-sig", newline="") as file:
                yield from (row for row in csv.reader(file, delimiter=self._delimiter) if row)
        except (UnicodeDecodeError, csv.Error) as error:
            cure = "Save it as UTF-8 CSV or TSV."
            raise UserError(f"{self._path} cannot be read as a UTF-8 table: {error}.", cure) from error

    def _read_kinds(self) -> dict[str, type]:
        possible: dict[str, set[type]] = {name: {int, float, bool} for name in self.columns}
        for _, row in self.rows():
            for name, kinds in possible.items():
                if kinds and (text := row[name].strip()):
                    kinds &= _kinds_of(text)
        return {
            name: next((kind for kind in (int, float, bool) if kind in kinds), str) for name, kinds in possible.items()
        }


def _kinds_of(text: str) -> set[type]:
    """What a cell could be read as, besides text; 007 is no number."""
    if _WHOLE.fullmatch(text):
        return {int, float}
    if _NUMBER.fullmatch(text) and not _PADDED.match(text):
        return {float}
    return {bool} if text.lower() in _TRUTH else set()


class _Records:
    """JSON (a list of mappings) or JSONL (a mapping a line, under whichever of the two names)."""

    def __init__(self, path: Path, lines: bool) -> None:
        self._path = path
        with path.open("rb") as file:
            self._lines = lines or file.read(_BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"
        self.columns = list(next(self.rows(), (0, {}))[1])

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The mappings, one at a time."""
        with self._path.open(encoding="utf-8-sig") as file:
            values = self._by_line(file) if self._lines else self._by_block(file)
            number = 0
            try:
                for number, value in enumerate(values, start=1):
                    if not isinstance(value, dict):
                        raise self._fault(number, f"is a {type(value).__name__}, not a mapping")
                    yield number, value
            except ValueError as error:  # not JSON, or not UTF-8
                raise self._fault(number + 1, f"cannot be read ({error})") from error

    def attribute(self, column: str, value: Any) -> Any:  # noqa: ARG002  the protocol's
        """Values bring their types along."""
        return flat(value)

    def _fault(self, number: int, what: str) -> UserError:
        shape = "a mapping a line" if self._lines else 'one list of mappings: [{"file": ..., "caption": ...}, ...]'
        return UserError(f"Record {number} of {self._path} {what}.", f"It must hold {shape}, in UTF-8.")

    @staticmethod
    def _by_line(file: TextIO) -> Iterator[Any]:
        return (json.loads(line) for line in file if not line.isspace())

    @staticmethod
    def _by_block(file: TextIO) -> Iterator[Any]:
        """The elements of one JSON list, read a block at a time."""
        decoder = json.JSONDecoder()
        blocks = iter(lambda: file.read(_BLOCK), "")
        text, at = next((block.lstrip() for block in blocks if not block.isspace()), ""), 1
        if not text.startswith("["):
            raise ValueError("the file is no list")
        while True:
            at = _blank_until(text, at)
            if text.startswith("]", at):
                break
            fault = ValueError("the list breaks off")
            end = len(text)
            try:
                value, end = decoder.raw_decode(text, at)
            except ValueError as error:
                fault = error
            end = _blank_until(text, end)
            if end < len(text):  # else the block may have cut the element, a number even unseen
                if text[end] not in ",]":
                    raise ValueError(f"'{text[end]}' stands between two elements")
                yield value
                at = end + (text[end] == ",")
                continue
            more = file.read(max(_BLOCK, len(text) - at))
            if not more or len(text) - at > _LONGEST:
                raise fault
            text, at = text[at:] + more, 0
        if text[at + 1 :].strip() or file.read(1).strip():
            raise ValueError("something follows the list")


def _blank_until(text: str, at: int) -> int:
    """Where blanks that begin at `at` end."""
    blank = _BLANK.match(text, at)
    return blank.end() if blank else at


class _Parquet:
    """Parquet, by pyarrow, a batch at a time."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                f"{path} is Parquet, and pyarrow, which reads it, is not installed.",
                "Run `pip install 'videomamba[parquet]'` (or `pip install pyarrow`).",
                exit_code=1,
            ) from error
        self._path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._fault(error) from error
        self.columns = list(self._file.schema_arrow.names)

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Rows of Python values; columns of bytes, which hold media or thumbnails, are left out."""
        import pyarrow

        binary = (pyarrow.types.is_binary, pyarrow.types.is_large_binary)
        wanted = [f.name for f in self._file.schema_arrow if not any(is_kind(f.type) for is_kind in binary)]
        number = 0
        try:
            for batch in self._file.iter_batches(_BATCH, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            raise self._fault(error) from error

    def attribute(self, column: str, value: Any) -> Any:  # noqa: ARG002  the protocol's
        """Values bring their types along."""
        return flat(value)

    def _fault(self, error: Exception) -> UserError:
        return UserError(f"{self._path} cannot be read as Parquet: {error}.", "Write it again, or give another format.")


@dataclass
class _Database:
    """One table of an SQLite database, opened for reading only."""

    path: Path
    table: str | None
    columns: list[str] = field(init=False)

    def __post_init__(self) -> None:
        names = [row[0] for row in self._query("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
        names = [name for name in names if not name.startswith("sqlite_")]
        if self.table is None and len(names) == 1:
            self.table = names[0]
        if self.table not in names:
            cause = "no table" if self.table is None and not names else f"the tables {', '.join(names) or '(none)'}"
            asked = f", not '{self.table}'" if self.table is not None else ""
            raise UserError(f"{self.path} holds {cause}{asked}.", "Choose one of them: --table NAME.")
        self._name = '"' + str(self.table).replace('"', '""') + '"'
        self.columns = [row[1] for row in self._query(f"PRAGMA table_info({self._name})")]

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The rows in the order in which the database gives them, which is the same for the same file."""
        for number, row in enumerate(self._query(f"SELECT * FROM {self._name}"), start=1):
            yield number, dict(zip(self.columns, row, strict=True))

    def attribute(self, column: str, value: Any) -> Any:  # noqa: ARG002  the protocol's
        """Values bring their types along."""
        return flat(value)

    def _query(self, text: str) -> Iterator[tuple[Any, ...]]:
        try:
            uri = f"{self.path.resolve().as_uri()}?mode=ro"
            with closing(sqlite3.connect(uri, uri=True)) as database:
                yield from database.execute(text)
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path} cannot be read as an SQLite database ({error}).", "Check the file."
            ) from error
