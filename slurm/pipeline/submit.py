"""`videomamba submit PIPELINE`: a pipeline as jobs of a cluster, each starting when those it needs have succeeded.

A step is a job, an array of parts one array. A training step's job belongs to its own run folder, as if it had been
submitted alone; the others have FOLDER/jobs/NAME. One copy of the packages, FOLDER/code, serves all of them.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.errors import ConfigError, UserError
from slurm.cluster import ClusterProfile
from slurm.job import PART, Job, Resources, absolute, videomamba_command
from slurm.pipeline.chain import Chain, Part, Task, resolve
from slurm.pipeline.commands import check_alone, check_commands, resolved, takes, with_config
from slurm.pipeline.config import Pipeline
from slurm.pipeline.folder import PipelineFolder, Record, as_lists, finished
from slurm.pipeline.jobs import refuse_queued
from slurm.pipeline.plan import Plan, Selection, make_plan
from slurm.render import render
from slurm.snapshot import CodeVersion, snapshot_code
from slurm.submit import prepare, read_record, slurm_says, submit, test_only

CONFIG = "config.yaml"
TRAINING = ("pretrain", "finetune")
"""Commands whose checkpoints, in the step's folder, say how far a job has come."""
CPU_ONLY = ("data",)
"""Commands that ask for no GPU, unless their step says so."""


@dataclass(frozen=True)
class Submitted:
    """A pipeline's folder, and the ids of the jobs that were submitted, by step."""

    folder: Path
    ids: dict[str, str]


@dataclass(frozen=True)
class Site:
    """What all jobs of a submission share: the cluster, the command tree, the pipeline's folder from the root."""

    cluster: ClusterProfile
    tree: Any
    folder: Path


def submit_pipeline(
    pipeline: Pipeline, tree: Any, cluster: ClusterProfile, console: Console, *, after: tuple[str, ...] = ()
) -> Submitted:
    """Submit what is not done yet. `after` are jobs that the first steps wait for.

    Raises UserError for a fault found beforehand, and where sbatch refuses a job: none is left in the queue then.
    """
    chain, site = _checked(pipeline, tree, cluster)
    with PipelineFolder(chain.folder) as folder:
        refuse_queued(chain, folder)
        plan = make_plan(chain, folder, Selection())
        _check_inputs(chain, site, folder, plan)
        folder.keep(pipeline)
        if not plan.parts:
            return Submitted(chain.folder, {})
        code = _renew_code(site.folder)
        ids: dict[str, str] = {}
        try:
            for name in plan.parts:
                task = chain.tasks[name]
                waits = tuple(ids[need] for need in task.needs if need in ids)
                ids[name] = _submit(task, plan, site, folder, waits or after, code)
                console.print(f"{name}: job {ids[name]}" + (f", after {', '.join(waits)}" if waits else ""))
        except (UserError, KeyboardInterrupt):
            _withdraw([job_folder(chain.tasks[name], site.folder) for name in ids])
            raise
    return Submitted(chain.folder, ids)


def show_jobs(pipeline: Pipeline, tree: Any, cluster: ClusterProfile, console: Console) -> None:
    """Print the script of every job that a submission would make, and what the cluster says of each."""
    chain, site = _checked(pipeline, tree, cluster)
    folder = PipelineFolder(chain.folder)
    plan = make_plan(chain, folder, Selection())
    _check_inputs(chain, site, folder, plan)
    for name in plan.skipped:
        console.print(f"# {name} is done", highlight=False)
    scripts = {
        name: render(make_job(chain.tasks[name], parts, site, ()), cluster) for name, parts in plan.parts.items()
    }
    for name, script in scripts.items():
        waits = [need for need in chain.tasks[name].needs if need in plan.parts]
        after = f", after {', '.join(waits)}" if waits else ""
        console.print(f"# ---- {name}{after} ----\n{script}", highlight=False, markup=False)
    for name, script in scripts.items():
        Console(stderr=True).print(f"{name}: {test_only(script)}", highlight=False, markup=False)


