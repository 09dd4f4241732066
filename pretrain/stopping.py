"""How a run is asked to stop, and how it says that it has not finished. No torch here.

SIGTERM, SIGUSR2    from Slurm or a person: every rank saves at the next step's edge and leaves with 0
<out>/stop          a file that somebody puts into the run folder: the same; the run removes it when it has obeyed
$VIDEOMAMBA_STOP_FILE    the path of such a file elsewhere: the same, but whoever set the variable removes the file,
                    for one file may stop several runs, and a script around them has to see it too
SIGINT (Ctrl-C)     the same, and the exit code is 130; a second one stops at once, without saving

A run that leaves with 0 before its last step writes the file that $VIDEOMAMBA_UNFINISHED_FILE names: that is how a
script knows that the same command has to be given again. `<out>/done.json` says that it need not be.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.files import disk_errors, write_whole

STOP_FILE, UNFINISHED_FILE = "VIDEOMAMBA_STOP_FILE", "VIDEOMAMBA_UNFINISHED_FILE"
POLITE = (signal.SIGTERM, signal.SIGUSR2)
"""Signals that ask for a save and an exit code of 0."""

ECHO = 2.0
"""One Ctrl-C may come twice, from the terminal to its whole process group and from the launcher, which passes it on:
what comes within so many seconds of the first is the first."""


class Signals:
    """The signals that this process got so far; a rank alone knows them until the step's edge, where all agree."""

    def __init__(self) -> None:
        self.polite = self.interrupted = False
        self._first = 0.0

    def take(self, number: int, _: Any) -> None:
        """Handle one signal. A Ctrl-C after the first raises KeyboardInterrupt; a save is never cut by the others."""
        if number != signal.SIGINT:
            self.polite = True
        elif not self.interrupted:
            self.interrupted, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > ECHO:
            raise KeyboardInterrupt


@contextmanager
def listening() -> Iterator[Signals]:
    """Collect the signals of this process instead of dying of them; `launch` starts ranks that hold them back."""
    heard = Signals()
    previous = {number: signal.signal(number, heard.take) for number in (*POLITE, signal.SIGINT)}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, POLITE)
    try:
        yield heard
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequests:
    """What this rank knows of wishes to stop: its own signals and, on rank 0, the stop-files."""

    def __init__(self, heard: Signals, folder: Path, first: bool) -> None:
        self.heard, self.own = heard, folder / "stop"
        elsewhere = os.environ.get(STOP_FILE)
        self.files = [self.own, *([Path(elsewhere)] if elsewhere else [])] if first else []

    def told(self) -> dict[str, float]:
        """Numbers to be summed over ranks: above 0, all ranks stop (`stop`), by a Ctrl-C (`interrupt`)."""
        file = any(path.exists() for path in self.files)
        return {"stop": float(self.heard.polite or file), "interrupt": float(self.heard.interrupted)}

    def obeyed(self) -> None:
        """Remove the run's own stop-file, so that the next start goes on; on rank 0, after the checkpoint is whole."""
        with disk_errors(self.own):
            self.own.unlink(missing_ok=True)


def tell_unfinished(out: Path, step: int, steps: int) -> None:
    """Write the file that $VIDEOMAMBA_UNFINISHED_FILE names, if it names one: of `steps`, `step` were taken."""
    if path := os.environ.get(UNFINISHED_FILE):
        with disk_errors(Path(path)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(path), json.dumps({"out": str(out), "step": step, "steps": steps}).encode())


def forget_unfinished() -> None:
    """Remove what an earlier start left under $VIDEOMAMBA_UNFINISHED_FILE: it speaks of the last start alone."""
    if unfinished := os.environ.get(UNFINISHED_FILE):
        with disk_errors(Path(unfinished)):
            Path(unfinished).unlink(missing_ok=True)
