"""`videomamba run`: a pipeline on this machine."""

from typing import Annotated

import typer

from configs.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.command("run", epilog="Example: videomamba run pipelines/pretrain clips=/data/clips folder=runs/first --check")
def run(
    ctx: typer.Context,
    pipeline: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged pipeline.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Its variables, such as clips=/data, or any key: steps.stage1.ranks=2.", metavar="[KEY=VALUE]..."
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Check every step as far as its inputs exist.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run; start nothing.")] = False,
    start: Annotated[str | None, typer.Option("--from", metavar="STEP", help="This step and what needs it.")] = None,
    until: Annotated[str | None, typer.Option(metavar="STEP", help="This step and what it needs.")] = None,
    only: Annotated[str | None, typer.Option(metavar="STEP", help="This step alone.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="So many parts at once, where they share nothing.")] = 1,
) -> None:
    """Run a chain of commands here, step by step; what is done is skipped, so the same command goes on.

    On a cluster the same file is submitted: videomamba submit PIPELINE --cluster NAME.
    """
    if only is not None and (start is not None or until is not None):
        raise UserError("--only stands alone.", "Leave --from and --until out.")
    from rich.console import Console

    from slurm.pipeline.config import load_pipeline
    from slurm.pipeline.plan import Selection
    from slurm.pipeline.run import check_pipeline, run_pipeline, show_plan

    loaded, tree = load_pipeline(pipeline, overrides or []), ctx.find_root().command
    selection, console = Selection(start, until, only), Console(soft_wrap=True)
    if check:
        check_pipeline(loaded, tree, selection, console)
    elif dry_run:
        show_plan(loaded, tree, selection, console)
    else:
        run_pipeline(loaded, tree, selection, console, jobs)
