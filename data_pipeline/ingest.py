"""`videomamba data build`: a folder of media and a table of captions become shards, and every clip is accounted for.

    from data_pipeline.ingest import BuildConfig, build
    summary = build(BuildConfig(source="clips", out="corpus"))

Writes into `out`: `<name>-000000.tar` and `.idx` and on, `ledger.sqlite` (a row a clip), and, when all is done,
`dataset.json` (the card). Media are copied as they are. Killed at any moment, the same call goes on where it was and
ends with the same bytes: shards are written in the manifest's order, and each is noted once it is whole.
"""

import hashlib
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from configs.errors import UserError
from configs.loader import Frozen
from data_pipeline.card import BuildSummary, summarise, write_card
from data_pipeline.files import disk_errors
from data_pipeline.index import Member
from data_pipeline.ledger import Done, Ledger, Planned
from data_pipeline.manifest import Clip, find_manifest, read_manifest
from data_pipeline.probing import Lost, Probed, Task, probe_files
from data_pipeline.schema import Kind, LossReason, Sample
from data_pipeline.shards import CARD, LEDGER, ShardWriter

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]


class BuildConfig(Frozen):
    """One build. `csv` defaults to the only CSV or TSV in `source`, `name` (of the shards) to that of `out`.

    `workers` is the number of processes (default: the cores there are), `time_limit` the seconds a clip may take.
    """

    source: Path
    out: Path
    csv: Path | None = None
    file_column: str = "file"
    caption_column: str = "caption"
    name: str | None = None
    samples_per_shard: int = Field(1000, ge=1)
    workers: int | None = Field(None, ge=1)
    time_limit: float = Field(60.0, gt=0)


def build(request: BuildConfig, progress: Progress | None = None) -> BuildSummary:
    """Build, or go on building, a corpus; `progress(settled, all, lost)` is called after every clip.

    Raises UserError for a wrong request (folders, columns, captions, another build in `out`), a full disk, and a corpus
    of which nothing is left.
    """
    begun = time.monotonic()
    manifest = request.csv or find_manifest(request.source)
    if request.csv is not None and not request.source.is_dir():
        raise UserError(f"There is no source folder {request.source}.", "Give the folder that holds the media.")
    clips = read_manifest(manifest, request.file_column, request.caption_column)
    identity = _identity(request, manifest)
    _prepare(request.out)
    with Ledger(request.out / LEDGER) as ledger:
        planned = ledger.request()
        if planned is None:
            ledger.plan(identity, _plan(clips, request))
        else:
            _refuse_other(planned, identity, request.out)
        remaining = ledger.remaining()
        resumed = planned is not None and bool(remaining)
        for part in request.out.glob(".*.part"):  # of a build that was killed; the lock says that none is running
            part.unlink()
        if remaining:
            _write_shards(remaining, ledger, request, identity["name"], progress)
        if remaining or not (request.out / CARD).is_file():
            write_card(request.out, ledger, request.source)
            nothing_to_do = False
        else:
            nothing_to_do = True
        return replace(
            summarise(request.out, ledger),
            resumed=resumed,
            nothing_to_do=nothing_to_do,
            seconds=time.monotonic() - begun,
        )


def _prepare(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file.", "Give a folder to write the shards into.")
    if not (out / LEDGER).exists() and any(out.glob("*.tar")):
        raise UserError(f"{out} holds shards that no ledger accounts for.", "Give an empty folder.")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)


def _identity(request: BuildConfig, manifest: Path) -> dict[str, Any]:
    """What makes two builds the same one."""
    return {
        "source": str(request.source.resolve()),
        "manifest": str(manifest.resolve()),
        "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "file_column": request.file_column,
        "caption_column": request.caption_column,
        "name": request.name or request.out.resolve().name,
        "samples_per_shard": request.samples_per_shard,
    }


def _refuse_other(planned: dict[str, Any], asked: dict[str, Any], out: Path) -> None:
    changed = [name for name in asked if planned.get(name) != asked[name]]
    if not changed:
        return
    name = changed[0]
    if name == "manifest_sha256":
        cause = f"{asked['manifest']} has changed since the build in {out} began."
    else:
        cause = f"{out} holds another build: its {name} is {planned.get(name)}, not {asked[name]}."
    raise UserError(cause, "Build into an empty folder, or repeat the first request.")


