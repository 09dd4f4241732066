"""`videomamba data`: build, verify and describe shards of clips and captions, and render the demo's world."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress, TaskID

    from data_pipeline.card import BuildSummary

app = typer.Typer(no_args_is_help=True, help="Build, verify and describe shards of clips and captions.")

_SHOWN = 12  # clips of one reason named on the screen; the ledger names them all


def _bar(unit: str) -> "Progress":
    """A progress bar with rate and time left, on stderr; silent where stderr is no terminal."""
    from rich import progress
    from rich.console import Console

    class Rate(progress.ProgressColumn):
        """How many a second."""

        def render(self, task: progress.Task) -> str:
            speed = task.finished_speed or task.speed
            return f"{speed:.{0 if speed >= 10 else 1}f} {unit}/s" if speed else ""

    console = Console(stderr=True)
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}"),
        Rate(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@app.command(epilog="Example: videomamba data build clips/ corpus/ --manifest captions.csv --columns caption=text")
def build(
    source: Annotated[Path, typer.Argument(help="Folder of media, a manifest, or a folder of shards (*.tar).")],
    out: Annotated[Path | None, typer.Argument(help="Folder to write shards, ledger and card into.")] = None,
    manifest: Annotated[
        Path | None,
        typer.Option("--manifest", "--csv", help="Files and captions; default: the one in SOURCE, else side-cars."),
    ] = None,
    format: Annotated[  # noqa: A002  the option's name
        str | None,
        typer.Option(help="csv, tsv, json, jsonl, parquet, sqlite, folder or shards; default: by the suffix."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(help="Which columns are what: file=path,caption=title,start=from,end=to; {a}_{b:06d} joins."),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A published layout: webvid, kinetics or umt.")] = None,
    file_column: Annotated[str | None, typer.Option(help="The same as --columns file=NAME.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="The same as --columns caption=NAME.")] = None,
    table: Annotated[str | None, typer.Option(help="Table of an SQLite manifest; default: the only one.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Index the shards in SOURCE where they are.")] = False,
    transcode: Annotated[bool, typer.Option("--transcode", help="Make every video H.264 in MP4 anew.")] = False,
    short_side: Annotated[int | None, typer.Option(min=2, help="Transcode to this short side at most.")] = None,
    max_fps: Annotated[float | None, typer.Option(min=0.01, help="Transcode to this frame rate at most.")] = None,
    keyframes: Annotated[int | None, typer.Option(min=1, help="Transcode: a keyframe every so many frames.")] = None,
    crf: Annotated[int | None, typer.Option(min=0, max=51, help="Quality of H.264 (23; less is better).")] = None,
    audio: Annotated[bool, typer.Option("--audio", help="Transcode and keep the sound.")] = False,
    min_frames: Annotated[int, typer.Option(min=1, help="Shorter videos count as too_short.")] = 1,
    part: Annotated[str | None, typer.Option(help="Build only this share, as in 3/16; see `data merge`.")] = None,
    retry: Annotated[list[str] | None, typer.Option(help="Try lost clips again: failed, or a reason.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: the cores there are.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the shards; default: that of OUT.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Clips in a shard.")] = 1000,
    time_limit: Annotated[float, typer.Option(min=0.1, help="Seconds that one clip may take.")] = 60.0,
) -> None:
    """Turn media and captions into shards; run again after an interruption, it goes on.

    One row is one caption (or a list of them); rows with the same file are captions of one clip, other columns become
    its attributes. Clips are copied as they are, unless an option asks to transcode them.
    """
    if out is None and not in_place:
        raise typer.BadParameter("Give a folder to build into, or --in-place for existing shards.", param_hint="OUT")
    if out is not None and in_place:
        raise typer.BadParameter("With --in-place, nothing is built elsewhere: leave OUT away.", param_hint="OUT")
    from data_pipeline.ingest import BuildConfig
    from data_pipeline.ingest import build as run
    from data_pipeline.transcode import Transcode

    asked = {"short_side": short_side, "max_fps": max_fps, "keyframes": keyframes, "crf": crf, "audio": audio or None}
    asked = {option: value for option, value in asked.items() if value is not None}
    named = [f"file={file_column}"] if file_column else []
    named += [f"caption={caption_column}"] if caption_column else []
    request = BuildConfig(
        source=source,
        out=out,
        manifest=manifest,
        format=format,
        columns=(*(columns or ()), *named),
        preset=preset,
        table=table,
        name=name,
        samples_per_shard=samples_per_shard,
        transcode=Transcode.model_validate(asked) if transcode or asked else None,
        min_frames=min_frames,
        workers=workers,
        time_limit=time_limit,
        part=part,
        retry=tuple(retry or ()),
    )
    with _bar("clips") as bar:
        summary = run(request, _steps(bar))
    _print_summary(summary)
    _print_world(summary.out)


def _steps(bar: "Progress") -> "Callable[[str, int, int | None, int], None]":
    """A bar for each step of a build, as it comes."""
    tasks: dict[str, TaskID] = {}

    def show(step: str, done: int, total: int | None, lost: int) -> None:
        if step not in tasks:
            tasks[step] = bar.add_task(step, total=None, note="")
        bar.update(tasks[step], completed=done, total=total, note=f"{lost} lost" if lost else "")

    return show


@app.command(epilog="Example: videomamba data merge corpus/")
def merge(
    out: Annotated[Path, typer.Argument(help="Folder that the parts were built into.")],
    keep_parts: Annotated[bool, typer.Option("--keep-parts", help="Leave the parts' folders in place.")] = False,
) -> None:
    """Join the parts that `data build --part i/n` made into one corpus; run again after an interruption, it goes on."""
    from data_pipeline.merge import merge as run

    with _bar("shards") as bar:
        summary = run(out, _steps(bar), keep_parts=keep_parts)
    _print_summary(summary)
    _print_world(out)


def _print_world(folder: Path) -> None:
    """Say of a corpus from a rendered world that it is one, and which."""
    from data_pipeline.card import read_card

    world = read_card(folder).get("world")
    if world:
        typer.echo(f"{world.get('note', 'A rendered world.')} World version {world.get('version')}.")


def _print_summary(summary: "BuildSummary") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    if summary.nothing_to_do:
        console.print(f"{summary.out} is already built: nothing to do.", highlight=False)
    elif summary.retried:
        console.print(f"Tried {summary.retried} lost clips again.", highlight=False)
    elif summary.resumed:
        console.print("Went on where the last run stopped.", highlight=False)
    table = Table("in the corpus", "", show_header=True)
    table.add_row("samples", f"{summary.samples} ({summary.videos} videos, {summary.images} images)")
    table.add_row("captions", str(summary.captions))
    table.add_row("hours of video", f"{summary.hours:.2f}")
    table.add_row("shards", str(summary.shards))
    if not summary.nothing_to_do:
        table.add_row("seconds", f"{summary.seconds:.1f}")
    console.print(table)
    if not summary.lost:
        console.print("No clip was lost.")
        return
    lost = Table("lost", "clips", "for example", "why")
    for reason, losses in summary.lost.items():
        for i, loss in enumerate(losses.first[:_SHOWN]):
            lost.add_row(reason if i == 0 else "", str(losses.count) if i == 0 else "", loss.file, loss.detail)
        if losses.count > _SHOWN:
            lost.add_row("", "", f"and {losses.count - _SHOWN} more", "")
    console.print(lost)
    console.print(f"Every clip has its row in {summary.out / 'ledger.sqlite'}.", highlight=False)


@app.command(epilog="Example: videomamba data verify corpus/ --decode 200")
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that `videomamba data build` wrote.")],
    decode: Annotated[int, typer.Option(min=-1, help="How many clips to decode in full; -1 is all of them.")] = 64,
) -> None:
    """Read every member again, against index, hash and card, and decode some; exit code 1 if anything is wrong."""
    from rich.console import Console

    from data_pipeline.verify import verify as run

    with _bar("samples") as bar:
        task = bar.add_task("verifying", total=None, note="")
        faults = run(
            folder, "all" if decode < 0 else decode, lambda read, total: bar.update(task, completed=read, total=total)
        )
    console = Console(soft_wrap=True)
    for fault in faults:
        where = fault.shard if fault.key is None else f"{fault.shard}:{fault.key}@{fault.offset}"
        console.print(f"{where}: {fault.what}", highlight=False, markup=False)
    if faults:
        console.print(f"{len(faults)} faults in {folder}. Copy it again, or build it again into an empty folder.")
        raise typer.Exit(1)
    console.print(f"{folder} is sound.", highlight=False)


@app.command(epilog="Example: videomamba data info corpus/ --sheet sheet.png")
def info(
    folder: Annotated[Path, typer.Argument(help="Folder that `videomamba data build` wrote.")],
    sheet: Annotated[Path | None, typer.Option(help="PNG to draw random clips and their captions into.")] = None,
    clips: Annotated[int, typer.Option(min=1, max=200, help="Clips on the sheet.")] = 12,
    seed: Annotated[int, typer.Option(help="Seed of their choice.")] = 0,
) -> None:
    """Print the card of a corpus: what is in it, what was lost and why, how it was made; draw a contact sheet."""
    from data_pipeline.card import read_card

    card = read_card(folder)
    _print_card(card, folder)
    if sheet is not None:
        import io

        from configs.files import write_whole
        from data_pipeline.contact_sheet import contact_sheet
        from data_pipeline.shards import Corpus

        png = io.BytesIO()
        contact_sheet(Corpus.open(folder), clips, seed).save(png, "png")
        write_whole(sheet, png.getvalue())
        typer.echo(f"{min(clips, card['samples'])} random clips are on {sheet}.")


def _print_card(card: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table("corpus", Column(str(card.get("name", folder.name)), overflow="fold"))
    for field in (
        "samples",
        "videos",
        "images",
        "captions",
        "hours",
        "frames",
        "bytes",
        "content",
        "created",
        "command",
    ):
        if field in card:
            table.add_row(field, str(card[field]))
    table.add_row("shards", str(len(card.get("shards", []))))
    table.add_row("sizes", ", ".join(f"{size} ({count})" for size, count in card.get("sizes", {}).items()))
    for name, spread in (("seconds", card.get("seconds")), *(card.get("caption_statistics") or {}).items()):
        if isinstance(spread, dict):
            told = ", ".join(f"{what} {value:g}" for what, value in spread.items())
            table.add_row(name if name == "seconds" else f"captions: {name.replace('_', ' ')}", told or "none")
    table.add_row("attributes", ", ".join(card.get("attributes", [])) or "none")
    for reason, losses in card.get("lost", {}).items():
        names = ", ".join(entry["file"] for entry in losses["files"][:_SHOWN])
        table.add_row(f"lost: {reason}", f"{losses['count']}: {names}" + (", ..." if losses["count"] > _SHOWN else ""))
    for field, value in card.get("world", {}).items():
        table.add_row(f"world: {field}", str(value))
    Console().print(table)


@app.command(epilog="Example: videomamba data synthetic --out world/ --train 600 --val 60 --test 100 --images 200")
def synthetic(
    out: Annotated[Path, typer.Option(help="Folder for the media, one sub-folder with a captions.csv a split.")],
    seed: Annotated[int, typer.Option(help="Seed of the world and its split.")] = 0,
    train: Annotated[int, typer.Option(min=0, help="Training clips.")] = 6000,
    val: Annotated[int, typer.Option(min=0, help="Validation clips.")] = 400,
    test: Annotated[int, typer.Option(min=0, help="Test clips.")] = 400,
    images: Annotated[int, typer.Option(min=0, help="Pictures with captions.")] = 1500,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: the cores there are.")] = None,
) -> None:
    """Render the demo's captioned world as real H.264 files, a few damaged on purpose; finished splits are kept.

    A rendered world is a synthetic test of the software, not a benchmark.
    """
    import os

    from data_pipeline.synthetic import render_world
    from data_pipeline.world import DISCLAIMER, WORLD_VERSION, WorldConfig

    config = WorldConfig(seed=seed, train=train, val=val, test=test, images=images)
    with _bar("files") as bar:
        task = bar.add_task("rendering", total=None, note="")
        made = render_world(
            out,
            config,
            workers or len(os.sched_getaffinity(0)),
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    kept = f", kept {', '.join(made.kept)}" if made.kept else ""
    typer.echo(f"Rendered {made.files} files into {out} in {made.seconds:.1f} s{kept}.")
    typer.echo(f"{len(made.damaged)} training clips are damaged on purpose: world.json names them.")
    typer.echo(f"{DISCLAIMER} World version {WORLD_VERSION}.")
