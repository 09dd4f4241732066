"""The attempts of a job as its script wrote them down, and the last error that they left."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FAILURES = ("failed", "hung", "lost")
TAIL = 20


class Attempt(NamedTuple):
    """One start of the ranks: where it ran, the step it began at and the step it left, and how it ended."""

    number: int
    job: str
    nodes: str
    began: int
    started: int
    step: int | None = None
    code: int | None = None
    reason: str | None = None


class History(NamedTuple):
    """The attempts of a job (or of one element of an array), and why it was given up, if it was."""

    attempts: list[Attempt]
    verdict: str | None = None


def read_history(work: Path, part: str = "") -> History:
    """What the script wrote into attempts.tsv; `part` is `0-`, `1-`, ... for the elements of an array."""
    path = work / f"{part}attempts.tsv"
    attempts: dict[int, Attempt] = {}
    verdict = None
    for line in path.read_text().splitlines() if path.is_file() else []:
        event, number, when, job, step, _, code, reason, nodes = line.split("\t")
        if event == "start":
            attempts[int(number)] = Attempt(int(number), job, nodes, int(step), int(when))
        elif event == "end":
            attempts[int(number)] = attempts[int(number)]._replace(step=int(step), code=int(code), reason=reason)
        else:
            verdict = reason
    return History(list(attempts.values()), verdict)


def last_error(work: Path, history: History, part: str = "") -> list[str]:
    """The last lines of the rank that failed first in the last failed attempt, headed by which it was."""
    failed = [one for one in history.attempts if one.reason in FAILURES]
    if not failed:
        return []
    last = failed[-1]
    logs = work / "logs" / f"{part}{last.number}"
    failure = first_failure(_lines(logs / "srun.log"))
    if failure is None:
        shown, who = logs / "srun.log", f"exit code {last.code}"
    else:
        rank = min(failure[0], key=lambda rank: _last_word(logs / f"rank{rank}.log"))
        shown, who = logs / f"rank{rank}.log", f"rank {rank}, {failure[1]}"
    return [f"last error, in attempt {last.number}: {who}", *(f"  {line}" for line in _lines(shown)[-TAIL:])]


def first_failure(said: Sequence[str]) -> tuple[list[int], str] | None:
    """The ranks that srun says failed first, and how they ended; ranks that srun itself ended are named after them.

    Ranks of one node that fail at about the same time, one for want of the other, stand in one line.
    """
    for line in said:
        found = re.search(r"\btasks? (\d[\d,-]*): (.+)", line)
        if found and found[2] != "Terminated":
            return _numbers(found[1]), found[2]
    return None


def _numbers(named: str) -> list[int]:
    """Slurm's `0-2,5` as 0, 1, 2, 5."""
    ends = [part.partition("-")[::2] for part in named.split(",")]
    return [number for first, last in ends for number in range(int(first), int(last or first) + 1)]


def _last_word(log: Path) -> float:
    """When the file was last written; of ranks that fail together, the cause is the first to fall silent."""
    return log.stat().st_mtime if log.is_file() else math.inf


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []
