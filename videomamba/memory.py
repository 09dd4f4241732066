"""Peak memory of a process and its children, sampled from /proc (Linux) without a dependency."""

import threading
from pathlib import Path
from types import TracebackType

PROC = Path("/proc")


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
    for listing in (PROC / str(pid) / "task").glob("*/children"):
        try:
            found += [int(child) for child in listing.read_text().split()]
        except OSError:  # the thread has ended meanwhile
            continue
    return found


def _proportional_bytes(pid: int) -> int:
    try:
        rollup = (PROC / str(pid) / "smaps_rollup").read_text()
    except OSError:  # the process has ended, or belongs to somebody else
        return 0
    for line in rollup.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


class TreeMemory:
    """Context manager that samples `tree_bytes(pid)` every `interval` seconds; `.peak` holds the largest."""

    def __init__(self, pid: int, interval: float = 3.0) -> None:
        self.pid = pid
        self.interval = interval
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tree-memory", daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, tree_bytes(self.pid))
            self._stop.wait(self.interval)

    def __enter__(self) -> "TreeMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
