"""Hand a job to sbatch and remember it: RUN/slurm/ holds all that a submission made.

job.sbatch      the script          job.json      what was submitted, and under which ids (Record)
code/           the packages        config.yaml   the resolved config, where the job has one
attempts.tsv    a line as each attempt starts and ends, written by the script
logs/           JOB.out, and for each attempt rank0.log, rank1.log, ... and srun.log

A later submission of the same run moves the folder to slurm.1, slurm.2, ...
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from configs.errors import UserError
from configs.files import write_json
from configs.loader import Frozen, validate
from slurm.cluster import ClusterProfile
from slurm.job import Job
from slurm.render import after, max_restarts, render
from slurm.snapshot import CodeVersion

NO_SLURM = "Run this where Slurm's commands are (a login node); `--dry-run` shows the script without them."


class Record(Frozen):
    """job.json: what was submitted, and the ids it got; several where a chain stands in for requeueing."""

    ids: tuple[str, ...]
    job: Job
    cluster: ClusterProfile
    code: CodeVersion | None = None
    submitted: str

    @property
    def last(self) -> str:
        """The id that a dependant waits for."""
        return self.ids[-1]


def slurm_says(*command: str) -> str:
    """What one of Slurm's commands prints. Raises UserError with its own words where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not on PATH.", NO_SLURM, exit_code=1) from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).replace(f"{command[0]}: error: ", "").split())
        cause = f"{command[0]} says: {said}."
        raise UserError(cause, "Mend the cluster's YAML, or what is asked of it.", exit_code=1)
    return done.stdout


def read_record(run: Path) -> Record | None:
    """The record of the run's last submission; None if there was none."""
    path = run / "slurm" / "job.json"
    return validate(json.loads(path.read_text()), Record, str(path)) if path.is_file() else None


def prepare(run: Path) -> Path:
    """The new, empty folder RUN/slurm; an earlier one is moved aside.

    Raises UserError while a job of the earlier submission is in the queue or running.
    """
    work, record = run / "slurm", read_record(run)
    if record is not None:
        waiting = in_queue(record.ids)
        if waiting:
            raise UserError(
                f"{run} is in the queue already (job {', '.join(sorted(waiting))}).",
                f"Look with `videomamba status {run}`, or end it with `videomamba cancel {run}`.",
            )
        number = 1 + max((int(old.suffix[1:]) for old in run.glob("slurm.*") if old.suffix[1:].isdigit()), default=0)
        work.rename(run / f"slurm.{number}")
    elif work.is_dir():  # sbatch refused it
        shutil.rmtree(work)
    (work / "logs").mkdir(parents=True)
    return work


def in_queue(ids: Sequence[str]) -> dict[str, str]:
    """State by job id of those of `ids` that wait or run; elements of an array are told apart by `_`."""
    wanted = set(ids)
    lines = slurm_says("squeue", "--me", "--noheader", "--format=%F %i %T").splitlines()
    return {name: state for base, name, state in map(str.split, lines) if base in wanted}


def submit(job: Job, cluster: ClusterProfile, code: CodeVersion | None = None) -> str:
    """Submit `job`, whose RUN/slurm was made by `prepare`; returns the job id that a dependant waits for.

    On a cluster without the right to requeue, a chain of 1 + max_restarts jobs is submitted, one of which runs at
    a time. Raises UserError in sbatch's words where it refuses; nothing is left in the queue then.
    """
    script = job.work / "job.sbatch"
    script.write_text(render(job, cluster), encoding="utf-8")
    script.chmod(0o755)
    ids: list[str] = []
    try:
        for _ in range(1 if cluster.requeue else 1 + max_restarts(job, cluster)):
            ids.append(_sbatch(job, script, ids))
    except UserError:
        if ids:
            slurm_says("scancel", *ids)
        raise
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = Record(ids=tuple(ids), job=job, cluster=cluster, code=code, submitted=now)
    write_json(job.work / "job.json", record.model_dump(mode="json"))
    return record.last


def _sbatch(job: Job, script: Path, before: Sequence[str]) -> str:
    """Submit the script; elements of an array share its name, so there a chain waits for the array before."""
    options = []
    if job.array is not None and before:
        options = [f"--dependency={','.join([*after(job), f'afterany:{before[-1]}'])}"]
    said = slurm_says("sbatch", "--parsable", *options, str(script))
    return said.strip().partition(";")[0]


def test_only(script: str) -> str:
    """What the cluster says of a script, without taking it: when it would start. Raises UserError if it refuses."""
    try:
        done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("sbatch is not on PATH.", NO_SLURM, exit_code=1) from error
    said = " ".join(done.stderr.split())
    if done.returncode:
        raise UserError(f"sbatch would refuse this: {said}.", "Mend the cluster's YAML.", exit_code=1)
    return said
