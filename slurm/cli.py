"""`videomamba submit`, `status` and `cancel`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from configs.errors import ConfigError, UserError
from configs.loader import find_config, read_tree, validate
from slurm.cluster import ClusterProfile, load_cluster
from slurm.job import Job, Resources, absolute, videomamba_command
from slurm.pipeline.config import is_pipeline, load_pipeline
from slurm.render import render
from slurm.snapshot import snapshot_code
from slurm.submit import prepare, submit, test_only

app = typer.Typer(no_args_is_help=True, add_completion=False)

Run = Annotated[Path, typer.Argument(help="The run folder, the config's `out`; or the folder of a pipeline.")]


@app.command("submit", epilog="Example: videomamba submit stage1.yaml out=runs/stage1 --cluster mysite.yaml --nodes 4")
def submit_config(
    ctx: typer.Context,
    config: Annotated[str, typer.Argument(help="A YAML file of a run or a pipeline, or the name of a packaged one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Assignments over the config, such as optim.lr=1e-4.", metavar="[KEY=VALUE]..."),
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="Your site's YAML, or a packaged profile.", envvar="VIDEOMAMBA_CLUSTER")
    ] = "",
    nodes: Annotated[str, typer.Option(help="How many, or MIN-MAX: then a restart may take fewer.")] = "1",
    gpus: Annotated[int | None, typer.Option(help="GPUs (and ranks) a node; the cluster's otherwise.", min=1)] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of one attempt; the cluster's otherwise.")] = None,
    after: Annotated[list[str] | None, typer.Option(help="Start when this job has succeeded (repeatable).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, show the script, submit nothing.")] = False,
) -> None:
    """Submit a pretraining run, or a pipeline of several steps, to Slurm.

    It survives time limits, preemption, crashes and lost nodes. A pipeline's steps say themselves what they ask for.
    """
    if not cluster:
        raise UserError("No cluster is named.", "Give --cluster NAME or FILE, or set VIDEOMAMBA_CLUSTER.")
    if is_pipeline(read_tree(config)):
        if nodes != "1" or gpus or time:
            raise UserError("--nodes, --gpus and --time are of a single run.", "Write them into the steps' resources.")
        _submit_pipeline(ctx, config, overrides or [], load_cluster(cluster), tuple(after or []), dry_run)
        return
    profile, (least, most) = load_cluster(cluster), _node_range(nodes)
    wanted = {"nodes": most, "min_nodes": least, "tasks_per_node": gpus, "time": time}
    asked = validate(wanted, Resources, "what is asked for")
    pretrain = ("pretrain", str(find_config(config)), *(overrides or []))
    resolved = _videomamba(*pretrain, "--print-config")
    run = absolute(yaml.safe_load(resolved)["out"])
    if (run / "done.json").is_file():
        typer.echo(f"{run} is finished; nothing was submitted.", err=True)
        return
    for count in range(least, most + 1):
        said = _videomamba(*pretrain, "--check", "--ranks", str(count * asked.tasks_on(profile)))
        typer.echo(said, err=True, nl=False)
    job = make_job(profile, run, asked, tuple(after or []))
    if dry_run:
        typer.echo(render(job, profile), nl=False)
        here = shutil.which("sbatch") is not None
        typer.echo(test_only(render(job, profile)) if here else "no sbatch here: the cluster was not asked", err=True)
        return
    work = prepare(run)
    (work / "config.yaml").write_text(resolved, encoding="utf-8")
    number = submit(job, profile, snapshot_code(work / "code"))
    typer.echo(number)
    typer.echo(f"Look with: videomamba status {run}\nRead with: tail -f {work}/logs/latest/rank0.log", err=True)


def _submit_pipeline(
    ctx: typer.Context,
    name: str,
    overrides: list[str],
    cluster: ClusterProfile,
    after: tuple[str, ...],
    dry_run: bool,
) -> None:
    from rich.console import Console

    from slurm.pipeline.submit import show_jobs, submit_pipeline

    pipeline, tree, console = load_pipeline(name, overrides), ctx.find_root().command, Console(soft_wrap=True)
    if dry_run:
        show_jobs(pipeline, tree, cluster, console)
        return
    chain = submit_pipeline(pipeline, tree, cluster, console, after=after)
    said = f"Look with: videomamba status {chain.folder}" if chain.ids else f"All of {chain.folder} is done."
    typer.echo(said, err=True)


def make_job(cluster: ClusterProfile, run: Path, asked: Resources, after: tuple[str, ...] = ()) -> Job:
    """The job that trains what RUN/slurm/config.yaml says, with the packages in RUN/slurm/code."""
    return Job(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", run.name),
        command=videomamba_command(cluster, "pretrain", str(run / "slurm" / "config.yaml")),
        run=run,
        workdir=absolute(Path.cwd()),
        code=run / "slurm" / "code",
        resources=asked,
        after=after,
    )


def _node_range(nodes: str) -> tuple[int, int]:
    least, dash, most = nodes.partition("-")
    if not (least.isdigit() and (not dash or most.isdigit())) or int(least) < 1 or (dash and int(most) < int(least)):
        raise ConfigError(f"--nodes is '{nodes}'.", "Give a number, or two as in 2-4.")
    return int(least), int(most or least)


def _videomamba(*arguments: str) -> str:
    """What one of our commands prints, run beside this one; its words and its exit code where it refuses."""
    # Submitting from inside a job is allowed, and is no rank of that job.
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "videomamba", *arguments], stdout=subprocess.PIPE, text=True, env=alone
    )
    if done.returncode:
        raise typer.Exit(done.returncode)
    return done.stdout


@app.command("status", epilog="Example: videomamba status runs/stage1")
def status(run: Run) -> None:
    """Where a submitted run is: queue, restarts, progress, and the last error."""
    from slurm.pipeline.jobs import describe_chain, is_chain
    from slurm.status import describe

    if is_chain(run):
        from rich.console import Console

        table, errors = describe_chain(run)
        Console(soft_wrap=True).print(table)
        typer.echo("\n".join(errors), nl=bool(errors))
        return
    for line in describe(run):
        typer.echo(line)


@app.command("cancel", epilog="Example: videomamba cancel runs/stage1")
def cancel(
    run: Run, now: Annotated[bool, typer.Option("--now", help="Do not let it save what it has first.")] = False
) -> None:
    """End a submitted run; it saves first, and can be submitted again."""
    from slurm.pipeline.jobs import cancel_chain, is_chain
    from slurm.status import cancel as end

    for line in cancel_chain(run, now) if is_chain(run) else end(run, now):
        typer.echo(line)
