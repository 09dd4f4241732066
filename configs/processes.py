"""Child processes: they die with their parent, and what a tree of them holds is sampled from /proc (Linux)."""

import ctypes
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self


def die_with_parent() -> None:
    """For `preexec_fn`: have Linux kill this child when its parent dies, even by kill -9, so that no orphan writes on.

    The parent is the thread that started the child: start it from one that lives on.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def tree_bytes(root: int) -> int:
    """Proportional set size, summed over process `root` and its descendants, in bytes; 0 where /proc cannot tell."""
    total = 0
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        total += _proportional_bytes(pid)
        waiting.extend(_children(pid))
    return total


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for listing in (Path("/proc") / str(pid) / "task").glob("*/children"):
        try:
            found += [int(child) for child in listing.read_text().split()]
        except OSError:  # the thread has ended meanwhile
            continue
    return found


def _proportional_bytes(pid: int) -> int:
    try:
        rollup = (Path("/proc") / str(pid) / "smaps_rollup").read_text()
    except OSError:  # the process has ended, or belongs to somebody else
        return 0
    for line in rollup.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


class TreeMemory:
    """Samples `held(pid)` every `interval` seconds; `.peak` holds the largest; a context manager."""

    def __init__(self, pid: int, interval: float = 3.0, held: Callable[[int], int] = tree_bytes) -> None:
        self.pid = pid
        self.interval = interval
        self.held = held
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tree-memory", daemon=True)

    def _watch(self) -> None:
        pause = min(
            0.25, self.interval
        )  # often at first, for what is over soon; looking costs the more, the more is held
        while not self._stop.wait(pause):
            self.peak = max(self.peak, self.held(self.pid))
            pause = min(2 * pause, self.interval)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
