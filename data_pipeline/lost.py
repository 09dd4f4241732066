"""Samples lost while a run reads: one `Loss` each time one is met, the list of bad samples, and the run's lost.csv.

A bad sample is known by (corpus, index). The list is part of a checkpoint, so that a resumed run substitutes the
same samples as the run it goes on from, those among them whose decoding took too long on some machine.
"""

import csv
import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.files import disk_errors, write_whole
from data_pipeline.schema import LossReason, SampleError, Samples

log = logging.getLogger(__name__)

FEWEST_FOR_FRACTION = 1000  # below this many samples, losses are held against this many

COLUMNS = ("step", "rank", "corpus", "shard", "key", "offset", "reason", "detail")


@dataclass(frozen=True)
class Loss:
    """A sample that could not be used: why, which one, where it lies (`shard.tar:key@offset`), and what was seen."""

    reason: LossReason
    corpus: int
    index: int
    key: str
    location: str
    detail: str

    @classmethod
    def of(cls, number: int, corpus: Samples, index: int, error: SampleError) -> "Loss":
        """The loss of sample `index` of the run's `number`-th corpus."""
        return cls(error.reason, number, index, corpus.key(index), corpus.location(index), error.detail)

    @property
    def place(self) -> tuple[str, str]:
        """(shard, offset), the parts of the location beside the key; a sample that is a file has no offset."""
        shard, _, offset = self.location.partition(f":{self.key}@")
        return shard, offset


class BadSamples:
    """Samples that no worker tries again, by (corpus, index)."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], SampleError] = {}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, corpus: int, index: int, error: SampleError) -> bool:
        """Note a sample; False if it was known."""
        return self._known.setdefault((corpus, index), error) is error

    def require_good(self, corpus: int, index: int) -> None:
        """Raise the SampleError by which this sample is known to be bad."""
        error = self._known.get((corpus, index))
        if error is not None:
            raise SampleError(error.reason, error.detail)  # a new one: a raised error holds on to its frames

    def state(self) -> list[tuple[int, int, str]]:
        """(corpus, index, reason) of every sample, sorted: what a checkpoint keeps."""
        return sorted((corpus, index, error.reason.value) for (corpus, index), error in self._known.items())

    def load(self, state: Iterable[Sequence[Any]]) -> None:
        """Add what a checkpoint kept."""
        for corpus, index, reason in state:
            self.add(int(corpus), int(index), SampleError(LossReason(reason), "known from the checkpoint"))


def check_bad_fraction(lost: int, seen: int, limit: float) -> None:
    """UserError (exit code 1) when `lost` of `seen` samples, summed over ranks, pass `limit`.

    Early on, `lost` is held against 1000 samples instead of the few seen, so that one bad clip in the first
    batch does not stop a run; a limit of 0 stops at the first.
    """
    if lost > limit * max(seen, FEWEST_FOR_FRACTION):
        raise UserError(
            f"{lost} of {seen} samples were lost, more than data.max_bad_fraction={limit:g} allows.",
            "Run `videomamba data verify` on the corpus, or raise the limit.",
            exit_code=1,
        )


class LostCsv:
    """A run's lost.csv: a row each time a bad sample was met, with the step (counted from 0) that met it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, step: int) -> None:
        """Drop the rows of `step` and later, which a resumed run meets again, and a row that a crash cut short."""
        if not self.path.is_file():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS)][1:]
        kept = [row for row in rows if row[0].isdigit() and int(row[0]) < step]
        write_whole(self.path, _encoded([COLUMNS, *kept] if kept else []))

    def add(self, step: int, by_rank: Sequence[Sequence[Loss]]) -> None:
        """Append what each rank met in `step`."""
        rows = [
            (step, rank, loss.corpus, loss.place[0], loss.key, loss.place[1], loss.reason.value, loss.detail)
            for rank, losses in enumerate(by_rank)
            for loss in losses
        ]
        if not rows:
            return
        with disk_errors(self.path), self.path.open("ab") as file:
            file.write(_encoded([COLUMNS, *rows] if file.tell() == 0 else rows))


def _encoded(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
