"""A part of a step as processes of this machine: its command lines in turn, into one log, until the work is done."""

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from configs.files import disk_errors
from configs.processes import TreeMemory, die_with_parent
from slurm.pipeline.folder import Record, State

UNFINISHED = "VIDEOMAMBA_UNFINISHED_FILE"
"""The environment variable that names the file by which a command says that it left before its work was done."""


class Running:
    """A part that runs. `poll` starts the next command when one has ended, and gives the record at the end."""

    def __init__(self, record: Record, more: list[str], log: Path, environment: dict[str, str]) -> None:
        """Start the first of the record's commands, `more` behind each; `environment` is added to this process's own.

        Seconds and peak of memory are added to what the record has of earlier runs.
        """
        self.record = record
        self.log = log
        self._waiting = [[*command, *more] for command in record.commands]
        self._environment = environment
        self._unfinished = log.with_suffix(".unfinished")
        self._stopped: int | None = None
        self._began = time.monotonic()
        with disk_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = log.open("ab")
        self._unfinished.unlink(missing_ok=True)
        self._start()

    def poll(self) -> Record | None:
        """The record when the part has ended, None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        self._memory.stop()
        self.record.peak_bytes = max(self.record.peak_bytes, self._memory.peak)
        left_early = self._unfinished.exists()
        if code == 0 and self._waiting and not left_early and self._stopped is None:
            self._start()
            return None
        self._file.close()
        self._unfinished.unlink(missing_ok=True)
        self.record.seconds = round(self.record.seconds + time.monotonic() - self._began, 2)
        self.record.exit_code = code if code >= 0 else 128 - code
        self.record.state = self._verdict(code, left_early)
        return self.record

    def send(self, number: int) -> None:
        """Pass a signal on: Ctrl-C to the whole group, as a terminal does, others to the command itself."""
        self._stopped = number
        with suppress(ProcessLookupError):
            if number in (signal.SIGINT, signal.SIGKILL):
                os.killpg(self._process.pid, number)
            else:
                os.kill(self._process.pid, number)

    def _start(self) -> None:
        command = self._waiting.pop(0)
        self._file.write(f"$ videomamba {shlex.join(command)}\n".encode())
        self._file.flush()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "videomamba", *command],
            stdin=subprocess.DEVNULL,  # so that a launcher of ranks does not leave a Ctrl-C to the terminal
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self._environment, UNFINISHED: str(self._unfinished)},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self._memory = TreeMemory(self._process.pid)
        self._memory.start()

    def _verdict(self, code: int, left_early: bool) -> State:
        if self._stopped is not None and (code != 0 or self._waiting):
            return "stopped"
        if code != 0:
            return "failed"
        return "unfinished" if left_early else "done"