def _plan(clips: list[Clip], request: BuildConfig) -> list[Planned]:
    """Every clip with its size and what can be said before decoding: missing, empty, a duplicate, no caption."""
    sized = [_sized(position, clip, request.source) for position, clip in enumerate(clips)]
    if all(planned.reason is LossReason.MISSING_FILE for planned in sized):
        raise UserError(
            f"None of the {len(clips)} files that the manifest names is in {request.source} (the first is "
            f"{clips[0].file}).",
            "Give the folder that its paths are relative to, or name the column with --file-column.",
        )
    firsts = _duplicates(sized, request)
    captions: dict[int, list[str]] = defaultdict(list)
    for position, first in firsts.items():
        known = {*sized[first].clip.captions, *captions[first]}
        captions[first] += [caption for caption in sized[position].clip.captions if caption not in known]
    settled = []
    for planned in sized:
        position, clip = planned.position, planned.clip
        if position in firsts:
            same = sized[firsts[position]].clip.file
            planned = replace(planned, reason=LossReason.DUPLICATE, detail=f"same content as {same}")
        elif position in captions:
            planned = replace(planned, clip=replace(clip, captions=(*clip.captions, *captions[position])))
        if planned.reason is None and not planned.clip.captions:
            planned = replace(planned, reason=LossReason.EMPTY_CAPTION, detail="all its captions are empty")
        settled.append(planned)
    return settled


def _sized(position: int, clip: Clip, source: Path) -> Planned:
    path = source / clip.file
    try:
        size = path.stat().st_size
    except OSError as error:
        return Planned(position, clip, 0, LossReason.MISSING_FILE, error.strerror or str(error))
    if path.is_dir():
        return Planned(position, clip, 0, LossReason.MISSING_FILE, "is a folder")
    if size == 0:
        return Planned(position, clip, 0, LossReason.EMPTY_FILE, "the file has no bytes")
    return Planned(position, clip, size)


def _duplicates(sized: list[Planned], request: BuildConfig) -> dict[int, int]:
    """For each clip with the content of an earlier one, the position of the first; only equal sizes are hashed."""
    by_size: dict[int, list[Planned]] = defaultdict(list)
    for planned in sized:
        if planned.reason is None:
            by_size[planned.size].append(planned)
    candidates = [planned for group in by_size.values() if len(group) > 1 for planned in group]
    firsts: dict[str, int] = {}
    duplicates: dict[int, int] = {}
    with ThreadPoolExecutor(_workers(request)) as pool:
        digests = pool.map(lambda planned: _digest(request.source / planned.clip.file), candidates)
        for position, digest in sorted(zip((p.position for p in candidates), digests, strict=True)):
            first = firsts.setdefault(digest or f"unreadable {position}", position)
            if first != position:
                duplicates[position] = first
    return duplicates


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError:
        return None  # counted when it is probed


def _workers(request: BuildConfig) -> int:
    return request.workers or len(os.sched_getaffinity(0))


def _write_shards(
    remaining: list[Planned], ledger: Ledger, request: BuildConfig, name: str, progress: Progress | None
) -> None:
    """Probe what remains and write it, in order; the ledger follows a shard at a time."""
    by_position = {planned.position: planned for planned in remaining}
    done: dict[str, Done] = {}
    lost: list[tuple[int, LossReason, str]] = []

    def settle(shard: str, members: list[tuple[Member, ...]]) -> None:
        offsets = [medium.offset for medium, _ in members]
        ledger.settle(shard, zip(done.values(), offsets, strict=True), lost)
        done.clear()
        lost.clear()

    total = ledger.one("SELECT count(*) FROM clips")
    failed = ledger.one("SELECT count(*) FROM clips WHERE status = 'lost'")
    first = ledger.one("SELECT count(DISTINCT shard) FROM clips WHERE shard IS NOT NULL")
    tasks = [Task(p.position, str(request.source / p.clip.file), p.size) for p in remaining]
    results = probe_files(tasks, _workers(request), request.time_limit)
    writer = ShardWriter(request.out, name, request.samples_per_shard, first=first, finished=settle)
    with closing(results), writer:
        for settled, result in enumerate(results, start=total - len(remaining) + 1):
            if isinstance(result, Lost):
                logger.debug("%s: %s: %s", by_position[result.position].clip.file, result.reason, result.detail)
                lost.append((result.position, result.reason, result.detail))
                failed += 1
            else:
                sample = _sample(by_position[result.position].clip, result)
                done[sample.key] = Done(result.position, sample.key, sample.sha256, sample.kind, sample.probe)
                writer.write(sample)
            if progress is not None:
                progress(settled, total, failed)
    if lost:
        ledger.settle("", (), lost)


def _sample(clip: Clip, found: Probed) -> Sample:
    suffix = Path(clip.file).suffix.lower()[1:]
    return Sample(
        key=f"{found.position:09d}",
        media=found.media,
        extension=suffix if suffix.isalnum() and suffix.isascii() and suffix != "json" else "bin",
        kind=cast("Kind", found.kind),
        captions=clip.captions,
        source=clip.file,
        sha256=found.sha256,
        probe=dict(found.probe),
        attributes=clip.attributes,
    )
