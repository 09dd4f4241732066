"""`videomamba eval`, `embed`, `index`, `search`, `serve` and `export`; torch is imported only when the work begins."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

from configs.errors import UserError
from configs.files import write_whole
from configs.loader import load_config, to_yaml
from data_pipeline.sources import Part
from retrieval_eval.config import RetrievalConfig, RetrievalData, Stage

if TYPE_CHECKING:
    from retrieval_eval.embed import Tell


class _EvalOrCompare(TyperGroup):
    """`eval CONFIG` runs an evaluation; what is no name of a command here is a config."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name in front where it was left out."""
        named = not args or args[0] in self.commands or args[0] in ("-h", "--help")
        parsed: list[str] = super().parse_args(ctx, args if named else ["run", *args])
        return parsed


app = typer.Typer(no_args_is_help=True, add_completion=False)
evals = typer.Typer(
    cls=_EvalOrCompare,
    no_args_is_help=True,
    add_completion=False,
    epilog="Example: videomamba eval demo/retrieval checkpoint=runs/stage2 data.path=shards/test out=r",
)
app.add_typer(
    evals, name="eval", help="Zero-shot retrieval: `eval CONFIG` measures, `eval compare A B` sets side by side."
)

IndexKind = Literal["flat", "hnsw", "ivfpq"]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@evals.command(
    "run",
    epilog="Example: videomamba eval retrieval/msrvtt checkpoint=runs/stage2 data.media=videos data.annotations=a.csv",
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
    manifest: Annotated[
        Path | None,
        typer.Option(help="Only write the set's videos and captions here, for `data build --preset umt` to train on."),
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show the resolved config and leave.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make the embeddings in the out folder again.")] = False,
    ranks: Annotated[int, typer.Option(help="Share the work among so many processes of this machine.", min=1)] = 1,
    only: Annotated[
        Stage | None, typer.Option(help="Stop after this stage; the evaluation without --only takes what is there.")
    ] = None,
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
        _must_exist(
            Path(run.data.path), "folder of shards", "Build it with `videomamba data build`, or mend data.path."
        )
    if check_data or manifest is not None:
        raise typer.Exit(_look(run, manifest))
    share = _share(part, only, fresh)
    if only == "rerank" and not run.rerank.top:
        raise UserError("rerank.top is 0, so there is nothing to re-rank.", "Leave --only rerank out.")
    _must_exist(Path(run.checkpoint), "checkpoint", "Give checkpoint= the folder of a stage-2 run.")
    if "RANK" in os.environ and ranks > 1:
        raise UserError("--ranks starts ranks, but this process is one already (RANK is set).", "Leave --ranks out.")
    from retrieval_eval import evaluate as evaluation

    if check:
        for line in evaluation.check(run):
            typer.echo(line)
        return
    if ranks > 1:
        options = [("--only", only), ("--part", part)]
        flags = [word for name, value in options if value is not None for word in (name, value)]
        flags += ["--fresh"] if fresh else []
        raise typer.Exit(_launch(ranks, ["eval", "run", config, *(overrides or []), *flags]))
    from retrieval_eval.ranks import crew

    with crew(share) as ours, _progress(ours.first) as tell:
        result = evaluation.run_stages(run, fresh, tell, only, ours)
        if result is None:
            if ours.first:
                typer.echo(f"{only} of part {share.index}/{share.count} is done: {Path(run.out) / 'embeddings'}")
            return
    from retrieval_eval import summary

    Console().print(summary.table(result))
    typer.echo(summary.closing(result, Path(run.out)))


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


@app.command("index", epilog="Example: videomamba index shards/test index --checkpoint runs/stage2 --kind hnsw")
def index(
    shards: Annotated[Path, typer.Argument(help="A folder of shards.")],
    out: Annotated[Path, typer.Argument(help="The folder that embeddings and index go into.")],
    checkpoint: Annotated[Path, typer.Option(help="A run or checkpoint folder of stage 2.")],
    kind: Annotated[IndexKind, typer.Option(help="Exact, or approximate for large collections.")] = "flat",
    batch: Annotated[int, typer.Option(min=1)] = 32,
    workers: Annotated[int, typer.Option(help="Processes that decode.", min=0)] = 2,
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Make embeddings that are there again.")] = False,
) -> None:
    """Embed a collection and build the index that `videomamba search` asks; killed, it goes on where it was."""
    embed(shards, out, checkpoint, batch, workers, device, fresh)
    from retrieval_eval.search import write_index

    found = write_index(out, kind)
    typer.echo(f"{kind} index; recall of the exact first {found.k}: {found.percent:.1f} % over {found.queries} queries")


Moved = Annotated[Path | None, typer.Option(help="Where the checkpoint is now, if it was moved.")]
MovedShards = Annotated[Path | None, typer.Option(help="Where the shards are now, if they were moved.")]
Index = Annotated[Path, typer.Argument(help="A folder that `videomamba index` or `embed` wrote.")]


@app.command("search", epilog='Example: videomamba search index "a red square moves left"')
def search(
    index: Index,
    query: Annotated[str, typer.Argument(help="A sentence.")],
    top: Annotated[int, typer.Option(help="How many clips to show.", min=1)] = 5,
    checkpoint: Moved = None,
    shards: MovedShards = None,
    device: Device = "auto",
) -> None:
    """The clips of an index that a sentence fits best, by the dual encoder."""
    if not query.strip():
        raise UserError("The query is empty.", "Give a sentence.")
    _must_be_index(index)
    from retrieval_eval import summary
    from retrieval_eval.collection import Collection

    collection = Collection.open(index, checkpoint, shards, device)
    hits = collection.searcher.find(query, top)
    Console().print(summary.hits(query, [(hit.score, collection.about(hit.row)) for hit in hits]))


@app.command("serve", epilog="Example: videomamba serve index --port 8080")
def serve(
    index: Index,
    port: Annotated[int, typer.Option(help="0 takes any that is free.", min=0, max=65535)] = 8080,
    host: Annotated[str, typer.Option(help="An address for other machines takes a token.")] = "127.0.0.1",
    token_file: Annotated[Path | None, typer.Option(help="A file with the token; else VIDEOMAMBA_TOKEN.")] = None,
    checkpoint: Moved = None,
    shards: MovedShards = None,
    max_upload: Annotated[int, typer.Option(help="The largest clip that is taken, in MiB.", min=1, max=4096)] = 64,
    device: Device = "auto",
) -> None:
    """A page and a JSON API on this machine: find clips by a sentence or by a clip, and play them."""
    _must_be_index(index)
    from retrieval_eval.server.address import open_address

    address = open_address(host, port, token_file)
    from retrieval_eval.server.limits import MIB, Limits
    from retrieval_eval.server.run import Serving, serve

    with address.listening:
        limits = Limits(upload_bytes=max_upload * MIB)
        serve(Serving(index, checkpoint, shards, device, limits), address, typer.echo)


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


def _must_be_index(index: Path) -> None:
    if not (index / "identity.json").is_file():
        raise UserError(f"{index} is no folder of embeddings.", "Make one with `videomamba index`.")


def _must_exist(path: Path, what: str, cure: str) -> None:
    if not path.exists():
        raise UserError(f"There is no {what} {path}.", cure)


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
    from pretrain.launch import launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    return launch(ranks, arguments)


@contextmanager
def _progress(shown: bool = True) -> "Iterator[Tell]":
    """A bar a kind of work on a terminal, nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        bars: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in bars or (progress.finished and done < total):
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=min(done, total), total=total)

        yield tell