def make_job(task: Task, parts: tuple[Part, ...], site: Site, after: tuple[str, ...]) -> Job:
    """The job of a step: those of its parts that are to run."""
    run = job_folder(task, site.folder)
    (first, *others), work = parts, run / "slurm"
    command: tuple[str, ...]
    if task.array or len(first.commands) > 1:
        python = videomamba_command(site.cluster)[0]
        number = PART if others else "0"
        command = (python, "-P", "-m", "slurm.pipeline.in_turn", str(work / "commands.json"), number)
    else:
        command = videomamba_command(site.cluster, *with_config(site.tree, first.commands[0], work / CONFIG))
    proof = None if first.done is None or others or first.done.exists() else absolute(first.done)
    return Job(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", f"{site.folder.name}-{task.name}"),
        command=command,
        run=run,
        workdir=absolute(Path.cwd()),
        code=site.folder / "code",
        mounts=(site.folder,),
        resources=asked(task, site.tree),
        after=after,
        array=len(parts) if others else None,
        at_once=task.at_once if others else None,
        done=proof,
    )


def job_folder(task: Task, folder: Path) -> Path:
    """The run folder of a step's job."""
    trains = not task.array and task.continues is None and task.parts[0].commands[-1][0] in TRAINING
    return absolute(task.out) if trains else folder / "jobs" / task.name


def asked(task: Task, tree: Any) -> Resources:
    """What a step asks for: a command that knows no ranks is one process, and one of `data` needs no GPU."""
    given = task.resources.model_fields_set
    commands = [command for part in task.parts[:1] for command in part.commands]
    changes: dict[str, Any] = {}
    if not all(takes(tree, command, "ranks") for command in commands):
        if task.resources.nodes > 1 or (task.resources.tasks_per_node or 1) > 1:
            raise ConfigError(
                f"steps.{task.name}.resources asks for several tasks, but its command is one process.",
                "Ask for one node and one task; an `array` cuts a step in parts.",
            )
        changes["tasks_per_node"] = 1
    if "gpus" not in given and all(command[0] in CPU_ONLY for command in commands):
        changes["gpus"] = False
    return task.resources.model_copy(update=changes)


def _checked(pipeline: Pipeline, tree: Any, cluster: ClusterProfile) -> tuple[Chain, Site]:
    chain = resolve(pipeline)
    site = Site(cluster, tree, absolute(chain.folder))
    check_commands(chain, tree, lambda task: _ranks(asked(task, tree), cluster))
    return chain, site


def _ranks(resources: Resources, cluster: ClusterProfile) -> Iterator[int]:
    """The numbers of ranks that a job may start with."""
    least = resources.min_nodes or resources.nodes
    return (nodes * resources.tasks_on(cluster) for nodes in range(least, resources.nodes + 1))


def _check_inputs(chain: Chain, site: Site, folder: PipelineFolder, plan: Plan) -> None:
    """Ask every step whose inputs are there by `--check`, with the ranks that it will have."""
    done = finished(chain, folder)
    for name, parts in plan.parts.items():
        task = chain.tasks[name]
        if done.issuperset(task.needs):
            check_alone(task, parts[0], site.tree, max(_ranks(asked(task, site.tree), site.cluster)))


def _renew_code(folder: Path) -> CodeVersion:
    """A fresh copy of the packages in FOLDER/code; no job of an earlier one is left."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder / "code")
    return snapshot_code(folder / "code")


def _withdraw(runs: list[Path]) -> None:
    """Take the jobs of these run folders out of the queue again, each chain of singletons as a whole."""
    ids = [number for run in runs if (record := read_record(run)) is not None for number in record.ids]
    if ids:
        slurm_says("scancel", *ids)


def _submit(
    task: Task, plan: Plan, site: Site, folder: PipelineFolder, after: tuple[str, ...], code: CodeVersion
) -> str:
    """Submit a step and note it in the records of its parts; returns the job id."""
    parts = plan.parts[task.name]
    job = make_job(task, parts, site, after)
    work = prepare(job.run)
    commands = [[list(command) for command in part.commands] for part in parts]
    (work / "commands.json").write_text(json.dumps(commands, indent=1))
    config = None if task.array or len(parts[0].commands) > 1 else resolved(site.tree, parts[0].commands[0])
    if config is not None:
        (work / CONFIG).write_text(config, encoding="utf-8")
    number = submit(job, site.cluster, code)
    for index, part in enumerate(parts):
        marker = work / ("finished" if job.array is None else f"{index}-finished")
        folder.write(part, Record(as_lists(part.commands), "submitted", job=number, finished=str(marker)))
    return number
