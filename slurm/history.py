"""The attempts of a job as its script wrote them down, and the last error that they left."""

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
    rank = failing_rank(_lines(logs / "srun.log"))
    shown = _lines(logs / ("srun.log" if rank is None else f"rank{rank}.log"))[-TAIL:]
    who = "the step" if rank is None else f"rank {rank}"
    return [f"last error: {who} in attempt {last.number}, exit code {last.code}", *(f"  {line}" for line in shown)]


def failing_rank(said: Sequence[str]) -> int | None:
    """The first rank that srun says left with a code or by a signal of its own; those it ended are named later."""
    for line in said:
        if found := re.search(r"\btasks? (\d+)[\d,-]*: (?!.*Terminated$)", line):
            return int(found[1])
    return None


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []
