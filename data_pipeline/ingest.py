"""`videomamba data build`: media and captions become shards, and every clip is accounted for.

    from data_pipeline.ingest import BuildConfig, build
    summary = build(BuildConfig(source="clips", out="corpus"))

Writes into `out`: `<name>-000000.tar` and `.idx` and on, `ledger.sqlite` (a row a clip), and, when all is done, the
card (`dataset.json` and `README.md`). Killed at any moment, the same call goes on where it was and ends with the same
bytes: shards are written in the order of the source, and each is noted once it is whole.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from configs.errors import UserError
from configs.files import disk_errors
from configs.loader import Frozen
from data_pipeline.card import BuildSummary, summarise, write_card
from data_pipeline.columns import Columns
from data_pipeline.crew import prepare_all
from data_pipeline.ledger import Done, Ledger, Loss, Planned
from data_pipeline.outlets import InPlace, NewShards, Outlet
from data_pipeline.planning import Progress, location, make_plan
from data_pipeline.prepare import Lost, Prepared, Recipe, Result, Task
from data_pipeline.schema import Kind, LossReason, Sample
from data_pipeline.shards import CARD, LEDGER
from data_pipeline.sources import Part, Source, TarSource, open_source
from data_pipeline.transcode import Transcode

logger = logging.getLogger(__name__)

# What another try may change; the other reasons lie in the source itself.
FAILED = (
    LossReason.MISSING_FILE,
    LossReason.EMPTY_FILE,
    LossReason.NOT_MEDIA,
    LossReason.NO_VIDEO_STREAM,
    LossReason.TOO_SHORT,
    LossReason.DECODE_ERROR,
    LossReason.TIMEOUT,
)
_SCRATCH = ".scratch"


class BuildConfig(Frozen):
    """One build. `manifest`, `format` and `table` are found in `source` where one fits, `name` is by default `out`'s.

    `out` None: existing tars are indexed where they are. `workers` is the number of processes (default: the cores
    there are), `time_limit` the seconds a clip may take, `part` a share that is built on its own and merged later.
    """

    source: Path
    out: Path | None
    manifest: Path | None = None
    format: str | None = None
    columns: tuple[str, ...] = ()
    preset: str | None = None
    table: str | None = None
    name: str | None = None
    samples_per_shard: int = Field(1000, ge=1)
    transcode: Transcode | None = None
    min_frames: int = Field(1, ge=1)
    workers: int | None = Field(None, ge=1)
    time_limit: float = Field(60.0, gt=0)
    part: str | None = None
    retry: tuple[str, ...] = ()

    def folder(self) -> Path:
        """Where shards and ledger are written: `out`, a part's folder in it, or the source itself."""
        if self.out is None:
            return self.source
        part = Part.parse(self.part) if self.part else Part()
        return self.out if part.count == 1 else self.out / part_folder(part)


def part_folder(part: Part) -> str:
    """The folder of a part inside the corpus that it will be merged into."""
    return f"part-{part.index:05d}-of-{part.count:05d}"


def build(request: BuildConfig, progress: Progress | None = None) -> BuildSummary:
    """Build, or go on building, a corpus; `progress(step, done, of how many, lost)` is called after every clip.

    Raises UserError for a wrong request (folders, columns, captions, another build in `out`), a full disk, and a corpus
    of which nothing is left.
    """
    begun = time.monotonic()
    progress = progress or (lambda *_: None)
    part = Part.parse(request.part) if request.part else Part()
    retry = _reasons(request.retry)
    source = open_source(
        request.source, request.manifest, Columns.parse(request.columns, request.preset), request.format, request.table
    )
    if request.out is None:
        _refuse_in_place(request, source)
    out = request.folder()
    identity = _identity(request, source, part)
    _prepare(out, in_place=request.out is None)
    with Ledger(out / LEDGER) as ledger:
        planned = ledger.about("request")
        if planned is not None:
            _refuse_other(planned, identity, out)
        retried = _retry(ledger, retry, out)
        finished = ledger.about("stage") == "planned" and (out / CARD).is_file()
        if not finished:
            _clear_away(out)  # what a build that was killed left; the lock says that none is running
            with disk_errors(out):
                make_plan(ledger, source, identity, part, progress, compare=request.out is not None)
                _fill(ledger, source, request, identity["name"], progress)
            write_card(out, ledger, may_be_empty=part.count > 1)
        return replace(
            summarise(out, ledger),
            resumed=planned is not None and not finished and not retried,
            retried=retried,
            nothing_to_do=finished,
            seconds=time.monotonic() - begun,
        )


def _reasons(words: tuple[str, ...]) -> tuple[str, ...]:
    """The reasons that `--retry` names; `failed` stands for all that another try may change."""
    reasons: list[str] = []
    for word in words:
        if word != "failed" and word not in FAILED:
            raise UserError(
                f"'{word}' is nothing that can be tried again.", f"Give failed, or one of {', '.join(FAILED)}."
            )
        reasons += [str(reason) for reason in FAILED] if word == "failed" else [word]
    return tuple(reasons)


