"""What a run says about itself: log.jsonl always, TensorBoard if asked, and one bar or plain lines on the console.

A line of log.jsonl holds `step`, `loss` (the weighted sum), `losses` (each, weighted, averaged over ranks and
over the steps since the last line), `metrics`, `lr` by group, `grad_norm`, `clips_per_s` and
`clips_per_s_device`, `data_wait` (the share of time spent waiting for batches, the mean of all ranks), `step_s`,
`memory_mb` (the peak of this process, or of the device), `eta_s`, `start` (the step at which this process began, which
shows restarts) and `time`. Only rank 0 writes.
"""

import json
import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from configs.files import disk_errors, write_whole

log = logging.getLogger(__name__)


class MetricsLog:
    """The sinks of one run; use as a context. `active` is false on every rank but 0, where it does nothing."""

    def __init__(
        self, folder: Path, start: int, steps: int, title: str, tensorboard: bool, active: bool = True
    ) -> None:
        self.folder, self.start, self.steps, self.title = folder, start, steps, title
        self.tensorboard, self.active = tensorboard, active
        self.path = folder / "log.jsonl"
        self.writer: Any = None
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Self:
        if not self.active:
            return self
        drop_after(self.path, self.start)
        self.file = self.path.open("a", encoding="utf-8")
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = self.start if self.start else None
            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)
        if sys.stderr.isatty():
            self._start_bar()
        return self

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[said]}"), console=Console(stderr=True))
        self.task = self.bar.add_task(self.title, total=self.steps, completed=self.start, said="")
        self.bar.start()

    def advance(self, step: int) -> None:
        """Move the bar; cheap."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def write(self, record: dict[str, Any]) -> None:
        """One line in every sink; `record` is what this module's head describes, without `time`."""
        if not self.active:
            return
        with disk_errors(self.path):
            self.file.write(json.dumps(record | {"start": self.start, "time": time.time()}) + "\n")
            self.file.flush()
        if self.writer is not None:
            for name, value in flatten(record).items():
                self.writer.add_scalar(name, value, record["step"])
        said = summary(record)
        if self.bar is not None:
            self.bar.update(self.task, said=said)
        else:
            log.info("%s: step %d/%d, %s", self.title, record["step"], self.steps, said)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.writer is not None:
            self.writer.close()
        if self.active:
            self.file.close()


def summary(record: dict[str, Any]) -> str:
    """A line of the log for a reader: losses, speed, waiting, what is left."""
    if record["loss"] is None:
        return f"every one of {record['skipped']} steps was skipped, none being finite"
    parts = ", ".join(f"{name} {value:.3f}" for name, value in record["losses"].items())
    return (
        f"loss {record['loss']:.3f} ({parts}), grad norm {record['grad_norm']:.2f}, "
        f"{record['clips_per_s']:.1f} clips/s, waiting for data {record['data_wait']:.0%}, "
        f"{clock(record['eta_s'])} left"
    )


def clock(seconds: float) -> str:
    """4000.0 as 1:06:40, 65.0 as 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def flatten(record: dict[str, Any]) -> dict[str, float]:
    """Numbers of a record under one name each: `losses/alignment`, `lr/muon`, `grad_norm`."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{inner}": number for inner, number in value.items()}
        elif isinstance(value, (int, float)) and name != "step":
            flat[name] = value
    return flat


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl; a last line that a crash cut short is left out."""
    path = folder / "log.jsonl"
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def drop_after(path: Path, step: int) -> None:
    """Remove the lines of steps beyond `step`, which a resumed run takes again."""
    if path.is_file():
        kept = [record for record in read_log(path.parent) if record["step"] <= step]
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
