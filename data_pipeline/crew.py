"""Prepare many clips in parallel, in order, each within a time limit: a decoder that hangs or crashes costs one clip.

The processes are our own and not a pool's, because a pool can neither kill the one process that hangs nor tell which
file it was at. Each leads a process group, so that the ffmpeg it may have started dies with it. Results come back
in the order of the tasks, whatever the number of processes; tasks are taken as they are needed.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess

from configs.errors import UserError
from data_pipeline.prepare import Lost, Recipe, Result, Task, prepare
from data_pipeline.schema import LossReason

CHUNK_FILES, CHUNK_BYTES = 16, 16 << 20  # what one message gives a process to do
IN_FLIGHT_BYTES = 256 << 20  # media that may wait for their turn in memory
_START_SECONDS = 180.0


def _end_with(parent: BaseProcess) -> None:
    """Wait for the parent's death, and follow: a decoder that hangs would not notice it."""
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _serve(connection: Connection, recipe: Recipe) -> None:
    """A worker's life: chunks of tasks in, one result a task out, until the parent closes the pipe or dies."""
    os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    from data_pipeline import decode  # noqa: F401  what takes long to import is ready before the clock runs

    connection.send(None)
    try:
        while True:
            for task in connection.recv():
                try:
                    connection.send(prepare(task, recipe))
                except (OSError, UserError) as error:  # the machine's fault, not the clip's: the parent stops the build
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
        """End it, whatever it is doing, and what it has started."""
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has not come to lead its group yet
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _start(recipe: Recipe) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, recipe), daemon=True)
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


def prepare_all(
    tasks: Iterable[Task], recipe: Recipe, workers: int, time_limit: float
) -> Generator[Result, None, None]:
    """The result of every task, in order; close the generator to stop its processes.

    A clip that takes longer than `time_limit` seconds is Lost as TIMEOUT, one whose decoder dies as DECODE_ERROR; the
    process is replaced. Raises OSError or UserError where the machine is at fault (an I/O error, a full disk).
    """
    chunks = _chunks(tasks)
    ahead = list(itertools.islice(chunks, workers))
    if not ahead:
        return
    crew = _Crew(recipe, time_limit)
    try:
        crew.workers += [_start(recipe) for _ in ahead]
        yield from crew.run(itertools.chain(ahead, chunks))
    finally:
        for worker in crew.workers:
            worker.stop()


def _chunks(tasks: Iterable[Task]) -> Iterator[list[Task]]:
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


@dataclass
class _Crew:
    recipe: Recipe
    time_limit: float
    workers: list[_Worker] = field(default_factory=list)

    def run(self, chunks: Iterator[list[Task]]) -> Iterator[Result]:
        """Give out the chunks and collect the results, in the order of the tasks."""
        order: deque[Task] = deque()  # given out and not yet yielded
        waiting: dict[int, Result] = {}
        in_flight = 0
        chunk = next(chunks, None)
        while chunk or order:
            for worker in self.workers:
                if chunk and worker.ready and len(worker.tasks) < CHUNK_FILES // 2 and in_flight < IN_FLIGHT_BYTES:
                    worker.give(chunk)
                    order.extend(chunk)
                    in_flight += sum(task.size for task in chunk)
                    chunk = next(chunks, None)
            for result in self._hear():
                waiting[result.position] = result
            while order and order[0].position in waiting:
                task = order.popleft()
                in_flight -= task.size
                yield waiting.pop(task.position)

    def _hear(self) -> list[Result]:
        """Wait for messages, at most until the next deadline, and replace the processes that died or hang."""
        results: list[Result] = []
        deadlines = [worker.deadline(self.time_limit) for worker in self.workers]
        heard = wait(
            [worker.connection for worker in self.workers], timeout=max(0.0, min(deadlines) - time.monotonic())
        )
        for i, worker in enumerate(self.workers):
            if worker.connection in heard:
                try:
                    answer = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    results.append(self._bury(i, LossReason.DECODE_ERROR, "the process that decoded it died"))
                    continue
                worker.heard = time.monotonic()
                if answer is None:
                    worker.ready = True
                elif isinstance(answer, OSError | UserError):
                    raise answer
                else:
                    worker.tasks.popleft()
                    results.append(answer)
            elif worker.deadline(self.time_limit) < time.monotonic() and not worker.connection.poll():
                results.append(self._bury(i, LossReason.TIMEOUT, f"took longer than {self.time_limit:g} s"))
        return results

    def _bury(self, i: int, reason: LossReason, what: str) -> Lost:
        """Replace a process that hangs or died; its oldest task is lost, the others go to the new one."""
        worker = self.workers[i]
        worker.stop()
        code = worker.process.exitcode or 0
        if not worker.ready or not worker.tasks:
            raise RuntimeError(f"A decoding process ended before its first file (exit code {code}).")
        lost = worker.tasks.popleft()
        if reason is LossReason.DECODE_ERROR:
            if code >= 0:  # an error of ours, not a crash inside a decoder: its traceback is above
                raise RuntimeError(f"The process that probed {lost.path} failed (exit code {code}).")
            what += f" of {signal.Signals(-code).name}"
        self.workers[i] = _start(self.recipe)
        if worker.tasks:
            self.workers[i].give(worker.tasks)
        return Lost(lost.position, reason, what)
