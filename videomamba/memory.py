"""Peak memory of one call, by the system's own count (/proc, so Linux)."""

import ctypes
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
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


def anonymous_bytes(pid: int) -> int:
    """What a process holds in memory that is no file's: what the system cannot simply read again."""
    return _status("RssAnon", pid)


def _status(field: str, pid: int | str = "self") -> int:
    for line in (PROC / str(pid) / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{PROC / str(pid) / 'status'} has no {field}")