def _refuse_in_place(request: BuildConfig, source: Source) -> None:
    if not isinstance(source, TarSource):
        raise UserError(f"{request.source} holds no shards to index in place.", "Give a folder OUT to build into.")
    if request.transcode or request.part or request.source.is_file():
        raise UserError(
            "Shards are indexed in place as they are, a folder at a time.", "Give a folder OUT to make new ones."
        )


def _prepare(out: Path, in_place: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file.", "Give a folder to write the shards into.")
    if not in_place and not (out / LEDGER).exists() and any(out.glob("*.tar")):
        raise UserError(f"{out} holds shards that no ledger accounts for.", "Give an empty folder.")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)


def _identity(request: BuildConfig, source: Source, part: Part) -> dict[str, Any]:
    """What makes two builds the same one."""
    return {
        **source.identity(),
        "name": request.name or (request.out or request.source).resolve().name,
        "in_place": request.out is None,
        "samples_per_shard": request.samples_per_shard,
        "transcode": request.transcode.model_dump(mode="json") if request.transcode else None,
        "min_frames": request.min_frames,
        "part": f"{part.index}/{part.count}" if part.count > 1 else None,
    }


def _refuse_other(planned: dict[str, Any], asked: dict[str, Any], out: Path) -> None:
    changed = [name for name in asked if planned.get(name) != asked[name]]
    if not changed:
        return
    name = changed[0]
    if name.endswith("_sha256"):
        cause = f"{asked.get('manifest') or asked['source']} has changed since the build in {out} began."
    else:
        cause = f"{out} holds another build: its {name} is {planned.get(name)}, not {asked[name]}."
    raise UserError(cause, "Build into an empty folder, or repeat the first request.")


def _retry(ledger: Ledger, reasons: tuple[str, ...], out: Path) -> int:
    """Have lost clips tried again; the corpus counts as unfinished from before they are until they are settled."""
    marks = ", ".join(f"'{reason}'" for reason in reasons)
    if not ledger.one(f"SELECT EXISTS (SELECT 1 FROM clips WHERE status = 'lost' AND reason IN ({marks}))"):
        return 0
    (out / CARD).unlink(missing_ok=True)
    return ledger.retry(reasons)


def _clear_away(out: Path) -> None:
    for part in out.glob(".*.part"):
        part.unlink()
    shutil.rmtree(out / _SCRATCH, ignore_errors=True)


def _fill(ledger: Ledger, source: Source, request: BuildConfig, name: str, progress: Progress) -> None:
    """Prepare what is planned and write it, in order; the ledger follows a shard at a time."""
    total = ledger.one("SELECT count(*) FROM clips WHERE status <> 'listed'")
    settled = total - ledger.one("SELECT count(*) FROM clips WHERE status = 'planned'")
    failed = ledger.one("SELECT count(*) FROM clips WHERE status = 'lost'")
    out, waiting = request.folder(), dict[int, Planned]()
    scratch = out / _SCRATCH
    scratch.mkdir(exist_ok=True)
    recipe = Recipe(request.transcode, request.min_frames, str(scratch))
    tasks = _tasks(ledger, source.root, waiting)
    workers = request.workers or len(os.sched_getaffinity(0))
    outlet: Outlet = (
        InPlace(source.root, ledger) if request.out is None else NewShards(out, name, request.samples_per_shard, ledger)
    )
    try:
        with closing(prepare_all(tasks, recipe, workers, request.time_limit)) as results, outlet:
            for result in results:
                planned = waiting.pop(result.position)
                lost = _take(planned, result, outlet, ledger)
                if lost is not None:
                    logger.debug("%s: %s: %s", planned.clip.file, *lost[1:])
                    outlet.lose(planned, lost)
                    failed += 1
                settled += 1
                progress("building", settled, total, failed)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tasks(ledger: Ledger, root: Path, waiting: dict[int, Planned]) -> Iterator[Task]:
    """The work that is left, each clip noted in `waiting` until its result has come."""
    for page in ledger.pages("planned"):
        for planned in page:
            waiting[planned.position] = planned
            clip = planned.clip
            yield Task(
                position=planned.position,
                path=str(location(root, clip)),
                size=planned.size,
                suffix=Path(clip.file).suffix,
                offset=clip.inside[1] if clip.inside else None,
                start=clip.start,
                end=clip.end,
            )


def _take(planned: Planned, result: Result, outlet: Outlet, ledger: Ledger) -> Loss | None:
    """Hand a prepared clip to the outlet; the loss where there is none to hand, or the corpus has its content."""
    if isinstance(result, Lost):
        return result.position, result.reason, result.detail
    same = outlet.holder(result.sha256) or ledger.holder(result.sha256)
    if same is not None:
        return result.position, LossReason.DUPLICATE, f"same content as {same}"
    sample = _sample(planned, result)
    done = Done(result.position, sample.key, sample.sha256, sample.kind, len(sample.media), sample.probe)
    outlet.add(planned, sample, done)
    return None


def _sample(planned: Planned, found: Prepared) -> Sample:
    return Sample(
        key=f"{found.position:09d}",
        media=found.media,
        extension=found.extension,
        kind=cast("Kind", found.kind),
        captions=planned.clip.captions,
        source=planned.clip.file,
        sha256=found.sha256,
        probe=dict(found.probe),
        attributes=planned.clip.attributes,
    )
