"""Embeddings and match scores on disk: a folder that says what made it, holding pieces that are whole or not there.

    identity.json           digests of checkpoint, preprocessing and corpus, and every choice that changes a vector
    clips/000000/           vectors.npy (V, E) float32; clips.json: keys, captions, places in the corpus, what was
                            lost; tokens.f16: patch tokens (V, N, D) for re-ranking, read by memory map
    clips-shuffled/000000/  the controls, likewise
    texts-DIGEST/000000/    vectors.npy (U, E), texts.json, states.f32 (U, L, D)
    candidates-VIEW-DIGEST/ which pairs are re-ranked
    matches-VIEW-DIGEST/000000/  matches.npz: their scores, clip by clip
    index/                  index.faiss, index.json: an index for searching, its kind and its recall

What is large is cut into chunks (chunks.py), each a piece of its own: the unit that ranks share, and the most that a
kill loses. A piece is written aside and renamed, so that whoever comes next goes on with the pieces that are there.
"""

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.files import disk_errors, sync_folder

IDENTITY = "identity.json"
FORMAT = 2
CHUNK = 32
"""Clips of a piece, where nothing else is said."""
MEANT = {"visual": "visual (how frames are chosen and resized)", "text": "text (cleaning and token limit)"}
"""For whoever reads that a store's identity differs in one of these."""


class Store:
    """The folder of embeddings made by `identity`, written by one process or by many.

    Raises UserError if the folder holds embeddings of another checkpoint, corpus or choice, or something else.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], fresh: bool = False) -> None:
        self.folder = folder
        self.identity = {"format": FORMAT, **identity}
        if fresh and (folder / IDENTITY).is_file():
            shutil.rmtree(folder)
        self._claim()

    @property
    def chunk(self) -> int:
        """How many clips make a piece."""
        return int(self.identity.get("chunk", CHUNK))

    def _claim(self) -> None:
        marker = self.folder / IDENTITY
        if not marker.is_file():
            named = [path for path in self.folder.iterdir() if path.name[0] != "."] if self.folder.is_dir() else []
            if named or (self.folder.exists() and not self.folder.is_dir()):
                raise UserError(f"{self.folder} is not empty and holds no embeddings.", "Give another folder.")
            aside = self.folder / f".{IDENTITY}.{_process()}"
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                aside.write_text(json.dumps(self.identity, indent=2))
                aside.replace(marker)
        found = read_identity(self.folder)  # where many begin at once, it may be another's
        differ = sorted(k for k in found.keys() | self.identity.keys() if found.get(k) != self.identity.get(k))
        if differ:
            said = "; ".join(
                f"{MEANT.get(k, k)} is {found.get(k, 'unknown')} there and {self.identity.get(k, 'unknown')} here"
                for k in differ
            )
            raise UserError(
                f"{self.folder} holds embeddings made otherwise ({said}).",
                "Give another folder, or --fresh to make these again.",
            )

    def path(self, piece: str, name: str) -> Path:
        """A file of a piece."""
        return self.folder / piece / name

    def has(self, piece: str, *names: str) -> bool:
        """Whether a piece is there with these files."""
        return all(self.path(piece, name).is_file() for name in names)

    @contextmanager
    def writing(self, piece: str, replace: bool = True) -> Iterator[Path]:
        """A folder to write a piece into; it gets its name on a clean exit, in place of one that was there.

        Without `replace` one that another process finished meanwhile stays, and this one is dropped.
        """
        final = self.folder / piece
        aside = final.with_name(f".{final.name}.{_process()}")
        with disk_errors(final):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            try:
                yield aside
                for path in aside.iterdir():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                if replace:
                    shutil.rmtree(final, ignore_errors=True)
                try:
                    aside.rename(final)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise  # else another process finished the same piece, from the same inputs
                sync_folder(final.parent)
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed processes left half written; for when nobody else writes here."""
        for aside in [*self.folder.glob(".*"), *self.folder.glob("*/.*")]:
            shutil.rmtree(aside, ignore_errors=True)
            aside.unlink(missing_ok=True)


def _process() -> str:
    """A name that no other living process has, on this machine or another that shares the disk."""
    return f"{socket.gethostname()}-{os.getpid()}.part"


def read_identity(folder: Path) -> dict[str, Any]:
    """identity.json of a folder of embeddings; UserError if it is none."""
    try:
        return dict(json.loads((folder / IDENTITY).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no folder of embeddings (no readable {IDENTITY}).", "Make one with `videomamba embed`."
        ) from error


class RowWriter:
    """Appends rows of one shape to a raw file, a batch at a time; the shape goes into a `.json` beside it."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.rows, self.shape = 0, (0,)

    def __enter__(self) -> Self:
        self.file = self.path.open("wb")
        return self

    def write(self, rows: NDArray[Any]) -> None:
        """Append `rows` (R, ...), every row of the shape of the first."""
        self.rows, self.shape = self.rows + len(rows), rows.shape[1:]
        self.file.write(np.ascontiguousarray(rows, dtype=self.dtype).tobytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.file:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                shape = {"shape": [self.rows, *self.shape], "dtype": self.dtype.name}
                self.path.with_suffix(self.path.suffix + ".json").write_text(json.dumps(shape))


def _form(path: Path) -> tuple["np.dtype[Any]", tuple[int, ...]]:
    form = json.loads(path.with_suffix(path.suffix + ".json").read_text())
    return np.dtype(form["dtype"]), tuple(form["shape"])


def count_rows(path: Path) -> int:
    """How many rows a RowWriter's file holds."""
    return _form(path)[1][0]


def read_rows(path: Path) -> NDArray[Any]:
    """The rows of a RowWriter's file, memory-mapped; UserError if it is cut."""
    dtype, shape = _form(path)
    expected, found = dtype.itemsize * int(np.prod(shape)), path.stat().st_size
    if found != expected:
        raise UserError(f"{path} has {found} bytes, not {expected}.", "Make it again with --fresh.", exit_code=1)
    if not expected:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)
