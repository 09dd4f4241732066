"""Worker processes that make batches, delivered in the order of their tasks, whatever dies or hangs on the way.

The main process owns all that has to survive a worker: which tasks are out, and the memory that frames are written
into. Every worker has a pipe of its own, so a death, even amid a message, is the end of that pipe and of nothing
else. Tasks are pure, so those of a lost worker are simply given to the one that takes its place.

A decode that takes longer than `decode_timeout` seconds is ended by killing its worker, and its sample is bad from
then on; so is a sample over which workers die twice (a decoder can crash). Deaths without such a cause are survived
while batches still arrive in between, and are an error when they do not.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from data_pipeline.batches import Allocate, Batch, fresh
from data_pipeline.lost import BadSamples
from data_pipeline.schema import LossReason, SampleError
from data_pipeline.shared_memory import SharedBytes, Watch

log = logging.getLogger(__name__)

LOOK_EVERY = 0.5  # seconds between looks at what the workers decode, while a batch is awaited
GRACE = (
    1.5  # seconds that an overdue decode gets to end by itself: after Ctrl-Z the clock has gone on, the work has not
)
MOST_DEATHS = 3  # workers that may die without a batch arriving in between
DEATHS_OF_ONE_SAMPLE = 2

_Packed = dict[str, Any]


class Maker(Protocol):
    """What runs in a worker: a task becomes a batch, or the UserError that ends the run."""

    bad: BadSamples

    def make(self, task: Any, allocate: Allocate) -> Batch | UserError:
        """The batch of a task, its frames in memory from `allocate`."""

    def watched_by(self, watch: Watch) -> None:
        """Say to `watch` what is being decoded."""


@dataclass(frozen=True)
class _Task:
    number: int
    what: Any
    slot: int


@dataclass
class _Worker:
    place: int
    process: BaseProcess
    connection: Connection
    watch: Watch
    given: list[_Task] = field(default_factory=list)
    overdue: tuple[tuple[int, int], float] | None = None  # the sample past its time, and since when that is known


class Pool:
    """`workers` processes with up to `prefetch` batches each in the making; `frame_bytes` is the largest batch's.

    With no workers, batches are made in this process as they are asked for, and nothing watches a decode.
    """

    def __init__(
        self,
        maker: Maker,
        workers: int,
        prefetch: int,
        frame_bytes: int,
        decode_timeout: float,
        pin_memory: bool = False,
    ) -> None:
        self._maker = maker
        self._count, self._prefetch, self._frame_bytes = workers, prefetch, frame_bytes
        self._decode_timeout = decode_timeout
        self._pin_memory = pin_memory

    def run(self, tasks: Iterable[Any]) -> Iterator[Batch]:
        """The batch of every task, in order. Raises UserError as the maker does, or where workers keep dying."""
        if self._count:
            yield from _Run(self._maker, self._count, self._prefetch, self._frame_bytes, self._decode_timeout).run(
                tasks, self._pin_memory
            )
            return
        for task in tasks:
            made = self._maker.make(task, fresh)
            if isinstance(made, UserError):
                raise made
            yield made.pinned() if self._pin_memory else made


class _Run:
    """The workers of one pass over some tasks."""

    def __init__(self, maker: Maker, workers: int, prefetch: int, frame_bytes: int, decode_timeout: float) -> None:
        self._maker = maker
        self._decode_timeout = decode_timeout
        self._frame_bytes = max(1, frame_bytes)
        self._free = list(range(workers * prefetch))
        self._slots = SharedBytes(len(self._free) * self._frame_bytes)
        self._cells = Watch.cells(workers)
        self._found: list[tuple[int, int, SampleError]] = []
        self._killers: Counter[tuple[int, int]] = Counter()
        self._deaths = 0
        self._done: dict[int, tuple[int, _Packed | UserError | str]] = {}
        self._workers = [self._start(place) for place in range(workers)]

    def run(self, tasks: Iterable[Any], pin_memory: bool) -> Iterator[Batch]:
        waiting = enumerate(tasks)
        given = taken = 0
        try:
            while True:
                while self._free and (following := next(waiting, None)) is not None:
                    self._give(_Task(*following, self._free.pop()))
                    given += 1
                if taken == given:
                    return
                while taken not in self._done:
                    self._attend()
                slot, made = self._done.pop(taken)
                if isinstance(made, UserError):
                    raise made
                if isinstance(made, str):
                    raise RuntimeError(f"A worker that reads data failed:\n{made}")
                batch = self._unpacked(slot, made, pin_memory)
                self._free.append(slot)
                self._deaths = 0
                taken += 1
                if (following := next(waiting, None)) is not None:  # before the caller goes off to train
                    self._give(_Task(*following, self._free.pop()))
                    given += 1
                yield batch
        finally:
            for worker in self._workers:
                worker.process.kill()
                worker.process.join()
                worker.connection.close()

    def _start(self, place: int) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        arguments = (theirs, self._maker, self._slots, self._frame_bytes, self._cells, place, dict(os.environ))
        process = _context().Process(target=_work, args=arguments, daemon=True, name=f"data worker {place}")
        process.start()
        theirs.close()  # or its end would not be noticed
        return _Worker(place, process, ours, Watch(self._cells, place))

    def _give(self, task: _Task, worker: _Worker | None = None) -> None:
        worker = worker or min(self._workers, key=lambda one: len(one.given))
        worker.given.append(task)
        try:
            worker.connection.send((task.number, task.what, task.slot, tuple(self._found)))
        except OSError:
            log.debug("worker %d is gone; the next look finds it", worker.place)

    def _attend(self) -> None:
        """Wait a moment for something to happen, and see to it."""
        ready = wait([end for one in self._workers for end in (one.connection, one.process.sentinel)], LOOK_EVERY)
        for worker in list(self._workers):
            if worker.connection in ready or worker.process.sentinel in ready:
                self._receive(worker)
            elif self._is_overdue(worker):
                self._replace(worker, hung=True)

    def _receive(self, worker: _Worker) -> None:
        try:
            while worker.connection.poll():
                number, made = worker.connection.recv()
                (task,) = (task for task in worker.given if task.number == number)
                worker.given.remove(task)
                self._done[number] = task.slot, made
        except (EOFError, OSError):
            self._replace(worker, hung=False)
        else:
            if not worker.process.is_alive() and not worker.connection.poll():
                self._replace(worker, hung=False)

    def _is_overdue(self, worker: _Worker) -> bool:
        """Whether its decode is past its time and stayed so for another moment."""
        busy = worker.watch.busy()
        if busy is None or busy[2] <= self._decode_timeout:
            worker.overdue = None
            return False
        if worker.overdue is None or worker.overdue[0] != busy[:2]:
            worker.overdue = busy[:2], time.monotonic()
        return time.monotonic() - worker.overdue[1] > GRACE

    def _replace(self, worker: _Worker, hung: bool) -> None:
        """End a worker, say why, and let another take over its tasks."""
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        busy = worker.watch.busy()
        worker.watch.clear()
        ending = _ending(worker.process.exitcode)
        if worker.process.exitcode == 1 and not self._done:
            raise RuntimeError("A worker that reads data could not start; its traceback stands above this one.")
        if hung and busy is not None:
            self._blame(busy[:2], LossReason.TIMEOUT, f"not decoded after {self._decode_timeout:g} s")
        else:
            self._deaths += 1
            if busy is not None:
                self._killers[busy[:2]] += 1
                if self._killers[busy[:2]] == DEATHS_OF_ONE_SAMPLE:
                    self._blame(busy[:2], LossReason.DECODE_ERROR, f"decoding it ended the worker ({ending})")
            if self._deaths > MOST_DEATHS:
                raise UserError(
                    f"{self._deaths} workers that read data died and no batch came in between (the last {ending}).",
                    "Look for it in the system's log (memory?), lower data.workers or data.prefetch, and resume.",
                    exit_code=1,
                )
            log.warning("a worker that reads data died (%s); another takes over its batches", ending)
        replacement = self._start(worker.place)
        self._workers[worker.place] = replacement
        for task in worker.given:
            self._give(task, replacement)

    def _blame(self, sample: tuple[int, int], reason: LossReason, detail: str) -> None:
        error = SampleError(reason, detail)
        log.warning("sample %d of corpus %d: %s; it is substituted from now on", sample[1], sample[0], detail)
        self._maker.bad.add(*sample, error)
        self._found.append((*sample, error))

    def _unpacked(self, slot: int, packed: _Packed, pin_memory: bool) -> Batch:
        """A finished batch, its frames copied out of shared memory."""
        shape = packed["frames"]
        frames = torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)
        frames.copy_(_in_slot(self._slots, slot, self._frame_bytes, shape))
        arrays = {name: torch.from_numpy(value) for name, value in packed.items() if isinstance(value, np.ndarray)}
        return Batch(**{**packed, **arrays, "frames": frames})


def _packed(batch: Batch) -> _Packed:
    """A batch for its way through a pipe: small arrays as they are, of the frames only the shape.

    torch would send a tensor as a handle that the receiver asks the sender for, who may be dead by then.
    """
    fields = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in vars(batch).items()}
    return fields | {"frames": tuple(batch.frames.shape)}


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    # 255 is also what multiprocessing says of a worker that ended before its server had noted it.
    return f"exit code {exit_code}"


def _in_slot(slots: SharedBytes, slot: int, frame_bytes: int, shape: tuple[int, ...]) -> Tensor:
    size = torch.Size(shape).numel()
    if size > frame_bytes:
        raise ValueError(f"{shape} needs {size} bytes, a slot has {frame_bytes}")
    if size == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(slots.view, dtype=torch.uint8, count=size, offset=slot * frame_bytes).view(shape)


def _context() -> ForkServerContext:
    """Workers start from a clean server process: a fork of this one would copy its threads' locks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipeline.batches"])
    return context


def _work(
    connection: Connection,
    maker: Maker,
    slots: SharedBytes,
    frame_bytes: int,
    cells: SharedBytes,
    place: int,
    environment: dict[str, str],
) -> None:
    """A worker's life: make batches until the main process closes the pipe."""
    os.environ.update(environment)  # the server that it comes from has that of its own start: no later credentials
    torch.set_num_threads(1)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)  # the main process decides when a run stops
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    maker.watched_by(Watch(cells, place))
    while True:
        try:
            number, task, slot, known = connection.recv()
        except EOFError:
            return
        for corpus, index, error in known:
            maker.bad.add(corpus, index, error)
        try:
            made = maker.make(task, partial(_in_slot, slots, slot, frame_bytes))
        except Exception as error:
            connection.send((number, traceback.format_exc()))
            raise SystemExit(1) from error
        connection.send((number, made if isinstance(made, UserError) else _packed(made)))


def _leave_with_parent() -> None:
    """End this process when the main one does, however that ends; its parent is the server, which lives on with it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
