"""`videomamba eval`, `embed`, `index`, `search`, `serve` and `export`; torch is imported only when the work begins."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from configs.errors import UserError
from retrieval_eval.asking import must_exist, progress
from retrieval_eval.cli_eval import evals

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.add_typer(
    evals, name="eval", help="Zero-shot retrieval: `eval CONFIG` measures, `eval compare A B` sets side by side."
)

IndexKind = Literal["flat", "hnsw", "ivfpq"]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


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
    must_exist(shards, "folder of shards", "Build it with `videomamba data build`.")
    must_exist(checkpoint, "checkpoint", "Give --checkpoint the folder of a stage-2 run.")
    from retrieval_eval.search import embed_corpus

    with progress() as tell:
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
    tokens, most = collection.searcher.tokens(query), collection.searcher.encoders.text.max_tokens
    if tokens > most:
        typer.echo(f"note: the query has {tokens} tokens, and only the first {most} are read", err=True)
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
    must_exist(checkpoint, "checkpoint", "Give the folder of a stage-2 run.")
    if result is not None:
        must_exist(result, "result", "Give the result.json that `videomamba eval` wrote.")
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
