"""Run a chain on this machine: parts whose needs are done, one after the other or several at once.

A step's output goes to its log and, as it comes, to the screen. Ctrl-C and TERM are passed on to what runs; the runner
leaves when that has left, and starts nothing more. The same call goes on from there.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape

from slurm.pipeline.chain import Chain, Part, Task
from slurm.pipeline.folder import PipelineFolder, Record
from slurm.pipeline.plan import Plan
from slurm.pipeline.process import Running

LOOK_EVERY = 0.2  # seconds between two looks at what runs
TAIL_LINES = 12


@dataclass
class Outcome:
    """How a run ended: the part that failed first, if one did, and the signal that stopped it, if one came."""

    failed: tuple[Part, Record] | None = None
    signal: int | None = None


@dataclass
class _Active:
    running: Running
    shown: int
    """How much of the log is on the screen already, in bytes."""


@dataclass
class Runner:
    """Runs a plan, at most `jobs` parts at once."""

    chain: Chain
    folder: PipelineFolder
    console: Console
    jobs: int = 1
    _active: dict[Part, _Active] = field(default_factory=dict)
    _outcome: Outcome = field(default_factory=Outcome)

    def run(self, plan: Plan) -> Outcome:
        """Run every part of the plan, or as far as it gets."""
        waiting = [part for parts in plan.parts.values() for part in parts]
        left = {name: len(parts) for name, parts in plan.parts.items()}
        began: set[str] = set()
        with self._signals():
            while (waiting and not self._leaving) or self._active:
                for part in [part for part in waiting if self._ready(part, left)]:
                    if len(self._active) < self.jobs and not self._leaving:
                        waiting.remove(part)
                        self._announce(self.chain.tasks[part.step], plan, began)
                        self._start(part)
                time.sleep(LOOK_EVERY)
                for part in list(self._active):
                    if self._look(part):
                        left[part.step] -= 1
        return self._outcome

    @property
    def _leaving(self) -> bool:
        return self._outcome.failed is not None or self._outcome.signal is not None

    @property
    def _passed_on(self) -> int:
        """The signal that steps get: a closed terminal is a TERM to them, on which they save."""
        return signal.SIGINT if self._outcome.signal == signal.SIGINT else signal.SIGTERM

    def _ready(self, part: Part, left: dict[str, int]) -> bool:
        return not any(left.get(need) for need in self.chain.tasks[part.step].needs)

    def _announce(self, task: Task, plan: Plan, began: set[str]) -> None:
        if task.name in began:
            return
        began.add(task.name)
        number = list(self.chain.tasks).index(task.name) + 1
        parts = f" ({len(plan.parts[task.name])} of {len(task.parts)} parts)" if task.array else ""
        self.console.rule(f"[bold]{number}/{len(self.chain.tasks)} {escape(task.title)}[/]{parts}", align="left")

    def _start(self, part: Part) -> None:
        ranks = self.chain.tasks[part.step].ranks
        environment = {"COLUMNS": str(self.console.width)}
        if self.jobs > 1:  # or each of them would start a thread for every core
            environment["OMP_NUM_THREADS"] = os.environ.get(
                "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.jobs))
            )
        log = self.folder.log(part)
        shown = log.stat().st_size if log.exists() else 0
        more = ["--ranks", str(ranks)] if ranks > 1 else []
        running = Running(self.folder.begin(part), more, log, environment)
        self._active[part] = _Active(running, shown)
        if self._outcome.signal is not None:  # it came just now, and has passed this part by
            running.send(self._passed_on)

    def _look(self, part: Part) -> bool:
        """Show what a part has said; if it has ended, remember how. True where its work is done."""
        active = self._active[part]
        record = active.running.poll()
        active.shown = self._show(active.running.log, active.shown, part, record is not None)
        if record is None:
            return False
        del self._active[part]
        self.folder.write(part, record)
        if record.state == "done":
            told = f"took {record.seconds:.0f} s, peak memory {record.peak_bytes / 2**30:.1f} GiB"
            self.console.print(f"{part.name}: {told}" if part.count > 1 else told, highlight=False)
        elif self._outcome.failed is None:
            self._outcome.failed = (part, record)
        return record.state == "done"

    def _show(self, log: Path, shown: int, part: Part, ended: bool) -> int:
        """Copy what a log has gained since `shown` to the screen; returns the new place."""
        with log.open("rb") as file:
            file.seek(shown)
            gained = file.read()
        if self.jobs > 1:  # several write at once: whole lines only, each with its part's name
            gained = gained if ended else gained[: gained.rfind(b"\n") + 1]
            name = f"{part.name}: ".encode()
            text = b"".join(name + line.rstrip(b"\n") + b"\n" for line in gained.splitlines(keepends=True))
        else:
            text = gained
        sys.stdout.flush()
        sys.stdout.buffer.write(text)
        sys.stdout.flush()
        return shown + len(gained)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass Ctrl-C, TERM and a closed terminal on to what runs; a second one ends it at once."""

        def forward(number: int, _: FrameType | None) -> None:
            again = self._outcome.signal is not None
            self._outcome.signal = self._outcome.signal or number
            for active in self._active.values():
                active.running.send(signal.SIGKILL if again else self._passed_on)

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 64 * 1024))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
