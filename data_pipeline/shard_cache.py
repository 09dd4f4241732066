"""A bounded cache of files on the local disk, shared by any number of processes, whatever dies when.

An entry is fetched by one process while others that want it wait (a lock out of a fixed number, chosen by the name;
the system lets go of it when its holder dies). Its disk is reserved in full before the first byte is fetched, under
the lock of the whole cache, so that the bound holds with downloads in flight and a full disk is seen at once. It
gets its name when it is whole and synced. What was used longest ago goes first; a reader that has the file open
keeps its content. What a killed process leaves half fetched is written over, or cleared by the next eviction.
"""

import errno
import fcntl
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from configs.errors import UserError
from configs.files import part_name

LOCKS = 64
KEPT_SHARE = 0.9  # an eviction goes on to this share of the limit, so that the next ones need not look again

Fill = Callable[[FileIO], None]


class ShardCache:
    """Files under `folder`, together at most `limit` bytes. Cheap to make; every process has its own."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._counted = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The shard cache {folder} cannot be made: {error.strerror}.", "Name another data.remote.cache."
            ) from error

    def open(self, name: str, size: int, fill: Fill) -> FileIO:
        """The entry `name` of `size` bytes, open for reading; `fill` writes it where it is not there yet.

        Raises UserError where it cannot fit the limit or the disk; what `fill` raises passes, and nothing is left.
        """
        path = self.folder / name
        while True:
            try:
                file = FileIO(path)
            except FileNotFoundError:
                with self._lock(f".lock-{zlib.crc32(name.encode()) % LOCKS:02d}"):
                    if not path.exists():
                        self._fetch(path, size, fill)
                continue
            with suppress(FileNotFoundError):  # evicted a moment ago: the open file still serves
                os.utime(path)
            return file

    def used(self) -> int:
        """Bytes in the cache now, downloads in flight with their full size among them."""
        with self._lock(".lock"):
            return self._count()

    def _fetch(self, path: Path, size: int, fill: Fill) -> None:
        part = part_name(path)
        with self._lock(".lock"):
            file = self._reserve(part, size)
        try:
            with file:
                fill(file)
                if file.tell() != size:
                    raise ValueError(f"{path.name}: {file.tell()} bytes were written, {size} were announced")
                os.fsync(file.fileno())
            with self._lock(".lock"):  # amid a count, a renamed file may be seen twice or not at all
                part.replace(path)
        except BaseException:
            with self._lock(".lock"):
                part.unlink(missing_ok=True)
                self._note(self._noted() - size)
            raise

    def _reserve(self, part: Path, size: int) -> FileIO:
        """Make room and take it; the lock of the cache is held."""
        part.unlink(missing_ok=True)  # what a killed process left: we hold the lock that it held
        total = self._noted()
        if total + size > self.limit:
            total = self._evict(size)
        file = FileIO(part, "w")
        try:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            file.close()
            part.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise UserError(
                f"The disk of the shard cache {self.folder} has no room for {size / 2**20:.1f} MiB more "
                f"({error.strerror}).",
                "Free some, name a data.remote.cache on another disk, or lower data.remote.cache_gb.",
                exit_code=1,
            ) from error
        self._note(total + size)
        return file

    def _evict(self, size: int) -> int:
        """Remove what was used longest ago until `size` more bytes fit; the bytes that stay."""
        self._clear_abandoned()
        entries = sorted(self._entries())
        total = sum(held for _, held, _ in entries)
        goal = max(0, int(self.limit * KEPT_SHARE) - size)
        for _, held, path in entries:
            if total <= goal:
                break
            if not path.name.startswith("."):
                path.unlink(missing_ok=True)
                total -= held
        if total + size > self.limit:
            raise UserError(
                f"The shard cache {self.folder} may hold {self.limit / 2**20:.1f} MiB: too little for "
                f"{size / 2**20:.1f} MiB more beside the {total / 2**20:.1f} MiB that are being fetched.",
                "Raise data.remote.cache_gb, or set data.remote.fetch=ranges.",
                exit_code=1,
            )
        return total

    def _clear_abandoned(self) -> None:
        """Remove what processes that died were fetching: its lock is free."""
        for part in self.folder.glob(".*.part"):
            name = part.name.removeprefix(".").removesuffix(".part")
            with suppress(BlockingIOError), self._lock(f".lock-{zlib.crc32(name.encode()) % LOCKS:02d}", wait=False):
                part.unlink(missing_ok=True)

    def _count(self) -> int:
        return sum(size for _, size, _ in self._entries())

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(last used, bytes, path) of whole entries and of those being fetched; the lock of the cache is held."""
        for entry in os.scandir(self.folder):
            if entry.is_file() and (not entry.name.startswith(".") or entry.name.endswith(".part")):
                with suppress(FileNotFoundError):
                    found = entry.stat()
                    yield found.st_mtime, found.st_size, Path(entry.path)

    def _noted(self) -> int:
        """What the cache holds by its note, which each process counts anew once: a power cut may have spoilt it."""
        try:
            noted = int((self.folder / ".total").read_text()) if self._counted else self._count()
        except (FileNotFoundError, ValueError):  # killed between its making and its writing
            noted = self._count()
        self._counted = True
        return noted

    def _note(self, total: int) -> None:
        (self.folder / ".total").write_text(str(max(0, total)))

    @contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[None]:
        handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
        finally:
            os.close(handle)
