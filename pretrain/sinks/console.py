"""The console: one bar on a terminal, plain lines elsewhere."""

import logging
import sys
from typing import Any

from pretrain.sinks import Line

log = logging.getLogger(__name__)


class Console:
    """Says on stderr how the run `title` stands; on a terminal in one bar, that stays below other messages."""

    def __init__(self, title: str, start: int, steps: int) -> None:
        self.title, self.steps = title, steps
        self.said = self.found = ""
        self.bar: Any = None
        if sys.stderr.isatty():
            self._start_bar(start)

    def _start_bar(self, start: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[said]}"), console=Console(stderr=True))
        self.task = self.bar.add_task(self.title, total=self.steps, completed=start, said="")
        self.bar.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def write(self, line: Line) -> None:
        """Say a line in words; the bar keeps the last evaluation beside the last steps."""
        if "evaluation" in line:
            said = self.found = evaluation_summary(line)
        else:
            said = self.said = summary(line)
        if self.bar is not None:
            self.bar.update(self.task, said="; ".join(part for part in (self.said, self.found) if part))
        else:
            log.info("%s: step %d/%d, %s", self.title, line["step"], self.steps, said)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.stop()


def summary(line: Line) -> str:
    """A line of steps for a reader: losses, speed, waiting, what is left."""
    if line["loss"] is None:
        return f"every one of {line['skipped']} steps was skipped, none being finite"
    parts = ", ".join(f"{name} {value:.3f}" for name, value in line["losses"].items())
    used = f", MFU {line['mfu']:.0%}" if line.get("mfu") is not None else ""
    return (
        f"loss {line['loss']:.3f} ({parts}), grad norm {line['grad_norm']:.2f}, "
        f"{line['clips_per_s']:.1f} clips/s{used}, waiting for data {line['data_wait']:.0%}, "
        f"{clock(line['eta_s'])} left"
    )


def evaluation_summary(line: Line) -> str:
    """An evaluation for a reader: recalls at 1, 5 and 10 of both ways."""
    found = line["evaluation"]
    shown = [f"{name.replace('_', ' ')} {value:.1f}" for name, value in found.items() if name.endswith(("R@1", "R@10"))]
    return f"zero-shot {', '.join(shown)}"


def clock(seconds: float) -> str:
    """4000.0 as 1:06:40, 65.0 as 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
