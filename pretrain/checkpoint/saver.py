"""Saving while training goes on: the state is copied at a step's edge, a thread writes it, and all ranks agree on it.

    saver.save(...)   every rank copies what it has to write, and a thread of its own begins
    saver.told()      goes into the numbers that the ranks bring together at every step anyway
    saver.edge(...)   when no rank is writing any more: rank 0's thread gives the checkpoint its name, and removes old
                      ones; whatever failed on any rank is raised on all
    saver.finish()    waits for all of that

A thread never talks to another rank. Killed at any moment, a run has the checkpoint of before, whole.
"""

import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from configs.errors import UserError
from configs.files import disk_errors, write_whole
from pretrain import distributed
from pretrain.checkpoint.folder import LATEST, prune
from pretrain.checkpoint.meta import Meta
from pretrain.checkpoint.publish import Surroundings, prepare, publish
from pretrain.checkpoint.snapshot import File, files, in_memory
from pretrain.checkpoint.tensors import Pace, write_tensors
from pretrain.checkpoint_config import CheckpointConfig

log = logging.getLogger(__name__)


class _Job(threading.Thread):
    """Work beside training; what it returned or what it failed of is asked for when it has ended."""

    def __init__(self, work: Callable[[], dict[str, str]]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._work = work
        self.result: dict[str, str] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001 - raised on the main thread, by `outcome`
            self.error = error


class Saver:
    """The checkpoints of the run in the folder `out`, one after the other. Every rank calls the same methods."""

    def __init__(self, out: Path, config: CheckpointConfig) -> None:
        self.root, self.config = out / "checkpoints", config
        self._pace = Pace(config.write_mb_s)
        self._hurry = False
        self._job: _Job | None = None
        self._name: Callable[[dict[str, str]], None] | None = None
        self._aside: Path | None = None

    def told(self) -> dict[str, float]:
        """A number to be summed over ranks, for `edge`: above 0, a thread is still at work."""
        return {"saving": float(self._job is not None and self._job.is_alive())}

    def save(
        self, engine: Any, model: nn.Module, meta: Meta, beside: Surroundings, ema: dict[str, Tensor] | None = None
    ) -> None:
        """Begin a checkpoint at `meta.step`, after the one before is finished."""
        self.finish()
        final = self.root / f"step-{meta.step:07d}"
        aside = self._aside = self.root / f".{final.name}.part"
        distributed.on_first(lambda: prepare(self.root, aside))
        made = files(engine, model, ema)
        if self.config.background:
            made = in_memory(made)
        pace = self._pace = Pace(None if self._hurry else self.config.write_mb_s)
        self._job = _Job(lambda: _write(made, aside, final, pace))
        self._name = lambda hashes: self._publish(aside, final, meta, beside, hashes)
        if self.config.background:
            self._job.start()
        else:
            self._job.run()
            self.finish()

    def hurry(self) -> None:
        """Write as fast as the disk can from now on: the run has been asked to leave."""
        self._hurry = True
        self._pace.release()

    def edge(self, saving: float) -> None:
        """At a step's edge: go on with a checkpoint that no rank is writing any more (`saving`, summed over ranks).

        Raises UserError on every rank if the disk of one is full.
        """
        if self._job is not None and not saving:
            self._next()

    def finish(self) -> None:
        """Wait for the checkpoint under way, if there is one. Raises as `edge` does."""
        while self._job is not None:
            self._next()

    def _next(self) -> None:
        """All ranks have written: rank 0 names the checkpoint, beside training; or it has, and nothing is under way."""
        hashes, name, self._name = self._outcome(), self._name, None
        self._job = None
        if name is None:
            return
        first = distributed.rank() == 0
        self._job = _Job(lambda: (name(hashes), {})[1] if first else {})
        if self.config.background:
            self._job.start()
        else:
            self._job.run()

    def _outcome(self) -> dict[str, str]:
        """What the threads of all ranks returned, together; what one of them failed of is raised on every rank."""
        job = self._job
        assert job is not None
        if job.ident is not None:
            job.join()
        told = distributed.gather_objects((job.error, job.result))
        errors = [error for error, _ in told if error is not None]
        if errors:
            self._job = self._name = None
            if distributed.rank() == 0 and self._aside is not None:
                shutil.rmtree(self._aside, ignore_errors=True)
            raise errors[0]
        return {name: digest for _, hashes in told for name, digest in hashes.items()}

    def _publish(self, aside: Path, final: Path, meta: Meta, beside: Surroundings, hashes: dict[str, str]) -> None:
        publish(aside, final, meta, beside, hashes)
        write_whole(self.root / LATEST, f"{final.name}\n".encode())
        with disk_errors(self.root):
            prune(self.root, self.config)

    @contextmanager
    def before_refusing(self) -> Iterator[None]:
        """Let the checkpoint under way be finished before a UserError that every rank raises ends the run."""
        try:
            yield
        except UserError:
            self.finish()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Without an error, `finish`; after one, which the other ranks may not know of, no rank is waited for."""
        if error is None or (distributed.world_size() == 1 and isinstance(error, Exception)):
            self.finish()


def _write(made: list[File], aside: Path, final: Path, pace: Pace) -> dict[str, str]:
    """Write this rank's files; the sha256 of each. After a failure the rest is run through: others wait for parts."""
    hashes, failure = {}, None
    for file in made:
        if failure is None and file.entries:
            try:
                with disk_errors(final):
                    hashes[file.name] = write_tensors(aside / file.name, file.entries, file.tensors, pace)
            except UserError as error:
                failure = error
            except OSError as error:
                cure = "Look at the disk, then run the same command again: it goes on from the last checkpoint."
                failure = UserError(f"{final} could not be written: {error}.", cure, exit_code=1)
        _run_through(file.tensors)
    if failure is not None:
        raise failure
    return hashes


def _run_through(tensors: Iterable[Tensor]) -> None:
    if isinstance(tensors, Iterator):
        for _ in tensors:
            pass
