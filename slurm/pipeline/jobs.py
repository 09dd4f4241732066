"""The jobs of a submitted pipeline: where they are, why one did not start, and their end."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from configs.errors import UserError
from slurm.history import last_error, read_history
from slurm.pipeline.chain import Chain, Task, resolve
from slurm.pipeline.config import load_pipeline
from slurm.pipeline.folder import RESOLVED, PipelineFolder
from slurm.status import cancel, progress, state_of
from slurm.submit import Record, in_queue, read_record


def is_chain(folder: Path) -> bool:
    """Whether a folder is that of a pipeline."""
    return (folder / RESOLVED).is_file()


def submission(task: Task, folder: PipelineFolder) -> Record | None:
    """What was submitted for a step, None where it was not, or where it ran here since."""
    for part in task.parts:
        record = folder.read(part)
        if record is not None and record.state == "submitted" and record.finished is not None:
            return read_record(Path(record.finished).parents[1])
    return None


def refuse_queued(chain: Chain, folder: PipelineFolder) -> None:
    """Raise UserError while a job of an earlier submission waits or runs."""
    for task in chain.tasks.values():
        record = submission(task, folder)
        if record is None or all(folder.is_done(part) for part in task.parts):
            continue
        waiting = in_queue(record.ids)
        if waiting:
            raise UserError(
                f"The step '{task.name}' is in the queue already (job {', '.join(sorted(waiting))}).",
                f"Look with `videomamba status {folder.path}`, or end all with `videomamba cancel {folder.path}`.",
            )


def describe_chain(path: Path) -> tuple[Table, list[str]]:
    """A row for every step of the pipeline in `path`, and the last errors of those that have one."""
    chain, folder = resolve(load_pipeline(path / RESOLVED)), PipelineFolder(path)
    table = Table("step", "state", "job", "restarts", "progress")
    errors: list[str] = []
    done: set[str] = set()
    for name, task in chain.tasks.items():
        record = submission(task, folder)
        if record is None:
            state, row = _here(task, folder)
        else:
            state = _state(task, record, done)
            row = [", ".join(record.ids), str(_restarts(record)), _progress(record)]
            errors += [f"{name}: {line}" for line in _errors(record)]
        if state.startswith("done"):
            done.add(name)
        table.add_row(name, state, *row)
    return table, errors


def cancel_chain(path: Path, now: bool) -> list[str]:
    """End every job of the pipeline in `path`, those that wait for others first; a line for each.

    Raises UserError if none is in the queue.
    """
    chain, folder = resolve(load_pipeline(path / RESOLVED)), PipelineFolder(path)
    lines: list[str] = []
    for name in reversed(chain.tasks):
        record = submission(chain.tasks[name], folder)
        if record is not None and in_queue(record.ids):
            lines += [f"{name}: {line}" for line in cancel(record.job.run, now)]
    if not lines:
        raise UserError(f"{path} has no job in the queue.", f"See `videomamba status {path}`.")
    return lines


def _here(task: Task, folder: PipelineFolder) -> tuple[str, list[str]]:
    """State and row of a step that was not submitted, from the records of its parts."""
    records = [record for part in task.parts if (record := folder.read(part)) is not None]
    done = sum(record.state == "done" for record in records)
    row = ["", "", f"{done} of {len(task.parts)} parts" if task.array else ""]
    if done == len(task.parts):
        return "done here", row
    for record in records:
        if record.state == "running":
            return "running here, or killed", row
        if record.state != "done":
            return f"{record.state} here (exit code {record.exit_code})", row
    return "not run", row


def _state(task: Task, record: Record, done: set[str]) -> str:
    """What became of a step's job; where it left the queue without having started, why."""
    state = state_of(record)
    missing = [need for need in task.needs if need not in done]
    if state.startswith("gone") and missing and not any(_attempts(record)):
        return f"did not start: {', '.join(missing)} did not succeed"
    return state


def _attempts(record: Record) -> Iterator[int]:
    """The attempts of a job, or of each element of an array."""
    for part in _elements(record):
        yield len(read_history(record.job.work, part).attempts)


def _elements(record: Record) -> list[str]:
    return [""] if record.job.array is None else [f"{number}-" for number in range(record.job.array)]


def _restarts(record: Record) -> int:
    return sum(max(0, attempts - 1) for attempts in _attempts(record))


def _progress(record: Record) -> str:
    if record.job.array is None:
        return progress(record.job.run)
    finished = sum((record.job.work / f"{part}finished").exists() for part in _elements(record))
    return f"{finished} of {record.job.array} parts"


def _errors(record: Record) -> list[str]:
    """The last error of a job that is not done, each element's of an array."""
    lines: list[str] = []
    for part in _elements(record):
        history = read_history(record.job.work, part)
        if not (record.job.work / f"{part}finished").exists():
            lines += last_error(record.job.work, history, part)
    return lines
