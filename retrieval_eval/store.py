"""Embeddings on disk: one folder that says what made it, holding pieces that are whole or not there.

    identity.json    the digests of checkpoint, preprocessing and corpus, and every choice that changes a vector
    clips/           vectors.npy (V, E) float32; clips.json: keys, captions, places in the corpus, what was lost;
                     tokens.f16: patch tokens (V, N, D) for re-ranking, read by memory map
    clips-shuffled/  the controls, likewise
    texts/           vectors.npy (U, E), states.f32 (U, L, D), texts.json
    index/           index.faiss, index.json: an index for searching, its kind and its recall

A piece is written aside and renamed, so that an evaluation that was killed goes on with the pieces it finished.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.files import disk_errors, sync_folder, write_whole

IDENTITY = "identity.json"
FORMAT = 1


class Store:
    """The folder of embeddings made by `identity`.

    Raises UserError if the folder holds embeddings of another checkpoint, corpus or choice, or something else.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], fresh: bool = False) -> None:
        self.folder = folder
        self.identity = {"format": FORMAT, **identity}
        if fresh and (folder / IDENTITY).is_file():
            shutil.rmtree(folder)
        self._claim()

    def _claim(self) -> None:
        marker = self.folder / IDENTITY
        if marker.is_file():
            found = read_identity(self.folder)
            differ = sorted(k for k in found.keys() | self.identity.keys() if found.get(k) != self.identity.get(k))
            if differ:
                said = "; ".join(f"{k} is {found.get(k)} there and {self.identity.get(k)} here" for k in differ)
                raise UserError(
                    f"{self.folder} holds embeddings made otherwise ({said}).",
                    "Give another folder, or --fresh to make these again.",
                )
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} is not empty and holds no embeddings.", "Give another folder.")
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(marker, json.dumps(self.identity, indent=2).encode())

    def path(self, piece: str, name: str) -> Path:
        """A file of a piece."""
        return self.folder / piece / name

    def has(self, piece: str, *names: str) -> bool:
        """Whether a piece is there with these files."""
        return all(self.path(piece, name).is_file() for name in names)

    @contextmanager
    def writing(self, piece: str) -> Iterator[Path]:
        """A folder to write a piece into; it gets its name on a clean exit, in place of one that was there."""
        aside, final = self.folder / f".{piece}.part", self.folder / piece
        with disk_errors(final):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            try:
                yield aside
                for path in aside.iterdir():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                shutil.rmtree(final, ignore_errors=True)
                aside.rename(final)
                sync_folder(self.folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)


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


def read_rows(path: Path) -> NDArray[Any]:
    """The rows of a RowWriter's file, memory-mapped; UserError if it is cut."""
    form = json.loads(path.with_suffix(path.suffix + ".json").read_text())
    dtype, shape = np.dtype(form["dtype"]), tuple(form["shape"])
    expected, found = dtype.itemsize * int(np.prod(shape)), path.stat().st_size
    if found != expected:
        raise UserError(f"{path} has {found} bytes, not {expected}.", "Make it again with --fresh.", exit_code=1)
    if not expected:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)
