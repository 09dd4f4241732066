"""Decoded frames kept on disk: one memory-mapped file a corpus and preprocessing, shared by workers and runs.

The file opens with one state byte a sample: 0 not there yet, 1 to 200 the number of frames held, and above that
the reason for which the sample is lost, so that a later run need not try again. Then, from the next multiple of
4096 bytes, come up to `frames` evenly spaced frames a sample, uint8 (H, W, C) as the decoder gives them. A state is
written after its frames, and two processes that fill the same sample write the same bytes, so nobody waits for a
lock. The name of a file is a digest of what shapes its pixels: another preprocessing starts another file.

Disk is reserved in full when the file is made: a full disk is seen at once, not by a killed process later.
Letters: K' frames of a sample, S their side, C channels.
"""

import errno
import fcntl
import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from data_pipeline.config import MAX_CACHE_FRAMES
from data_pipeline.schema import LossReason, SampleError

VERSION = 1  # of the layout; part of a file's name
ALIGNMENT = 4096
LOST_CODES: dict[LossReason, int] = {  # written on disk: never renumber
    LossReason.NOT_MEDIA: 201,
    LossReason.NO_VIDEO_STREAM: 202,
    LossReason.TOO_SHORT: 203,
    LossReason.DECODE_ERROR: 204,
    LossReason.EMPTY_FILE: 205,
    LossReason.DAMAGED_SHARD: 206,
}
_REASON_OF = {code: reason for reason, code in LOST_CODES.items()}

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CacheSpec:
    """What a cache file holds: `samples` of a corpus, up to `frames` of `size` x `size` pixels each."""

    corpus_digest: str
    samples: int
    frames: int
    size: int
    resize: str
    interpolation: str
    first_seconds: float | None = None

    @property
    def key(self) -> str:
        """The name of the file: 24 hex digits of everything that shapes its content."""
        tree = {"version": VERSION, **self.__dict__}
        if self.first_seconds is None:  # younger than the first files, whose names stay
            del tree["first_seconds"]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def sample_bytes(self) -> int:
        """Bytes a sample takes."""
        return self.frames * 3 * self.size * self.size


class FrameCache:
    """The frames of one corpus under `folder`; opened by every process that reads or fills it.

    Raises UserError (exit code 1) where the disk has no room for the whole file.
    """

    def __init__(self, folder: Path, spec: CacheSpec) -> None:
        if not 1 <= spec.frames <= MAX_CACHE_FRAMES:
            raise ValueError(f"the cache keeps 1 to {MAX_CACHE_FRAMES} frames a sample, not {spec.frames}")
        self.spec = spec
        self.path = folder / f"{spec.key}.frames"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The frame cache {folder} cannot be made: {error.strerror}.", "Name another data.cache."
            ) from error
        head = -(-spec.samples // ALIGNMENT) * ALIGNMENT
        content = _map(self.path, head + spec.samples * spec.sample_bytes)
        self._states = content[: spec.samples]
        self._frames = content[head:].reshape(spec.samples, spec.frames, spec.size, spec.size, 3)

    def get(self, index: int) -> Frames | None:
        """A view (K', S, S, C) of a sample's frames, None if not there; SampleError if known as lost."""
        state = int(self._states[index])
        if state == 0:
            return None
        if state > MAX_CACHE_FRAMES:
            raise SampleError(_REASON_OF[state], "seen when the frame cache was filled")
        held: Frames = self._frames[index, :state]
        return held

    def put(self, index: int, frames: Frames) -> None:
        """Keep a sample's frames (K' <= K, S, S, C)."""
        self._frames[index, : len(frames)] = frames
        self._states[index] = len(frames)

    def put_lost(self, index: int, reason: LossReason) -> None:
        """Remember that a sample is lost; reasons that another try may not meet (a time-out) are not kept."""
        if reason in LOST_CODES:
            self._states[index] = LOST_CODES[reason]

    def filled(self) -> int:
        """How many samples are there or known as lost."""
        return int(np.count_nonzero(self._states))

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker opens the files anew."""
        return type(self), (self.path.parent, self.spec)


def _map(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """The whole file as a shared, writable byte array; made with its full size if it is not there."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # one process reserves, the others wait
            if os.fstat(handle).st_size != size:
                _reserve(handle, size)
            fcntl.flock(handle, fcntl.LOCK_UN)  # before mmap, whose copy of the handle would keep the lock
            return np.frombuffer(mmap.mmap(handle, size), dtype=np.uint8)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"The frame cache {path} cannot be opened: {error.strerror}.", "Name another data.cache.", exit_code=1
            ) from error
        path.unlink(missing_ok=True)
        raise UserError(
            f"The disk of {path.parent} has no room for a frame cache of {size / 2**30:.2f} GiB.",
            "Free that much, name a data.cache on another disk, or set data.cache=null.",
            exit_code=1,
        ) from error


def _reserve(handle: int, size: int) -> None:
    """Give the file its size and its disk blocks, or only the size where a file system cannot reserve."""
    disk = os.fstatvfs(handle)
    if disk.f_bavail * disk.f_frsize < size:  # asked first: a reservation that fails may fill the disk on its way
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(handle, size)
