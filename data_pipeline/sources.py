"""What a corpus can be built from: a table of files and captions, a folder with side-cars, or existing shards.

`open_source` finds out which; a `Source` then streams its clips, each with the position that becomes its key. Of a
folder what is held in memory is the listing of one sub-folder at a time, of tars one sample, of tables see `tables`.
"""

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from configs.errors import UserError
from data_pipeline.columns import Clip, Columns
from data_pipeline.index import MEDIA
from data_pipeline.schema import as_captions
from data_pipeline.tables import SUFFIXES, Table, open_table
from data_pipeline.tars import told_in, walk

FORMATS = (*dict.fromkeys(SUFFIXES.values()), "folder", "shards")
TAR_ROOM = 1_000_000  # positions that one tar takes


@dataclass(frozen=True)
class Part:
    """The share `index` (from 1) of `count`; the shares of a source are disjoint and make up the whole."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From `3/16`; raises UserError for anything else."""
        index, slash, count = text.partition("/")
        if slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return cls(int(index), int(count))
        raise UserError(f"'{text}' is no part.", "Write it as in --part 3/16: the third of sixteen.")

    def has(self, name: str) -> bool:
        """Whether a file of this name is in this share: by a checksum, so that no share has to see the others."""
        return self.count == 1 or zlib.crc32(name.encode()) % self.count == self.index - 1

    def has_turn(self, turn: int) -> bool:
        """Whether the `turn`-th of a few large things is in this share."""
        return turn % self.count == self.index - 1


class Source(Protocol):
    """Where clips come from; their files are relative to `root`."""

    root: Path

    def identity(self) -> dict[str, Any]:
        """What tells this source, as it is now, from any other: compared before a build goes on."""

    def clips(self, part: Part) -> Iterator[tuple[int, Clip]]:
        """Position and clip of each of its rows in this part; rows of one clip have several captions of it."""


def open_source(
    source: Path,
    manifest: Path | None = None,
    columns: Columns | None = None,
    kind: str | None = None,
    table: str | None = None,
) -> Source:
    """The source at a path: a manifest, a tar, or a folder of media (with a manifest or side-cars) or of tars.

    `kind` is one of FORMATS where the suffix does not tell. Raises UserError where nothing is found, or a choice.
    """
    if kind is not None and kind not in FORMATS:
        raise UserError(f"There is no format '{kind}'.", f"Give one of {', '.join(FORMATS)}.")
    if not source.exists():
        raise UserError(f"There is no source folder {source}.", "Give the folder that holds the media, or a manifest.")
    if source.is_file() and source.suffix.lower() == ".tar":
        return TarSource(source.parent, [source.name])
    if source.is_file():
        if manifest is not None:
            raise UserError(f"The source {source} is a file.", "With --manifest, give the folder that holds the media.")
        return _table_source(source, source.parent, columns, kind, table)
    if manifest is not None:
        return _table_source(manifest, source, columns, kind, table)
    if not any(source.iterdir()):
        raise UserError(f"The source folder {source} is empty.", "Give the folder that holds the media.")
    if kind == "folder":
        return FolderSource(source)
    tars = sorted(path.name for path in source.glob("*.tar"))
    if kind == "shards" or (kind is None and tars):
        if not tars:
            raise UserError(f"There are no shards (*.tar) in {source}.", "Give the folder that holds them.")
        return TarSource(source, tars)
    found = _manifests(source, kind)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{source} holds {len(found)} manifests ({names}).", "Choose one of them: --manifest PATH.")
    if found:
        return _table_source(found[0], source, columns, kind, table)
    if kind is None and any(True for _ in FolderSource(source).media()):
        return FolderSource(source)
    what = f"no {kind.upper()}" if kind else "no manifest (CSV, TSV, JSON, JSONL, Parquet, SQLite), no tar and no media"
    raise UserError(f"There is {what} in {source}.", "Name the file with the captions: --manifest PATH.")


def _manifests(folder: Path, kind: str | None) -> list[Path]:
    """The tables in a folder; a .json beside a medium of its name is that medium's side-car."""
    media = {path.stem for path in folder.iterdir() if path.suffix[1:].lower() in MEDIA}
    found = []
    for path in sorted(folder.iterdir()):
        its = SUFFIXES.get(path.suffix.lower())
        if path.is_file() and its is not None and its == (kind or its) and not (its == "json" and path.stem in media):
            found.append(path)
    return found


def _table_source(
    path: Path, root: Path, columns: Columns | None, kind: str | None, table: str | None
) -> "TableSource":
    kind = kind or SUFFIXES.get(path.suffix.lower())
    if kind is None or kind not in SUFFIXES.values():
        raise UserError(
            f"'{path.suffix}' of {path} tells no format of a table.", f"Name it: --format {'|'.join(FORMATS[:-2])}."
        )
    opened = open_table(path, kind, table)
    bound = (columns or Columns()).bound(opened.columns, path)
    return TableSource(path, root, kind, opened, bound)


