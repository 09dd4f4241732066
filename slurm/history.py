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
    failure = first_failure(_lines(logs / "srun.log"))
    shown = _lines(logs / ("srun.log" if failure is None else f"rank{failure[0]}.log"))[-TAIL:]
    who = f"exit code {last.code}" if failure is None else f"rank {failure[0]}, {failure[1]}"
    return [f"last error, in attempt {last.number}: {who}", *(f"  {line}" for line in shown)]


def first_failure(said: Sequence[str]) -> tuple[int, str] | None:
    """The rank that srun says failed first, and how it ended; ranks that srun itself ended are named after it."""
    for line in said:
        found = re.search(r"\btasks? (\d+)[\d,-]*: (.+)", line)
        if found and found[2] != "Terminated":
            return int(found[1]), found[2]
    return None


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []
