"""The account of a build, in SQLite: one row a clip, and what was asked for.

A clip is `listed`, then `planned` (its file is there) until it is `done` (with shard, key and offset) or `lost` (with
a reason and a detail). Rows change in one transaction a shard, after the shard has its final name, so the ledger
never promises what is not on the disk. Rows come and go as streams: a corpus of any size takes the memory of a page
of them. The database stays locked while a build runs and is released by the death of its process, whatever killed it.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from configs.errors import UserError
from data_pipeline.columns import Clip
from data_pipeline.schema import LossReason

VERSION = 2
PAGE = 500  # rows read at a time

_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE clips (
    position INTEGER PRIMARY KEY, file TEXT NOT NULL, start REAL, stop REAL, tar TEXT, tar_offset INTEGER,
    status TEXT NOT NULL, reason TEXT, detail TEXT, shard TEXT, key TEXT, offset INTEGER, bytes INTEGER NOT NULL,
    sha256 TEXT, media TEXT, width INTEGER, height INTEGER, frames INTEGER, duration REAL,
    captions TEXT NOT NULL, attributes TEXT NOT NULL
);
CREATE UNIQUE INDEX one_row_a_clip ON clips (file, ifnull(start, -1), ifnull(stop, -1));
CREATE INDEX by_content ON clips (sha256) WHERE sha256 IS NOT NULL;
CREATE INDEX by_shard ON clips (shard) WHERE shard IS NOT NULL;
PRAGMA user_version = 2;
"""
_LIST = """
INSERT INTO clips (position, file, start, stop, tar, tar_offset, bytes, status, reason, detail, captions, attributes)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (file, ifnull(start, -1), ifnull(stop, -1)) DO UPDATE SET captions = joined(captions, excluded.captions)
"""
_READ = "SELECT position, file, start, stop, tar, tar_offset, bytes, captions, attributes FROM clips"


@dataclass(frozen=True)
class Planned:
    """A clip as planned: its position, which becomes its key, and the bytes of its file."""

    position: int
    clip: Clip
    size: int


@dataclass(frozen=True)
class Done:
    """What the ledger notes of a clip that is in a shard; `size` in bytes is the medium's there."""

    position: int
    key: str
    sha256: str
    media: str
    size: int
    probe: dict[str, Any]


Loss = tuple[int, LossReason, str]


