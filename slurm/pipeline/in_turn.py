"""`python -P -m slurm.pipeline.in_turn FILE NUMBER`: the command lines of one part of a step, inside a job.

FILE is a JSON list with a list of command lines for every element of an array. The last one takes this process's
place, so that nothing stands between it and Slurm; a command that fails ends the part with its exit code.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn


def main(file: str, number: str) -> NoReturn:
    """Run the command lines; leaves with the exit code of the first that fails."""
    commands: list[list[str]] = json.loads(Path(file).read_text())[int(number)]
    for command in commands[:-1]:
        code = _run(command)
        if code:
            sys.exit(code)
    sys.stdout.flush()
    os.execv(sys.executable, _python(commands[-1]))


def _python(command: list[str]) -> list[str]:
    return [sys.executable, "-P", "-m", "videomamba", *command]


def _run(command: list[str]) -> int:
    """The exit code of a command; TERM is passed on to it."""
    process = subprocess.Popen(_python(command))

    def forward(number: int, _: FrameType | None) -> None:
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main(*sys.argv[1:])
