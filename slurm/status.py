"""What became of a submission: Slurm's word where it still has one, and the attempts that the script wrote down."""

import subprocess
import time
from collections import Counter
from pathlib import Path

from configs.errors import UserError
from configs.loader import read_tree
from slurm.history import Attempt, last_error, read_history
from slurm.submit import Record, in_queue, read_record, slurm_says

ENDINGS = {
    "done": "the work is done",
    "stopped": "stopped when asked (time limit, preemption or cancel)",
    "hung": "did not stop when asked, and was ended",
    "cut": "was asked to stop, and killed before it had saved",
    "lost": "was lost: its node failed, or all of it was killed",
    "failed": "failed",
}
VERDICTS = {
    "no_progress": "given up: two restarts failed without progress",
    "max_restarts": "given up: no restarts left",
    "refused": "given up: a wrong request, which another attempt would not mend",
    "no_requeue": "given up: scontrol requeue failed",
    "cancelled": "cancelled",
}


def describe(run: Path) -> list[str]:
    """The lines of `videomamba status RUN`. Raises UserError if the run was never submitted."""
    record = require_record(run)
    work = record.job.work
    lines = [f"{run}: {headline(record)}"]
    if record.job.array is not None:
        return lines + _array_lines(work, record.job.array)
    history = read_history(work)
    lines += [_attempt_line(attempt) for attempt in history.attempts]
    return lines + last_error(work, history)


def require_record(run: Path) -> Record:
    """The record of the run's last submission; UserError if there is none."""
    record = read_record(run)
    if record is None:
        raise UserError(f"{run} was not submitted from here.", "Give the run folder (out=) of a submitted run.")
    return record


def headline(record: Record) -> str:
    """The run in one line: its state, its jobs, its progress, its restarts."""
    history = read_history(record.job.work)
    state = state_of(record)
    words = [state]
    if record.job.array is None:
        words.append(progress(record.job.run))
        words.append(f"{len(history.attempts) - 1} restart(s)" if len(history.attempts) > 1 else "")
    code = record.code.commit if record.code is not None else None
    words.append(f"job {', '.join(record.ids)}" + (f", code {code[:10]}" if code else ""))
    return "; ".join(word for word in words if word)


def state_of(record: Record) -> str:
    """done, given up (why), or what Slurm says of it; `gone` is neither in the queue nor ended by the script."""
    work = record.job.work
    parts = [""] if record.job.array is None else [f"{number}-" for number in range(record.job.array)]
    done = record.job.done or record.job.run / "done.json"
    if done.exists() or all((work / f"{part}finished").exists() for part in parts):
        return "done"
    try:
        queued = Counter(in_queue(record.ids).values())
    except UserError as error:
        return f"not finished ({error.cause})"
    if queued:
        counted = ", ".join(state.lower() if n == 1 else f"{n} {state.lower()}" for state, n in queued.items())
        ids = ",".join(record.ids)
        reasons = slurm_says("squeue", "--me", "--noheader", f"--jobs={ids}", "--format=%r").splitlines()
        why = {reason for reason in reasons if reason != "None"}
        return counted + (f" ({', '.join(sorted(why))})" if why else "")
    verdicts = {history.verdict for part in parts if (history := read_history(work, part)).verdict}
    if verdicts:
        return "; ".join(sorted(VERDICTS[verdict] for verdict in verdicts))
    started = any(read_history(work, part).attempts for part in parts)
    return "gone from the queue" + ("" if started else " before it started (cancelled, or what it waited for failed)")


def progress(run: Path) -> str:
    """The step that is kept, of how many, and how far the log is; empty where the run has neither."""
    pointer, config = run / "checkpoints" / "latest", run / "config.yaml"
    total = read_tree(config).get("steps") if config.is_file() else None
    if not pointer.is_file():
        return "no checkpoint yet" if total else ""
    kept = int(pointer.read_text().strip().rpartition("-")[2])
    return f"step {kept}" + (f" of {total}" if total else "") + " kept"


def _attempt_line(attempt: Attempt) -> str:
    began = time.strftime("%m-%d %H:%M", time.localtime(attempt.started))
    ending = "no end so far" if attempt.reason is None else ENDINGS.get(attempt.reason, attempt.reason)
    reached = "" if attempt.step is None else f" to {attempt.step}"
    return f"  attempt {attempt.number}, {began}, {attempt.nodes}: step {attempt.began}{reached}; {ending}"


def _array_lines(work: Path, size: int) -> list[str]:
    lines = []
    for number in range(size):
        part = f"{number}-"
        history = read_history(work, part)
        last = history.attempts[-1] if history.attempts else None
        if (work / f"{part}finished").exists():
            continue
        lines.append(f"  element {number}: " + ("not started" if last is None else _attempt_line(last).strip()))
        lines += [f"  {line}" for line in last_error(work, history, part)]
    return [f"  {size - sum(line.startswith('  element') for line in lines)} of {size} elements are done", *lines]


def cancel(run: Path, now: bool = False) -> list[str]:
    """End a run's jobs; what runs saves first, unless `now`. Returns what was done, a line each.

    Raises UserError if the run was never submitted or nothing of it is left to end.
    """
    record = require_record(run)
    queued = in_queue(record.ids)
    if not queued:
        raise UserError(f"{run} has no job in the queue.", f"See `videomamba status {run}`.")
    work = record.job.work
    (work / "cancelled").touch()  # the script does not go on after this
    if now:
        slurm_says("scancel", *record.ids)
        return [f"job {', '.join(queued)} is cancelled; the last checkpoint stands"]
    subprocess.run(["scancel", "--state=PENDING", *record.ids], check=True)
    lines = [f"job {name} is cancelled" for name, state in queued.items() if state == "PENDING"]
    for name, state in queued.items():
        if state != "PENDING":
            part = f"{name.partition('_')[2]}-" if record.job.array is not None else ""
            (work / f"{part}stop").touch()
            lines.append(f"job {name} saves and stops (at once: --now)")
    return lines