class Ledger:
    """The open account of one build folder, as a context manager; one process at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database = sqlite3.connect(path, timeout=0, isolation_level=None)
        self._database.create_function("joined", 2, _joined, deterministic=True)

    def __enter__(self) -> Self:
        """Take the lock, and make the tables in a new file."""
        with self._faults():
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("BEGIN EXCLUSIVE")
            if not self.one("SELECT count(*) FROM sqlite_master"):
                for statement in _TABLES.strip().split(";\n"):
                    self._database.execute(statement)
            self._database.execute("COMMIT")
            version = self.one("PRAGMA user_version")
        if version != VERSION:
            self._database.close()
            raise UserError(
                f"{self._path} is a ledger of version {version}, this program writes version {VERSION}.",
                "Build into an empty folder.",
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise UserError(
                    f"Another build is writing to {self._path.parent}.", "Wait for it, or stop it."
                ) from error
            if "full" in str(error) or "disk I/O" in str(error):
                raise UserError(
                    f"{self._path} cannot be written ({error}).",
                    "Free some space, then run the same command again: it goes on from there.",
                    exit_code=1,
                ) from error
            raise UserError(
                f"{self._path} cannot be used as a ledger ({error}).", "Build into an empty folder.", exit_code=1
            ) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """What is done inside is done as a whole or not at all."""
        with self._faults():
            self._database.execute("BEGIN")
            try:
                yield self._database
                self._database.execute("COMMIT")
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")

    def about(self, name: str) -> Any:
        """A noted value (`request`, `stage`); None where nothing is noted."""
        rows = self.rows("SELECT value FROM about WHERE name = ?", name)
        return json.loads(rows[0][0]) if rows else None

    def note(self, **values: Any) -> None:
        """Write values that `about` reads; inside a transaction they are part of it."""
        with self._faults():
            for name, value in values.items():
                self._database.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, json.dumps(value)))

    def list_clips(self, clips: Iterable[tuple[int, Clip]]) -> None:
        """Add clips, as part of a transaction; the captions of one that is there already are joined to its own."""
        self._database.executemany(_LIST, (_listed(position, clip) for position, clip in clips))

    def clear(self) -> None:
        """Forget everything, so that the folder may take another build."""
        with self.transaction() as database:
            database.execute("DELETE FROM clips")
            database.execute("DELETE FROM about")

    def pages(self, status: Literal["listed", "planned"]) -> Iterator[list[Planned]]:
        """The clips of a status in order, a page at a time; a page's clips may change status before the next."""
        last = -1
        query = f"{_READ} WHERE status = ? AND position > ? ORDER BY position LIMIT {PAGE}"
        while rows := self.rows(query, status, last):
            last = rows[-1][0]
            yield [_planned(row) for row in rows]

    def lose(self, losses: Iterable[Loss]) -> None:
        """Mark clips as lost, as part of a transaction."""
        self._database.executemany(
            "UPDATE clips SET status = 'lost', reason = ?, detail = ? WHERE position = ?",
            ((reason, detail, position) for position, reason, detail in losses),
        )

    def settle(self, shard: str, done: Iterable[tuple[Done, int]], lost: Iterable[Loss]) -> None:
        """Note a finished shard's clips (each with the offset of its medium), and the losses among them."""
        with self.transaction() as database:
            database.executemany(
                "UPDATE clips SET status = 'done', reason = NULL, detail = NULL, shard = ?, key = ?, offset = ?, "
                "sha256 = ?, media = ?, bytes = ?, width = ?, height = ?, frames = ?, duration = ? WHERE position = ?",
                (
                    (
                        *(shard, d.key, offset, d.sha256, d.media, d.size),
                        *(d.probe[name] for name in ("width", "height", "frames", "duration")),
                        d.position,
                    )
                    for d, offset in done
                ),
            )
            self.lose(lost)

    def retry(self, reasons: Sequence[str]) -> int:
        """Have the clips that were lost for these reasons listed again; returns how many."""
        marks = ", ".join("?" for _ in reasons)
        with self.transaction() as database:
            changed = database.execute(
                "UPDATE clips SET status = 'listed', reason = NULL, detail = NULL "
                f"WHERE status = 'lost' AND reason IN ({marks})",
                tuple(reasons),
            ).rowcount
            if changed:
                self.note(stage="listed")
        return changed

    def holder(self, sha256: str) -> str | None:
        """The file of the clip that is done with this content."""
        rows = self.rows("SELECT file FROM clips WHERE sha256 = ? AND status = 'done' LIMIT 1", sha256)
        return rows[0][0] if rows else None

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query that has few of them."""
        return list(self.stream(query, *values))

    def stream(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The rows of a query of any size, as they come."""
        with self._faults():
            yield from self._database.execute(query, values)

    def run(self, statement: str, *values: Any) -> int:
        """Run a statement; returns the number of rows that it changed."""
        with self._faults():
            return self._database.execute(statement, values).rowcount

    def one(self, query: str) -> Any:
        """The single value that a query gives."""
        return self.rows(query)[0][0]


def _joined(first: str, second: str) -> str:
    """Two JSON lists as one."""
    return json.dumps([*json.loads(first), *json.loads(second)], ensure_ascii=False)


def _listed(position: int, clip: Clip) -> tuple[Any, ...]:
    tar, offset, size = clip.inside or (None, None, 0)
    status, reason = "listed", None
    if clip.fault is not None:
        status, reason = "lost", LossReason.DAMAGED_SHARD if tar else LossReason.BAD_SPAN
    texts = (json.dumps(value, ensure_ascii=False) for value in (clip.captions, clip.attributes))
    return position, clip.file, clip.start, clip.end, tar, offset, size, status, reason, clip.fault, *texts


def _planned(row: tuple[Any, ...]) -> Planned:
    position, file, start, stop, tar, offset, size, captions, attributes = row
    inside = None if tar is None else (tar, offset, size)
    clip = Clip(file, tuple(json.loads(captions)), json.loads(attributes), start, stop, inside)
    return Planned(position, clip, size)
