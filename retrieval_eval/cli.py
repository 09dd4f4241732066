"""`videomamba eval`, `embed`, `search` and `export`; torch is imported only when the work begins."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import UserError
from configs.loader import load_config, to_yaml
from retrieval_eval.config import RetrievalConfig, RetrievalData

if TYPE_CHECKING:
    from retrieval_eval.embed import Tell

app = typer.Typer(no_args_is_help=True, add_completion=False)

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command(
    "eval", epilog="Example: videomamba eval demo/retrieval checkpoint=runs/stage2 data.path=shards/test out=r"
)
def evaluate(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged config.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Assignments over the config, such as rerank.top=0.", metavar="[KEY=VALUE]..."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Open everything and say what it is; measure nothing.")
    ] = False,
    check_data: Annotated[
        bool,
        typer.Option("--check-data", help="Only look for the media that the annotations name; 1 if any is missing."),
    ] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show the resolved config and leave.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make the embeddings in the out folder again.")] = False,
) -> None:
    """Zero-shot retrieval of a stage-2 checkpoint, both directions, with its controls: a table and result.json."""
    run = load_config(config, RetrievalConfig, overrides or [])
    if print_config:
        typer.echo(to_yaml(run), nl=False)
        return
    if isinstance(run.data, RetrievalData):
        _must_exist(
            Path(run.data.path), "folder of shards", "Build it with `videomamba data build`, or mend data.path."
        )
    if check_data:
        from retrieval_eval.testset import open_set

        found = open_set(run.data)
        typer.echo("\n".join(found.lines()))
        raise typer.Exit(1 if found.missing else 0)
    _must_exist(Path(run.checkpoint), "checkpoint", "Give checkpoint= the folder of a stage-2 run.")
    from retrieval_eval import evaluate as evaluation

    if check:
        for line in evaluation.check(run):
            typer.echo(line)
        return
    with _progress() as tell:
        result = evaluation.evaluate(run, fresh, tell)
    _show(result, Path(run.out) / evaluation.RESULT)


@app.command("embed", epilog="Example: videomamba embed shards/test index --checkpoint runs/stage2")
def embed(
    shards: Annotated[Path, typer.Argument(help="A folder of shards.")],
    out: Annotated[Path, typer.Argument(help="The folder that the embeddings go into.")],
    checkpoint: Annotated[Path, typer.Option(help="A run or checkpoint folder of stage 2.")],
    batch: Annotated[int, typer.Option(min=1)] = 32,
    workers: Annotated[int, typer.Option(help="Processes that decode.", min=0)] = 2,
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Make embeddings that are there again.")] = False,
) -> None:
    """One vector a clip, in a folder that `videomamba search` reads."""
    _must_exist(shards, "folder of shards", "Build it with `videomamba data build`.")
    _must_exist(checkpoint, "checkpoint", "Give --checkpoint the folder of a stage-2 run.")
    from retrieval_eval.search import embed_corpus

    with _progress() as tell:
        count = embed_corpus(shards, out, checkpoint, batch, workers, device, fresh, tell)
    typer.echo(f"{count} clips in {out}")


@app.command("search", epilog='Example: videomamba search "a red square moves left" --index index')
def search(
    query: Annotated[str, typer.Argument(help="A sentence.")],
    index: Annotated[Path, typer.Option(help="A folder that `videomamba embed` wrote.")],
    top: Annotated[int, typer.Option(help="How many clips to show.", min=1)] = 5,
    checkpoint: Annotated[Path | None, typer.Option(help="Where the checkpoint is now, if it was moved.")] = None,
    device: Device = "auto",
) -> None:
    """The clips of an index that a sentence fits best, by the dual encoder."""
    if not query.strip():
        raise UserError("The query is empty.", "Give a sentence.")
    if not (index / "identity.json").is_file():
        raise UserError(f"{index} is no folder of embeddings.", "Make one with `videomamba embed`.")
    from retrieval_eval.search import find

    for place, hit in enumerate(find(query, index, top, checkpoint, device), start=1):
        typer.echo(f"{place:>3}  {hit.score:.4f}  {hit.key}  {hit.caption}")


@app.command("export", epilog="Example: videomamba export runs/stage2 encoders --result retrieval/result.json")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run or checkpoint folder of stage 2.")],
    out: Annotated[Path, typer.Argument(help="The folder that video/ and text/ go into.")],
    result: Annotated[Path | None, typer.Option(help="A result.json for the model cards.")] = None,
) -> None:
    """Write the video and the text encoder as folders that load elsewhere, and check them in a fresh process."""
    _must_exist(checkpoint, "checkpoint", "Give the folder of a stage-2 run.")
    if result is not None:
        _must_exist(result, "result", "Give the result.json that `videomamba eval` wrote.")
    from pretrain import export as exporter

    made = exporter.export(checkpoint, out, result)
    typer.echo(f"{made.out}/video: {made.video_parameters:,} parameters; {made.out}/text: {made.text_parameters:,}")
    typer.echo(
        "loaded again in a fresh process; largest difference of an embedding from the checkpoint: "
        f"video {made.video_difference:.1e}, text {made.text_difference:.1e} (limit {exporter.LIMIT:.0e})"
    )


def _must_exist(path: Path, what: str, cure: str) -> None:
    if not path.exists():
        raise UserError(f"There is no {what} {path}.", cure)


@contextmanager
def _progress() -> "Iterator[Tell]":
    """A bar a kind of work on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in bars or (progress.finished and done < total):
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=min(done, total), total=total)

        yield tell


def _show(result: dict[str, Any], path: Path) -> None:
    """The table of a result: a row a direction, scoring and view, so that it fits a terminal of 80 columns."""
    from rich.console import Console
    from rich.table import Table

    measures = ("R@1", "R@5", "R@10", "MedR")
    table = Table(title="Zero-shot retrieval", title_justify="left")
    table.add_column("")
    for measure in measures:
        table.add_column(measure, justify="right")
    names = {"shuffled": ", frames shuffled", "single": ", one frame repeated"}
    views = [("", result["results"])] + [(names[n], scored) for n, scored in result["results"]["controls"].items()]
    for way, title in (("t2v", "text to video"), ("v2t", "video to text")):
        for view, scored in views:
            for scoring, column in result["columns"].items():
                if scoring in scored:
                    numbers = [f"{scored[scoring][way][measure]:.1f}" for measure in measures]
                    table.add_row(f"{title} ({column}){view}", *numbers)
        if way == "t2v":
            table.add_section()
    Console().print(table)
    protocol = result["protocol"]
    lost = len(result["missing"])
    missing = f", {lost} clip{'s' if lost > 1 else ''} could not be read (named in it)" if lost else ""
    typer.echo(f"{protocol['clips']} clips, {protocol['captions']} captions{missing}; chance R@1 "
               f"{result['chance']['t2v']['R@1']:.2f} %. Everything else: {path}")  # fmt: skip
    if "note" in protocol:
        typer.echo(f"{protocol['note']} World version {protocol['world'].get('version', 'unknown')}.")
