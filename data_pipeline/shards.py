"""WebDataset shards: plain tars that `webdataset` alone can read, each with an index beside it.

`ShardWriter` writes them whole or not at all; `Corpus` reaches any sample of a folder of them without walking a tar.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from configs.files import disk_errors, part_name, sync_folder, write_whole
from data_pipeline.config import RemoteConfig
from data_pipeline.index import Member, ShardIndex, encode_index, read_index
from data_pipeline.remote import RemoteShards, Store, cache_folder, is_address, mirror
from data_pipeline.retry import DISK_ATTEMPTS, DISK_PAUSE, is_transient_disk, patiently
from data_pipeline.schema import LossReason, Sample, SampleError, decode_meta, decode_text, encode_meta, sample_of
from data_pipeline.shard_cache import ShardCache

BLOCK = 512
CARD = "dataset.json"
LEDGER = "ledger.sqlite"
_OPEN_FILES = 128


def shard_name(name: str, number: int) -> str:
    """The file name of a shard: `<name>-000000.tar`."""
    return f"{name}-{number:06d}.tar"


def shard_number(shard: str) -> int:
    """The number in a name that `shard_name` made."""
    return int(shard.removesuffix(".tar").rpartition("-")[2])


class ShardWriter:
    """Writes samples into `<name>-000000.tar` and on, each with `<name>-000000.idx`, as a context manager.

    A shard has its final name only when it is whole and synced; leaving by an exception drops the unfinished one.
    `first` is the number of the first shard. `finished(shard, members)` is called when a shard has its name, with
    the members of each of its samples. Equal samples give equal bytes: times and owners are zero. A full disk is a
    UserError.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        samples_per_shard: int,
        *,
        first: int = 0,
        finished: Callable[[str, list[tuple[Member, ...]]], None] | None = None,
    ) -> None:
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard is {samples_per_shard}.", "Give a number of at least 1.")
        self._folder = folder
        self._name = name
        self._room = samples_per_shard
        self._number = first
        self._finished = finished
        self._file: FileIO | None = None
        self._samples: list[tuple[Member, ...]] = []
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._samples:
            try:
                self._close_shard()
            finally:
                self._drop()
        else:
            self._drop()

    @property
    def _path(self) -> Path:
        return self._folder / shard_name(self._name, self._number)

    def write(self, sample: Sample) -> None:
        """Add one sample; every `samples_per_shard` of them a shard is finished."""
        with disk_errors(self._path):
            if self._file is None:
                self._file = FileIO(part_name(self._path), "w")
                self._end = 0
            media = self._member(sample.key, sample.extension, sample.media)
            meta = self._member(sample.key, "json", encode_meta(sample))
        self._samples.append((media, meta))
        if len(self._samples) == self._room:
            self._close_shard()

    def _member(self, key: str, extension: str, data: bytes) -> Member:
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(data)
        info.mode = 0o644
        offset = self._end + BLOCK
        self._put(info.tobuf(tarfile.USTAR_FORMAT, "utf-8") + data + bytes(-len(data) % BLOCK))
        return Member(extension, offset, len(data), info.name)

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        view = memoryview(data)
        while view:  # a raw file may take less than it was given
            view = view[self._file.write(view) :]
        self._end += len(data)

    def _close_shard(self) -> None:
        assert self._file is not None
        path = self._path
        with disk_errors(path):
            self._put(bytes(2 * BLOCK))
            os.fsync(self._file.fileno())
            self._file.close()
            # The index first: a tar under its final name is then never without one.
            write_whole(path.with_suffix(".idx"), encode_index(self._samples))
            part_name(path).replace(path)
            sync_folder(self._folder)
        samples, self._samples, self._file = self._samples, [], None
        self._number += 1
        if self._finished is not None:
            self._finished(path.name, samples)

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
        part_name(self._path).unlink(missing_ok=True)  # Ctrl-C may have come between its making and the note of it
        self._file, self._samples = None, []


class ShardReader(Protocol):
    """Where the bytes of shards come from."""

    def read(self, shard: str, begin: int, size: int) -> bytes:
        """`size` bytes of a shard from `begin` on, fewer where it ends before; UserError where it cannot be read."""
        ...


