"""The account of a build, in SQLite: one row a clip, and what was asked for.

A clip is `planned` until it is `done` (with shard, key and offset) or `lost` (with a reason and a detail). Rows change
in one transaction a shard, after the shard has its final name, so the ledger never promises what is not on the disk.
The database stays locked while a build runs and is released by the death of its process, whatever killed it.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from configs.errors import UserError
from data_pipeline.manifest import Clip
from data_pipeline.schema import LossReason

_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE clips (
    position INTEGER PRIMARY KEY, file TEXT NOT NULL, status TEXT NOT NULL, reason TEXT, detail TEXT,
    shard TEXT, key TEXT, offset INTEGER, bytes INTEGER NOT NULL, sha256 TEXT, media TEXT,
    width INTEGER, height INTEGER, frames INTEGER, duration REAL, captions TEXT NOT NULL, attributes TEXT NOT NULL
);
"""


@dataclass(frozen=True)
class Planned:
    """A clip as planned: its place in the manifest, its bytes, and what is lost about it already."""

    position: int
    clip: Clip
    size: int
    reason: LossReason | None = None
    detail: str = ""


@dataclass(frozen=True)
class Done:
    """What the ledger notes of a clip that is in a shard."""

    position: int
    key: str
    sha256: str
    media: str
    probe: dict[str, Any]


class Ledger:
    """The open account of one build folder, as a context manager; one process at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database = sqlite3.connect(path, timeout=0, isolation_level=None)

    def __enter__(self) -> Self:
        """Take the lock, and make the tables in a new file."""
        with self._faults():
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("BEGIN EXCLUSIVE")
            if not self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _TABLES.strip().split(";\n"):
                    self._database.execute(statement)
            self._database.execute("COMMIT")
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
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._faults():
            self._database.execute("BEGIN")
            try:
                yield self._database
                self._database.execute("COMMIT")
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")

    def request(self) -> dict[str, Any] | None:
        """What the planned build was asked for; None in a ledger that has no plan yet."""
        with self._faults():
            row = self._database.execute("SELECT value FROM about WHERE name = 'request'").fetchone()
        return None if row is None else dict(json.loads(row[0]))

    def plan(self, request: dict[str, Any], clips: Iterable[Planned]) -> None:
        """Write the whole plan at once."""
        rows = (
            (
                planned.position,
                planned.clip.file,
                "lost" if planned.reason else "planned",
                planned.reason,
                planned.detail or None,
                planned.size,
                json.dumps(planned.clip.captions, ensure_ascii=False),
                json.dumps(planned.clip.attributes, ensure_ascii=False),
            )
            for planned in clips
        )
        columns = "position, file, status, reason, detail, bytes, captions, attributes"
        with self._transaction() as database:
            database.executemany(f"INSERT INTO clips ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            database.execute("INSERT INTO about VALUES ('request', ?)", (json.dumps(request),))

    def remaining(self) -> list[Planned]:
        """The clips that are neither done nor lost, in order."""
        query = (
            "SELECT position, file, bytes, captions, attributes FROM clips WHERE status = 'planned' ORDER BY position"
        )
        return [
            Planned(position, Clip(file, tuple(json.loads(captions)), json.loads(attributes)), size)
            for position, file, size, captions, attributes in self.rows(query)
        ]

    def settle(self, shard: str, done: Iterable[tuple[Done, int]], lost: Iterable[tuple[int, LossReason, str]]) -> None:
        """Note a finished shard's clips (each with the offset of its medium), and the losses among them."""
        with self._transaction() as database:
            database.executemany(
                "UPDATE clips SET status = 'done', shard = ?, key = ?, offset = ?, sha256 = ?, media = ?, width = ?, "
                "height = ?, frames = ?, duration = ? WHERE position = ?",
                (
                    (
                        *(shard, d.key, offset, d.sha256, d.media),
                        *(d.probe[name] for name in ("width", "height", "frames", "duration")),
                        d.position,
                    )
                    for d, offset in done
                ),
            )
            database.executemany(
                "UPDATE clips SET status = 'lost', reason = ?, detail = ? WHERE position = ?",
                ((reason, detail, position) for position, reason, detail in lost),
            )

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query on the table `clips`."""
        with self._faults():
            return list(self._database.execute(query, values).fetchall())

    def one(self, query: str) -> Any:
        """The single value that a query gives."""
        return self.rows(query)[0][0]
