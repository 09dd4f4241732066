"""The folder of a pipeline: its resolved file, a record and a log for every part, and a lock.

pipeline.yaml     the pipeline as it was run last, with what was given on the command line; `run` takes it again
steps/NAME.json   a record: the command lines, the state, seconds, peak memory, or the job on a cluster
logs/NAME.log     what the part said, of all its runs
.lock             held while a runner is at work here; the system lets go of it when that dies
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from configs.errors import UserError
from configs.files import lock_folder, write_json, write_whole
from configs.loader import to_yaml
from slurm.pipeline.chain import Chain, Part, Task
from slurm.pipeline.config import Pipeline

RESOLVED = "pipeline.yaml"

State = Literal["done", "running", "submitted", "failed", "unfinished", "stopped"]


@dataclass
class Record:
    """What became of a part: its `seconds`, over all runs that it took, and `peak_bytes` of its processes together.

    `unfinished` has left in good order before its work was done, as a run does that was asked to stop; `stopped` was
    ended by the runner. `job` is the job's number on a cluster, `finished` the file that it leaves when all went well.
    """

    commands: list[list[str]]
    state: State
    began: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    exit_code: int | None = None
    job: str | None = None
    finished: str | None = None


class PipelineFolder:
    """The folder of a pipeline; as a context it is locked, so that two runners do not meet in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        self._lock = lock_folder(self.path)
        if self._lock is None:
            raise UserError(
                f"Another `videomamba run` or `submit` is at work in {self.path}.",
                "Wait for it, stop it, or give another folder=.",
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def keep(self, pipeline: Pipeline) -> None:
        """Write the resolved pipeline."""
        write_whole(self.path / RESOLVED, to_yaml(pipeline).encode())

    def read(self, part: Part) -> Record | None:
        """The record of a part, None where there is none."""
        path = self.path / "steps" / f"{part.name}.json"
        try:
            return Record(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is no record of a step.", "Remove it: the step is then asked itself.") from error

    def write(self, part: Part, record: Record) -> None:
        """Write the record of a part, whole or not at all."""
        write_json(self.path / "steps" / f"{part.name}.json", asdict(record))

    def begin(self, part: Part) -> Record:
        """A record for a run that starts now; it goes on with that of a run of the same work that did not end well."""
        before, now = self.read(part), datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(as_lists(part.commands), "running", now)
        if before is not None and before.state != "done" and before.commands == record.commands:
            record.began, record.seconds, record.peak_bytes = before.began, before.seconds, before.peak_bytes
        self.write(part, record)
        return record

    def log(self, part: Part) -> Path:
        """Where a part's output goes."""
        return self.path / "logs" / f"{part.name}.log"

    def is_done(self, part: Part) -> bool:
        """Whether the work of a part is finished: its proof is there, and it was not made by other command lines.

        Without a proof of its own, the record of a run that left with 0 is one.
        """
        record = self.read(part)
        if record is not None and record.commands != as_lists(part.commands):
            return False
        if part.done is not None:
            return part.done.exists()
        return record is not None and (record.state == "done" or _left(record.finished))


def _left(marker: str | None) -> bool:
    return marker is not None and Path(marker).exists()


def as_lists(commands: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    """Command lines in the form in which JSON gives them back."""
    return [list(command) for command in commands]


def finished(chain: Chain, folder: PipelineFolder) -> set[str]:
    """The steps whose every part is done, and those that a finished step has gone on from."""
    done = {name for name, task in chain.tasks.items() if all(folder.is_done(part) for part in task.parts)}
    for name in reversed(chain.tasks):  # a step comes after what it continues
        before = chain.tasks[name].continues
        if name in done and before in chain.tasks:
            done.add(before)
    return done


def took(task: Task, folder: PipelineFolder) -> tuple[float, int]:
    """Seconds of a step, its parts added up, and the largest peak of memory among them, in bytes."""
    records = [record for part in task.parts if (record := folder.read(part)) is not None]
    return sum(record.seconds for record in records), max((record.peak_bytes for record in records), default=0)
