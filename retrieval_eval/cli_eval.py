"""`videomamba eval CONFIG` and `eval compare A B`; torch is imported only when the work begins."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from configs.errors import UserError
from configs.files import write_whole
from configs.loader import load_config, to_yaml
from data_pipeline.sources import Part
from retrieval_eval.asking import must_exist, progress
from retrieval_eval.config import RetrievalConfig, RetrievalData, Stage


class _EvalOrCompare(TyperGroup):
    """`eval CONFIG` runs an evaluation; what is no name of a command here is a config."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name in front where it was left out."""
        named = not args or args[0] in self.commands or args[0] in ("-h", "--help")
        parsed: list[str] = super().parse_args(ctx, args if named else ["run", *args])
        return parsed


evals = typer.Typer(
    cls=_EvalOrCompare,
    no_args_is_help=True,
    add_completion=False,
    epilog="Example: videomamba eval demo/retrieval checkpoint=runs/stage2 data.path=shards/test out=r",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Assignments over the config, such as rerank.top=0.", metavar="[KEY=VALUE]..."),
]
Check = Annotated[bool, typer.Option("--check", help="Open everything and say what it is; measure nothing.")]
CheckData = Annotated[
    bool, typer.Option("--check-data", help="Only look for the media that the annotations name; 1 if any is missing.")
]
Manifest = Annotated[
    Path | None,
    typer.Option(help="Only write the set's videos and captions here, for `data build --preset umt` to train on."),
]
Only = Annotated[
    Stage | None, typer.Option(help="Stop after this stage; the evaluation without --only takes what is there.")
]


@evals.command(
    "run",
    epilog="Example: videomamba eval retrieval/msrvtt checkpoint=runs/stage2 data.media=videos data.annotations=a.csv",
)
def evaluate(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged config.")],
    overrides: Overrides = None,
    check: Check = False,
    check_data: CheckData = False,
    manifest: Manifest = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show the resolved config and leave.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make the embeddings in the out folder again.")] = False,
    ranks: Annotated[int, typer.Option(help="Share the work among so many processes of this machine.", min=1)] = 1,
    only: Only = None,
    part: Annotated[str | None, typer.Option(help="With --only: this share of the stage, as in 3/16.")] = None,
) -> None:
    """Zero-shot retrieval of a stage-2 checkpoint, both directions, with its controls: a table and result.json.

    The same command goes on where it was interrupted. Ranks of torchrun and srun share the work too; parts of an
    array share nothing but the out folder: all of `--only embed --part i/n`, then all of `--only rerank --part i/n`,
    then the command without both.
    """
    run = load_config(config, RetrievalConfig, overrides or [])
    if print_config:
        typer.echo(to_yaml(run), nl=False)
        return
    if isinstance(run.data, RetrievalData):
        must_exist(Path(run.data.path), "folder of shards", "Build it with `videomamba data build`, or mend data.path.")
    if check_data or manifest is not None:
        raise typer.Exit(_look(run, manifest))
    share = _share(part, only, fresh)
    if only == "rerank" and not run.rerank.top:
        raise UserError("rerank.top is 0, so there is nothing to re-rank.", "Leave --only rerank out.")
    must_exist(Path(run.checkpoint), "checkpoint", "Give checkpoint= the folder of a stage-2 run.")
    if check:
        from retrieval_eval.evaluate import check as describe

        typer.echo("\n".join(describe(run)))
    elif ranks > 1:
        options = [("--only", only), ("--part", part), ("--fresh", "" if fresh else None)]
        flags = [word for name, value in options if value is not None for word in (name, value) if word]
        raise typer.Exit(_launch(ranks, ["eval", "run", config, *(overrides or []), *flags]))
    else:
        _run(run, share, only, fresh)


def _run(run: RetrievalConfig, share: Part, only: Stage | None, fresh: bool) -> None:
    """The evaluation, or this process's share of it; the table where it was measured."""
    from retrieval_eval.evaluate import run_stages
    from retrieval_eval.ranks import crew

    with crew(share) as ours, progress(ours.first) as tell:
        result = run_stages(run, fresh, tell, only, ours)
    if result is not None:
        from retrieval_eval import summary

        Console().print(summary.table(result))
        typer.echo(summary.closing(result, Path(run.out)))
    elif ours.first:
        typer.echo(f"{only} of part {share.index}/{share.count} is done: {Path(run.out) / 'embeddings'}")


@evals.command("compare", epilog="Example: videomamba eval compare runs/a/retrieval runs/b/retrieval")
def compare(
    a: Annotated[Path, typer.Argument(help="A folder that `videomamba eval` wrote.")],
    b: Annotated[Path, typer.Argument(help="Another one, on the same queries.")],
    samples: Annotated[int, typer.Option(min=100, help="Resamplings of the queries.")] = 10_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the comparison here as well.")] = None,
) -> None:
    """Two results on the same queries: differences with 95 % intervals from a paired bootstrap."""
    from retrieval_eval import comparison, summary

    found = comparison.compare(a, b, samples)
    Console().print(summary.differences(found))
    for name, (mine, theirs) in found.protocol.items():
        typer.echo(f"differs: {name}: {mine} | {theirs}")
    if json_file is not None:
        write_whole(json_file, (json.dumps(asdict(found), indent=2, default=str) + "\n").encode())


def _look(run: RetrievalConfig, manifest: Path | None) -> int:
    """Say which media of the set are there, and write them down where asked; 1 if any is missing."""
    from retrieval_eval.testset import open_set

    found = open_set(run.data)
    typer.echo("\n".join(found.lines()))
    if manifest is not None:
        rows = found.manifest()
        write_whole(manifest, json.dumps(rows, ensure_ascii=False, indent=1).encode())
        typer.echo(f"{manifest}: {len(rows)} videos")
    return 1 if found.missing else 0


def _share(part: str | None, only: Stage | None, fresh: bool) -> Part:
    """The part that was asked for; UserError where it makes no sense."""
    if part is None:
        return Part()
    if only is None:
        raise UserError("--part is a share of one stage.", "Give --only embed or --only rerank with it.")
    if fresh:
        raise UserError("--fresh would remove what the other parts made.", "Remove the embeddings folder before them.")
    return Part.parse(part)


def _launch(ranks: int, arguments: list[str]) -> int:
    """A command as so many ranks, which share the cores of this machine."""
    if "RANK" in os.environ:
        raise UserError("--ranks starts ranks, but this process is one already (RANK is set).", "Leave --ranks out.")
    from pretrain.launch import launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    return launch(ranks, arguments)
