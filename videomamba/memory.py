"""Peak memory from /proc (Linux): of a process tree, sampled; of one call, by the system's own count."""

import ctypes
import multiprocessing
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
PROC = Path("/proc")
M_MMAP_THRESHOLD = -3  # malloc.h


def alone(call: Callable[..., T], arguments: Iterable[tuple[object, ...]], imports: Sequence[str]) -> list[T]:
    """call(*each) for each of the arguments, every one in a process of its own that holds little else."""
    # Forked from a server that has only imported: a fork of a process whose threads have run would hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(imports))
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        return [processes.submit(call, *each).result() for each in arguments]


def give_back_memory() -> None:
    """Have blocks of 64 KiB and more go back to the system when freed, so that none hides under what was freed."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)


def peak_of(run: Callable[[], object]) -> int:
    """The most that this process held while `run` ran, above what it held before, in bytes."""
    before = _status("VmRSS")
    (PROC / "self" / "clear_refs").write_text("5")  # the peak begins anew
    run()
    return max(1, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in (PROC / "self" / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{PROC / 'self' / 'status'} has no {field}")


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
