"""Memory that the main process and its workers share: anonymous, owned by the main process, gone when all are.

A memfd and not /dev/shm, which containers often make too small for a few batches. Whatever dies, nothing is left
behind in a file system, and what a dead worker leaves half written harms nobody: its place is filled again.
"""

import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from typing import Any


class SharedBytes:
    """`size` zeroed bytes; a process that is being started may be given them as an argument."""

    def __init__(self, size: int, handle: int | None = None) -> None:
        self.size = size
        self._handle = os.memfd_create("videomamba") if handle is None else handle
        if handle is None:
            os.ftruncate(self._handle, size)
        self.view = mmap.mmap(self._handle, size)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (reduction.DupFd(self._handle), self.size)

    def __del__(self) -> None:
        os.close(self._handle)  # the map itself goes when the last view of it does


def _attach(handle: Any, size: int) -> SharedBytes:
    return SharedBytes(size, handle.detach())


class Watch:
    """Which sample a worker decodes and since when, where the main process sees it: a cell of shared memory."""

    _CELL = struct.Struct("qqd")

    def __init__(self, memory: SharedBytes, cell: int) -> None:
        self.memory = memory
        self._at = cell * self._CELL.size

    @classmethod
    def cells(cls, count: int) -> SharedBytes:
        """Memory for `count` workers."""
        return SharedBytes(max(1, count) * cls._CELL.size)

    @contextmanager
    def over(self, corpus: int, index: int) -> Iterator[None]:
        """The sample is being decoded; left by whatever ends that, except the death of the process."""
        self._CELL.pack_into(self.memory.view, self._at, corpus, index, time.monotonic())
        try:
            yield
        finally:
            self.clear()

    def clear(self) -> None:
        """Nothing is being decoded."""
        self._CELL.pack_into(self.memory.view, self._at, 0, 0, 0.0)

    def busy(self) -> tuple[int, int, float] | None:
        """(corpus, index, seconds) of what is being decoded; certain only once the worker is dead."""
        corpus, index, began = self._CELL.unpack_from(self.memory.view, self._at)
        return (corpus, index, time.monotonic() - began) if began else None
