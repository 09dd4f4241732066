"""Probe many files in parallel, in order, each within a time limit: a decoder that hangs or crashes costs one clip.

The processes are our own and not a pool's, because a pool can neither kill the one process that hangs nor tell which
file it was at. Results come back in the order of the tasks, whatever the number of processes.
"""

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

from data_pipeline.schema import LossReason, SampleError, content_digest

CHUNK_FILES, CHUNK_BYTES = 16, 16 << 20  # what one message gives a process to do
IN_FLIGHT_BYTES = 256 << 20  # media that may wait for their turn in memory
_START_SECONDS = 180.0


@dataclass(frozen=True)
class Task:
    """A file to read and probe; `size` in bytes is for sharing out the work."""

    position: int
    path: str
    size: int


@dataclass(frozen=True)
class Probed:
    """A file that decodes: its bytes and what `decode.probe` found (`kind` apart)."""

    position: int
    media: bytes
    sha256: str
    kind: str
    probe: dict[str, str | int | float]


@dataclass(frozen=True)
class Lost:
    """A file that does not, and why."""

    position: int
    reason: LossReason
    detail: str


Result = Probed | Lost


def probe_file(task: Task) -> Result:
    """Read and probe one file; faults of the content, and files that cannot be read, are a Lost."""
    from data_pipeline.decode import probe

    try:
        media = Path(task.path).read_bytes()
        found = probe(media)
    except SampleError as error:
        return Lost(task.position, error.reason, error.detail)
    except MemoryError:
        return Lost(task.position, LossReason.DECODE_ERROR, "decoding it takes more memory than there is")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ELOOP):
            raise
        return Lost(task.position, LossReason.MISSING_FILE, error.strerror or str(error))
    return Probed(task.position, media, content_digest(media), found.kind, found.tree())


def _end_with(parent: BaseProcess) -> None:
    """Wait for the parent's death, and follow: a decoder that hangs would not notice it."""
    parent.join()
    os._exit(1)


def _serve(connection: Connection) -> None:
    """A worker's life: chunks of tasks in, one result a task out, until the parent closes the pipe or dies."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    from data_pipeline import decode  # noqa: F401  what takes long to import is ready before the clock runs

    connection.send(None)
    try:
        while True:
            for task in connection.recv():
                try:
                    connection.send(probe_file(task))
                except OSError as error:  # the machine's fault, not the file's: the parent stops the build
                    connection.send(error)
    except (EOFError, BrokenPipeError):
        return


@dataclass
class _Worker:
    """One process, the pipe to it, and the tasks that it has not answered yet, oldest first."""

    process: SpawnProcess
    connection: Connection
    tasks: deque[Task] = field(default_factory=deque)
    heard: float = field(default_factory=time.monotonic)
    ready: bool = False

    def give(self, tasks: Sequence[Task]) -> None:
        """Send it more to do."""
        if not self.tasks:
            self.heard = time.monotonic()
        self.tasks.extend(tasks)
        self.connection.send(list(tasks))

    def deadline(self, time_limit: float) -> float:
        """When it must have been heard again (`time.monotonic`); far away for one that has nothing to do."""
        if not self.ready:
            return self.heard + _START_SECONDS
        return self.heard + (time_limit if self.tasks else _START_SECONDS)

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _start() -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    # Ctrl-C reaches the whole process group: only the parent answers it. A signal blocked here stays so in the child,
    # from its first instruction on; the tracker must run by then, since starting it unblocks the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return _Worker(process, ours)


def probe_files(tasks: Sequence[Task], workers: int, time_limit: float) -> Generator[Result, None, None]:
    """The result of every task, in order; close the generator to stop its processes.

    A file that takes longer than `time_limit` seconds is Lost as TIMEOUT, one whose decoder dies as DECODE_ERROR; the
    process is replaced. Raises OSError where reading fails for the machine's sake (an I/O error, no memory).
    """
    if not tasks:
        return
    crew = [_start() for _ in range(min(workers, -(-len(tasks) // CHUNK_FILES)))]
    try:
        yield from _run(deque(_chunks(tasks)), crew, time_limit)
    finally:
        for worker in crew:
            worker.stop()


def _chunks(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    chunk: list[Task] = []
    size = 0
    for task in tasks:
        if chunk and (len(chunk) == CHUNK_FILES or size + task.size > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(task)
        size += task.size
    if chunk:
        yield chunk


def _run(chunks: deque[list[Task]], crew: list[_Worker], time_limit: float) -> Iterator[Result]:
    order: deque[Task] = deque()  # given out and not yet yielded
    waiting: dict[int, Result] = {}
    in_flight = 0
    while chunks or order:
        for worker in crew:
            if chunks and worker.ready and len(worker.tasks) < CHUNK_FILES // 2 and in_flight < IN_FLIGHT_BYTES:
                chunk = chunks.popleft()
                worker.give(chunk)
                order.extend(chunk)
                in_flight += sum(task.size for task in chunk)
        for result in _hear(crew, time_limit):
            waiting[result.position] = result
        while order and order[0].position in waiting:
            task = order.popleft()
            in_flight -= task.size
            yield waiting.pop(task.position)


def _hear(crew: list[_Worker], time_limit: float) -> list[Result]:
    """Wait for messages, at most until the next deadline, and replace the processes that died or hang."""
    results: list[Result] = []
    deadlines = [worker.deadline(time_limit) for worker in crew]
    heard = wait([worker.connection for worker in crew], timeout=max(0.0, min(deadlines) - time.monotonic()))
    for i, worker in enumerate(crew):
        if worker.connection in heard:
            try:
                answer = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                results.append(_bury(crew, i, LossReason.DECODE_ERROR, "the process that decoded it died"))
                continue
            worker.heard = time.monotonic()
            if answer is None:
                worker.ready = True
            elif isinstance(answer, OSError):
                raise answer
            else:
                worker.tasks.popleft()
                results.append(answer)
        elif worker.deadline(time_limit) < time.monotonic() and not worker.connection.poll():
            results.append(_bury(crew, i, LossReason.TIMEOUT, f"took longer than {time_limit:g} s"))
    return results


def _bury(crew: list[_Worker], i: int, reason: LossReason, what: str) -> Lost:
    """Replace a process that hangs or died; its oldest task is lost, the others go to the new one."""
    worker = crew[i]
    worker.stop()
    code = worker.process.exitcode or 0
    if not worker.ready or not worker.tasks:
        raise RuntimeError(f"A decoding process ended before its first file (exit code {code}).")
    lost = worker.tasks.popleft()
    if reason is LossReason.DECODE_ERROR:
        if code >= 0:  # an error of ours, not a crash inside a decoder: its traceback is above
            raise RuntimeError(f"The process that probed {lost.path} failed (exit code {code}).")
        what += f" of {signal.Signals(-code).name}"
    crew[i] = _start()
    if worker.tasks:
        crew[i].give(worker.tasks)
    return Lost(lost.position, reason, what)
