"""The card of a corpus, `dataset.json`: what is in it, what was lost and why, and how it was made."""

import hashlib
import json
import platform
import shlex
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipeline.files import write_whole
from data_pipeline.ledger import Ledger
from data_pipeline.shards import CARD

_NAMED_A_REASON = 1000  # files a reason that the card names; the ledger names them all


@dataclass(frozen=True)
class Loss:
    """A clip that is not in the corpus."""

    file: str
    detail: str


@dataclass(frozen=True)
class BuildSummary:
    """What a build came to. `hours` is of the videos; `lost` is by reason, in the manifest's order."""

    out: Path
    samples: int
    videos: int
    images: int
    captions: int
    hours: float
    shards: int
    lost: dict[str, list[Loss]] = field(default_factory=dict)
    resumed: bool = False
    nothing_to_do: bool = False
    seconds: float = 0.0


def summarise(out: Path, ledger: Ledger) -> BuildSummary:
    """The totals of a ledger."""
    samples, videos, duration, shards, captions = ledger.rows(
        "SELECT count(*), coalesce(sum(media = 'video'), 0), "
        "coalesce(sum(CASE WHEN media = 'video' THEN duration END), 0), count(DISTINCT shard), "
        "coalesce(sum(json_array_length(captions)), 0) FROM clips WHERE status = 'done'"
    )[0]
    lost: dict[str, list[Loss]] = defaultdict(list)
    for reason, file, detail in ledger.rows(
        "SELECT reason, file, detail FROM clips WHERE status = 'lost' ORDER BY reason, position"
    ):
        lost[reason].append(Loss(file, detail or ""))
    return BuildSummary(
        out, samples, videos, samples - videos, captions, duration / 3600, shards=shards, lost=dict(lost)
    )


def write_card(out: Path, ledger: Ledger, source: Path) -> None:
    """Write `dataset.json` for a finished ledger; raises UserError where not one clip came through."""
    summary = summarise(out, ledger)
    if summary.samples == 0:
        counts = ", ".join(f"{len(losses)} {reason}" for reason, losses in summary.lost.items())
        losses = max(summary.lost.values(), key=len)
        raise UserError(
            f"Not one clip of {source} could be used ({counts}): {losses[0].file}: {losses[0].detail}.",
            f"Mend the media, then build into an empty folder; {out / 'ledger.sqlite'} has a row a clip.",
            exit_code=1,
        )
    card = {**_contents(summary, ledger), **_provenance(ledger.request() or {}, out)}
    world = _world(source)
    if world is not None:
        card["world"] = world
    write_whole(out / CARD, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())


def _contents(summary: BuildSummary, ledger: Ledger) -> dict[str, Any]:
    """What is in it, and what was lost."""
    return {
        "samples": summary.samples,
        "videos": summary.videos,
        "images": summary.images,
        "captions": summary.captions,
        "hours": round(summary.hours, 4),
        "frames": ledger.one("SELECT sum(frames) FROM clips WHERE status = 'done'"),
        "bytes": ledger.one("SELECT sum(bytes) FROM clips WHERE status = 'done'"),
        "sizes": {
            f"{width}x{height}": count
            for width, height, count in ledger.rows(
                "SELECT width, height, count(*) AS n FROM clips WHERE status = 'done' "
                "GROUP BY width, height ORDER BY n DESC, width, height LIMIT 20"
            )
        },
        "attributes": _attribute_names(ledger),
        "lost": {
            reason: {
                "count": len(losses),
                "files": [{"file": loss.file, "detail": loss.detail} for loss in losses[:_NAMED_A_REASON]],
            }
            for reason, losses in summary.lost.items()
        },
        "shards": [row[0] for row in ledger.rows("SELECT DISTINCT shard FROM clips WHERE shard <> '' ORDER BY shard")],
        "content": _content_digest(ledger),
    }


def _provenance(request: dict[str, Any], out: Path) -> dict[str, Any]:
    """How it was made, so that it can be made again."""
    return {
        "name": request.get("name"),
        "request": request,
        "command": _command(request, out),
        "versions": _versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a corpus; raises UserError where there is none that can be read."""
    path = folder / CARD
    if not path.is_file():
        raise UserError(f"There is no {CARD} in {folder}.", "Give a folder that `videomamba data build` finished.")
    try:
        return dict(json.loads(path.read_bytes()))
    except ValueError as error:
        raise UserError(
            f"{path} is not readable as a card ({error}).", "Build the corpus again.", exit_code=1
        ) from error


def _content_digest(ledger: Ledger) -> str:
    """One number for what is in the shards: every medium, its captions and attributes, in order."""
    digest = hashlib.sha256()
    for row in ledger.rows(
        "SELECT key, sha256, captions, attributes FROM clips WHERE status = 'done' ORDER BY position"
    ):
        digest.update(json.dumps(row, ensure_ascii=False).encode())
    return digest.hexdigest()


def _attribute_names(ledger: Ledger) -> list[str]:
    rows = ledger.rows("SELECT DISTINCT j.key FROM clips, json_each(clips.attributes) AS j ORDER BY j.key")
    return [row[0] for row in rows]


def _command(request: dict[str, Any], out: Path) -> str:
    words = ["videomamba", "data", "build", request.get("source", ""), str(out), "--csv", request.get("manifest", "")]
    words += ["--file-column", request.get("file_column", ""), "--caption-column", request.get("caption_column", "")]
    words += ["--name", request.get("name", ""), "--samples-per-shard", str(request.get("samples_per_shard", ""))]
    return shlex.join(words)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("videomamba", "av"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            versions[package] = "unknown"
    return versions


def _world(source: Path) -> dict[str, Any] | None:
    """Version, seed and sizes from the `world.json` beside or above media that were rendered."""
    for folder in (source, source.resolve().parent):
        path = folder / "world.json"
        if path.is_file():
            world = json.loads(path.read_bytes())
            return {name: value for name, value in world.items() if not isinstance(value, dict | list)}
    return None
