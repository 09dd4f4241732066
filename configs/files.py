"""Files appear under their final names whole or not at all, and a full disk is said in one sentence."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from configs.errors import UserError

_DISK = {
    errno.ENOSPC: "is on a disk that is full",
    errno.EDQUOT: "is on a disk where your quota is used up",
    errno.EFBIG: "grew past the size that this system allows a file",
    errno.EROFS: "is on a disk that can only be read",
    errno.EACCES: "may not be written by you",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a user can mend (a full or read-only disk, a missing permission) into a UserError naming `path`."""
    try:
        yield
    except OSError as error:
        what = _DISK.get(error.errno or 0)
        if what is None:
            raise
        cure = "Free some space or choose another folder, then run the same command again: it goes on from there."
        raise UserError(f"{path} {what}.", cure, exit_code=1) from error


def part_name(path: Path) -> Path:
    """The hidden sibling under which a file is written until it is whole."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file at once: aside, synced, renamed. Raises UserError for a full disk, leaving nothing."""
    part = part_name(path)
    with disk_errors(path):
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object) -> None:
    """Write `value` as a JSON file, whole or not at all, and make the folders above it."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def lock_folder(folder: Path) -> IO[str] | None:
    """Make `folder` and take its lock, held until the file is closed or the process dies; None if another holds it."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