@dataclass
class TableSource:
    """A manifest: one row is a file and its captions; several rows of a file are several captions of that clip."""

    path: Path
    root: Path
    kind: str
    table: Table
    columns: Columns

    def identity(self) -> dict[str, Any]:
        """The manifest by its content, and how its columns are read."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "source": str(self.root.resolve()),
            "manifest": str(self.path.resolve()),
            "manifest_sha256": digest,
            "format": self.kind,
            "columns": {role: list(columns) for role, columns in self.columns.roles.items()},
            "table": getattr(self.table, "table", None),
        }

    def clips(self, part: Part) -> Iterator[tuple[int, Clip]]:
        """The position is the number of the row, from 0. Raises UserError for a row without a file, and for no rows."""
        number = 0
        for number, row in self.table.rows():
            clip = self.columns.clip(row, self.table)
            if clip is None:
                raise UserError(f"Row {number} of {self.path} names no file.", "Fill that cell or remove the row.")
            if part.has(clip.file):
                yield number - 1, clip
        if number == 0:
            raise UserError(f"{self.path} has a header and no rows.", "Give a manifest with a row a caption.")


@dataclass
class FolderSource:
    """A folder of media, each with a side-car of its stem: a .txt with a caption a line, or a .json.

    The .json holds a caption, a list of them, or a mapping with `caption` or `captions` and, beside it, attributes.
    """

    root: Path

    def media(self) -> Iterator[Path]:
        """The media below the folder, in a fixed order."""
        for folder, below, names in os.walk(self.root):
            below.sort()
            for name in sorted(names):
                if Path(name).suffix[1:].lower() in MEDIA:
                    path = Path(folder, name)
                    if "\ufffd" in (said := os.fsencode(path).decode(errors="replace")):
                        raise UserError(f"The name of {said} is not UTF-8.", "Rename it: a shard could not name it.")
                    yield path

    def identity(self) -> dict[str, Any]:
        """Names of the media, and names, sizes and times of their side-cars; media may be mended and tried again."""
        digest = hashlib.sha256()
        for path in self.media():
            digest.update(f"{path.relative_to(self.root)}\n".encode())
            for file in (path.with_suffix(".txt"), path.with_suffix(".json")):
                if file.is_file():
                    found = file.stat()
                    digest.update(f"{file.relative_to(self.root)}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
        return {"source": str(self.root.resolve()), "format": "folder", "listing_sha256": digest.hexdigest()}

    def clips(self, part: Part) -> Iterator[tuple[int, Clip]]:
        """The position is the rank of the medium in the folder."""
        for position, path in enumerate(self.media()):
            name = str(path.relative_to(self.root))
            if part.has(name):
                yield position, self._clip(name, path)

    def _clip(self, name: str, path: Path) -> Clip:
        side = path.with_suffix(".json")
        captions: tuple[str, ...] = ()
        attributes: dict[str, Any] = {}
        try:
            if side.is_file():
                captions, attributes = told_in(json.loads(side.read_bytes()))
            elif (side := path.with_suffix(".txt")).is_file():
                captions = as_captions(side.read_text(encoding="utf-8-sig").splitlines())
        except ValueError as error:
            raise UserError(f"The side-car {side} cannot be read ({error}).", "Write it as UTF-8.") from error
        return Clip(name, captions, attributes)


@dataclass
class TarSource:
    """Existing WebDataset or video2dataset shards: a sample's captions are in its .json or its .txt member."""

    root: Path
    tars: list[str]

    def identity(self) -> dict[str, Any]:
        """Names, sizes and times of the tars."""
        found = [(name, (self.root / name).stat()) for name in self.tars]
        listing = "".join(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for name, stat in found)
        digest = hashlib.sha256(listing.encode()).hexdigest()
        return {
            "source": str(self.root.resolve()),
            "format": "shards",
            "tars": len(self.tars),
            "listing_sha256": digest,
        }

    def clips(self, part: Part) -> Iterator[tuple[int, Clip]]:
        """The position is TAR_ROOM times the rank of the tar, plus that of the sample in it.

        A tar that breaks off gives what stands before the break, then a clip whose fault says so.
        """
        for turn, name in enumerate(self.tars):
            if not part.has_turn(turn):
                continue
            rank = -1
            for rank, clip in enumerate(self._samples(name)):
                if rank == TAR_ROOM - 1:
                    raise UserError(
                        f"{self.root / name} has {TAR_ROOM} samples or more.", "Split it into smaller tars."
                    )
                yield turn * TAR_ROOM + rank, clip
            if rank < 0:
                yield turn * TAR_ROOM, Clip(name, (), fault="there is no sample in it", inside=(name, 0, 0))

    def _samples(self, name: str) -> Iterator[Clip]:
        try:
            for sample in walk(self.root / name):
                medium = sample.medium or sample.members[0]
                yield Clip(
                    f"{name}:{medium.name}",
                    sample.captions,
                    sample.attributes,
                    inside=(name, medium.offset_data, medium.size),
                    fault=sample.fault,
                )
        except tarfile.TarError as error:
            yield Clip(name, (), fault=f"a tar reader gives up: {error}", inside=(name, 0, 0))