class LocalShards:
    """The shards of a folder. Files are opened at first use in each process; a failing disk is tried again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, FileIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def read(self, shard: str, begin: int, size: int) -> bytes:
        """`size` bytes from `begin` on; a read carries its own position, so threads may share a file."""
        return patiently(
            str(self.folder / shard),
            lambda: self._read(shard, begin, size),
            is_transient_disk,
            DISK_ATTEMPTS,
            DISK_PAUSE,
        )

    def _read(self, shard: str, begin: int, size: int) -> bytes:
        file = self._files.get(shard) or self._open(shard)
        data = os.pread(file.fileno(), size, begin)
        while len(data) < size and (more := os.pread(file.fileno(), size - len(data), begin + len(data))):
            data += more
        return data

    def _open(self, shard: str) -> FileIO:
        try:
            file = FileIO(self.folder / shard)
        except FileNotFoundError as error:
            raise UserError(
                f"The shard {self.folder / shard} is gone since the corpus was opened.",
                "Put it back, or build the corpus again.",
                exit_code=1,
            ) from error
        if len(self._files) >= _OPEN_FILES:  # a reader in another thread keeps its file alive by its reference
            self._files.pop(next(iter(self._files)), None)
        self._files[shard] = file
        return file


@dataclass(frozen=True)
class Medium:
    """The bytes of one medium where they lie: `size` of them in `shard`, from `offset` on."""

    reader: ShardReader
    shard: str
    offset: int
    size: int
    extension: str

    def read(self, begin: int, size: int) -> bytes:
        """`size` bytes from `begin` on, fewer where the medium (or a shard that was cut) ends."""
        return self.reader.read(self.shard, self.offset + begin, max(0, min(size, self.size - begin)))


class Corpus:
    """A folder of shards as one sequence of samples; made by `Corpus.open`.

    Cheap to open (indexes only) and to pickle. Several processes and threads may read at once. Of a corpus behind an
    address, `folder` is the local mirror of its card and indexes. `bytes` is what its shards hold.
    """

    def __init__(
        self, folder: Path, shards: list[str], indexes: list[ShardIndex], digest: str, reader: ShardReader | None = None
    ) -> None:
        self.folder = folder
        self.shards = shards
        self.digest = digest
        self.bytes = sum(index.end() for index in indexes)
        self.shard_sizes = [len(index.keys) for index in indexes]
        self._reader = LocalShards(folder) if reader is None else reader
        self._shard: npt.NDArray[np.int32] = np.repeat(
            np.arange(len(shards), dtype=np.int32), [len(index.keys) for index in indexes]
        )
        self._keys = np.array([key for index in indexes for key in index.keys])
        self._extensions = np.array([extension for index in indexes for extension in index.extensions])
        self._text: npt.NDArray[np.bool_] = np.concatenate([index.text for index in indexes])
        # Columns: where the medium begins, its size, where the captions' member begins, its size; in bytes.
        self._spans: npt.NDArray[np.int64] = np.concatenate(
            [np.stack([i.media_offset, i.media_size, i.meta_offset, i.meta_size], 1) for i in indexes]
        )
        self._attributes: list[dict[str, Any]] | None = None

    @classmethod
    def open(cls, folder: Path | str, remote: RemoteConfig | None = None) -> "Corpus":
        """Read the indexes of a folder of shards, or of an address (remote.py), cached as `remote` says.

        Raises UserError where the folder is missing or holds no shards, a build has not finished, a shard of the
        dataset card or an index is missing, or a tar is shorter than its index says.
        """
        if is_address(str(folder)):
            return cls._open_address(str(folder), remote or RemoteConfig())
        folder = Path(folder)
        shards = _shards_in(folder)
        digest = hashlib.sha256(str(_card(folder, shards).get("content", "")).encode())
        indexes = []
        for shard in shards:
            path = (folder / shard).with_suffix(".idx")
            if not path.is_file():
                raise UserError(f"The shard {folder / shard} has no index {path.name}.", _REBUILD, exit_code=1)
            index = read_index(path)
            size, least = (folder / shard).stat().st_size, index.end()
            if size < least:
                raise UserError(
                    f"The shard {folder / shard} is cut: it has {size} bytes, its index expects at least {least}.",
                    _REBUILD,
                    exit_code=1,
                )
            digest.update(path.read_bytes())
            indexes.append(index)
        return cls(folder, shards, indexes, digest.hexdigest())

    @classmethod
    def _open_address(cls, address: str, config: RemoteConfig) -> "Corpus":
        store = Store(address, config)
        folder, shards = mirror(store, CARD)
        paths = [(folder / shard).with_suffix(".idx") for shard in shards]
        indexes = [read_index(path) for path in paths]
        digest = hashlib.sha256(str(_card(folder, shards).get("content", "")).encode())
        for path in paths:
            digest.update(path.read_bytes())
        cache = ShardCache(cache_folder(config) / "content", int(config.cache_gb * 1e9))
        sizes = {shard: index.end() for shard, index in zip(shards, indexes, strict=True)}
        return cls(folder, shards, indexes, digest.hexdigest(), RemoteShards(store, cache, folder.name, sizes))

    def __len__(self) -> int:
        return len(self._shard)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_attributes": None}

    @property
    def keys(self) -> list[str]:
        """The keys of all samples, in order."""
        keys: list[str] = self._keys.tolist()
        return keys

    def key(self, i: int) -> str:
        """The key of sample `i`."""
        return str(self._keys[i])

    def offset(self, i: int) -> int:
        """Where the medium of sample `i` begins in its shard, in bytes."""
        return int(self._spans[i, 0])

    def shard(self, i: int) -> str:
        """The file name of the shard that holds sample `i`."""
        return self.shards[int(self._shard[i])]

    def location(self, i: int) -> str:
        """`shard.tar:key@offset`, by which a fault is named."""
        return f"{self.shard(i)}:{self.key(i)}@{self.offset(i)}"

    def read(self, i: int) -> Sample:
        """Sample `i`, in one read; raises SampleError(DAMAGED_SHARD) where the bytes are not what the index says."""
        media_at, media_size, meta_at, meta_size = (int(value) for value in self._spans[i])
        begin = min(media_at, meta_at) - BLOCK
        data = self._bytes(i, begin, max(media_at + media_size, meta_at + meta_size) - begin)
        key, extension = self.key(i), str(self._extensions[i])
        media = self._checked(i, data, media_at - begin, media_size, extension)
        return sample_of(key, extension, media, self._parsed(i, data, meta_at - begin, meta_size))

    def read_meta(self, i: int) -> dict[str, Any]:
        """The json member of sample `i` (or what its txt member says) alone; errors as in `read`."""
        _, _, meta_at, meta_size = (int(value) for value in self._spans[i])
        data = self._bytes(i, meta_at - BLOCK, meta_size + BLOCK)
        return self._parsed(i, data, BLOCK, meta_size)

    def medium(self, i: int) -> "Medium":
        """The medium of sample `i`, to be read in parts; raises SampleError(DAMAGED_SHARD) where none stands there."""
        offset, size, extension = self.offset(i), int(self._spans[i, 1]), str(self._extensions[i])
        self._checked(i, self._bytes(i, offset - BLOCK, BLOCK), BLOCK, size, extension)
        return Medium(self._reader, self.shard(i), offset, size, extension)

    def metas(self) -> Iterator[dict[str, Any]]:
        """The json members of all samples, in order."""
        return (self.read_meta(i) for i in range(len(self)))

    def attribute(self, name: str) -> list[Any]:
        """The value of one attribute for every sample (None where a sample lacks it), cached after the first call.

        Raises UserError naming the attributes that exist where no sample has it.
        """
        if self._attributes is None:
            self._attributes = [meta.get("attributes") or {} for meta in self.metas()]
        values = [attributes.get(name) for attributes in self._attributes]
        if values and all(value is None for value in values):
            seen = sorted({key for attributes in self._attributes for key in attributes})
            raise UserError(
                f"No sample of {self.folder} has the attribute '{name}'.",
                f"It has: {', '.join(seen) or 'no attributes'}.",
            )
        return values

    def _bytes(self, i: int, begin: int, size: int) -> bytes:
        data = self._reader.read(self.shard(i), begin, size)
        if len(data) < size:
            raise self._damaged(i, f"the shard ends {size - len(data)} bytes before the sample does")
        return data

    def _checked(self, i: int, data: bytes, at: int, size: int, extension: str) -> bytes:
        """The member at `at`, once the tar header before it agrees with the index."""
        header = data[at - BLOCK : at]
        name = f"{self._keys[i]}.{extension}".encode()
        if (
            header[257:262] != b"ustar"
            or header[124:136].strip(b" \0").rjust(12, b"0") != b"%012o" % size
            or header[: min(100, len(name))] != name[:100]
        ):
            raise self._damaged(i, f"no header of {name.decode()} with {size} bytes stands where the index says")
        return data[at : at + size]

    def _parsed(self, i: int, data: bytes, at: int, size: int) -> dict[str, Any]:
        try:
            if self._text[i]:
                return decode_text(self._checked(i, data, at, size, "txt"))
            return decode_meta(self._checked(i, data, at, size, "json"))
        except SampleError as error:
            raise self._damaged(i, error.detail) from error

    def _damaged(self, i: int, what: str) -> SampleError:
        return SampleError(LossReason.DAMAGED_SHARD, f"{self.location(i)}: {what}")


_REBUILD = "`videomamba data verify` names every fault; build the corpus again into an empty folder."


def _shards_in(folder: Path) -> list[str]:
    build = "Give the folder that `videomamba data build` wrote."
    if not folder.is_dir():
        raise UserError(f"There is no corpus folder {folder}.", build)
    shards = sorted(path.name for path in folder.glob("*.tar"))
    if not shards:
        what = "has no shards (*.tar) in it" if any(folder.iterdir()) else "is empty"
        raise UserError(f"The corpus folder {folder} {what}.", build)
    return shards


def _card(folder: Path, shards: list[str]) -> dict[str, Any]:
    """The dataset card, {} for a folder without one, once its list of shards agrees with what is there."""
    path = folder / CARD
    if not path.is_file():
        if (folder / LEDGER).exists():
            raise UserError(f"The build of {folder} has not finished.", "Run the same `videomamba data build` again.")
        return {}
    try:
        card = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}).", _REBUILD, exit_code=1) from error
    if not isinstance(card, dict):
        raise UserError(f"{path} holds a {type(card).__name__}, not a mapping.", _REBUILD, exit_code=1)
    missing = sorted(set(card.get("shards", shards)) - set(shards))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder} lacks the shard {missing[0]}{more}.", "Copy it again, or rebuild.", exit_code=1)
    return card
