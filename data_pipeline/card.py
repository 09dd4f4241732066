"""The card of a corpus, `dataset.json` and `README.md`: what is in it, what was lost and why, and how it was made."""

import hashlib
import json
import platform
import re
import shlex
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.files import write_whole
from data_pipeline.card_page import page
from data_pipeline.columns import DEFAULTS
from data_pipeline.ledger import Ledger
from data_pipeline.shards import CARD

PAGE = "README.md"
_OURS = b"<!-- written by videomamba data build -->"
_NAMED_A_REASON = 1000  # files a reason that the card names; the ledger names them all


@dataclass(frozen=True)
class Loss:
    """A clip that is not in the corpus."""

    file: str
    detail: str


@dataclass(frozen=True)
class Losses:
    """The clips lost for one reason: how many, and the first of them."""

    count: int
    first: list[Loss]


@dataclass(frozen=True)
class BuildSummary:
    """What a build came to. `hours` is of the videos; `lost` is by reason, `retried` how many were tried again."""

    out: Path
    samples: int
    videos: int
    images: int
    captions: int
    hours: float
    shards: int
    lost: dict[str, Losses] = field(default_factory=dict)
    resumed: bool = False
    retried: int = 0
    nothing_to_do: bool = False
    seconds: float = 0.0


def summarise(out: Path, ledger: Ledger) -> BuildSummary:
    """The totals of a ledger."""
    samples, videos, duration, shards, captions = ledger.rows(
        "SELECT count(*), coalesce(sum(media = 'video'), 0), "
        "coalesce(sum(CASE WHEN media = 'video' THEN duration END), 0), count(DISTINCT shard), "
        "coalesce(sum(json_array_length(captions)), 0) FROM clips WHERE status = 'done'"
    )[0]
    lost = {}
    for reason, count in ledger.rows(
        "SELECT reason, count(*) FROM clips WHERE status = 'lost' GROUP BY reason ORDER BY reason"
    ):
        first = ledger.rows(
            "SELECT file, coalesce(detail, '') FROM clips WHERE status = 'lost' AND reason = ? "
            f"ORDER BY position LIMIT {_NAMED_A_REASON}",
            reason,
        )
        lost[reason] = Losses(count, [Loss(*row) for row in first])
    return BuildSummary(out, samples, videos, samples - videos, captions, duration / 3600, shards, lost)


def write_card(out: Path, ledger: Ledger, *, may_be_empty: bool = False) -> None:
    """Write the card of a finished ledger, `dataset.json` last: its being there says that the corpus is whole.

    Raises UserError where not one clip came through, but for a corpus that `may_be_empty`. A README.md that somebody
    else wrote is left as it is.
    """
    summary = summarise(out, ledger)
    request = ledger.about("request") or {}
    if summary.samples == 0 and not may_be_empty:
        counts = ", ".join(f"{losses.count} {reason}" for reason, losses in summary.lost.items())
        losses = max(summary.lost.values(), key=lambda losses: losses.count)
        raise UserError(
            f"Not one clip of {request.get('source')} could be used ({counts}): "
            f"{losses.first[0].file}: {losses.first[0].detail}.",
            f"Mend the media, then run it again with --retry failed; {out / 'ledger.sqlite'} has a row a clip.",
            exit_code=1,
        )
    card = {**_contents(summary, ledger), **_provenance(request, out)}
    world = _world(Path(request.get("source", ".")))
    if world is not None:
        card["world"] = world
    readme = out / PAGE
    if not readme.exists() or readme.read_bytes().startswith(_OURS):
        write_whole(readme, _OURS + f"\n{page(card)}".encode())
    write_whole(out / CARD, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())


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


def _contents(summary: BuildSummary, ledger: Ledger) -> dict[str, Any]:
    """What is in it, and what was lost."""
    return {
        "samples": summary.samples,
        "videos": summary.videos,
        "images": summary.images,
        "captions": summary.captions,
        "hours": round(summary.hours, 4),
        "frames": ledger.one("SELECT coalesce(sum(frames), 0) FROM clips WHERE status = 'done'"),
        "bytes": ledger.one("SELECT coalesce(sum(bytes), 0) FROM clips WHERE status = 'done'"),
        "sizes": {
            f"{width}x{height}": count
            for width, height, count in ledger.rows(
                "SELECT width, height, count(*) AS n FROM clips WHERE status = 'done' "
                "GROUP BY width, height ORDER BY n DESC, width, height LIMIT 20"
            )
        },
        "seconds": _spread(
            ledger.rows(
                "SELECT round(duration, 1) AS s, count(*) FROM clips WHERE status = 'done' AND media = 'video' "
                "GROUP BY s ORDER BY s"
            )
        ),
        "caption_statistics": _caption_statistics(ledger),
        "attributes": _attribute_names(ledger),
        "lost": {
            reason: {
                "count": losses.count,
                "files": [{"file": loss.file, "detail": loss.detail} for loss in losses.first],
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
        "versions": _versions(transcodes=bool(request.get("transcode"))),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _spread(counted: list[tuple[float, int]]) -> dict[str, float]:
    """Mean and percentiles of values that come sorted, each with its count; {} for none."""
    total = sum(count for _, count in counted)
    if not total:
        return {}
    spread = {"min": counted[0][0], "mean": round(sum(value * count for value, count in counted) / total, 2)}
    for name, share in (("median", 0.5), ("p95", 0.95)):
        rank, seen = share * total, 0
        for value, count in counted:
            seen += count
            if seen >= rank:
                spread[name] = value
                break
    return {**spread, "max": counted[-1][0]}


def _caption_statistics(ledger: Ledger) -> dict[str, Any]:
    """How many captions a clip has, how long they are in words, and how many differ."""
    words: Counter[int] = Counter()
    texts = "FROM clips, json_each(clips.captions) AS j WHERE status = 'done'"
    for (caption,) in ledger.stream(f"SELECT j.value {texts}"):
        words[len(caption.split())] += 1
    a_clip = ledger.rows(
        "SELECT json_array_length(captions) AS n, count(*) FROM clips WHERE status = 'done' GROUP BY n ORDER BY n"
    )
    return {
        "words": _spread(sorted(words.items())),
        "a_clip": _spread(a_clip),
        "distinct": ledger.one(f"SELECT count(DISTINCT j.value) {texts}"),
    }


def _content_digest(ledger: Ledger) -> str:
    """One number for what is in the shards: every medium, its captions and attributes, in order."""
    digest = hashlib.sha256()
    for row in ledger.stream(
        "SELECT key, sha256, captions, attributes FROM clips WHERE status = 'done' ORDER BY shard, position"
    ):
        digest.update(json.dumps(row, ensure_ascii=False).encode())
    return digest.hexdigest()


def _attribute_names(ledger: Ledger) -> list[str]:
    rows = ledger.rows("SELECT DISTINCT j.key FROM clips, json_each(clips.attributes) AS j ORDER BY j.key")
    return [row[0] for row in rows]


def _command(request: dict[str, Any], out: Path) -> str:
    """The command that makes this corpus."""
    words = ["videomamba", "data", "build", str(request.get("source", ""))]
    words += ["--in-place"] if request.get("in_place") else [str(out)]
    words += ["--manifest", request["manifest"]] if request.get("manifest") else []
    words += ["--format", str(request.get("format"))]
    words += ["--table", request["table"]] if request.get("table") else []
    for role, columns in request.get("columns", {}).items():
        asked = () if tuple(columns) == DEFAULTS.get(role) else columns
        words += [word for column in asked for word in ("--columns", f"{role}={column}")]
    if not request.get("in_place"):
        words += ["--name", str(request.get("name")), "--samples-per-shard", str(request.get("samples_per_shard"))]
    words += ["--min-frames", str(request["min_frames"])] if request.get("min_frames", 1) > 1 else []
    for option, value in (request.get("transcode") or {}).items():
        if value is True:
            words += [f"--{option}"]
        elif value not in (None, False):
            words += [f"--{option.replace('_', '-')}", f"{value:g}"]
    return shlex.join([*words, *(["--transcode"] if request.get("transcode") else [])])


def _versions(*, transcodes: bool) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("videomamba", "av"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            versions[package] = "unknown"
    if transcodes:
        from data_pipeline.ffmpeg import ffmpeg_program

        asked = subprocess.run([ffmpeg_program(), "-version"], check=False, capture_output=True, text=True)
        said = re.match(r"ffmpeg version (\S+)", asked.stdout)
        versions["ffmpeg"] = said[1] if said else "unknown"
    return versions


def _world(source: Path) -> dict[str, Any] | None:
    """Version, seed and sizes from the `world.json` beside or above media that were rendered."""
    for folder in (source, source.resolve().parent):
        path = folder / "world.json"
        if path.is_file():
            world = json.loads(path.read_bytes())
            return {name: value for name, value in world.items() if not isinstance(value, dict | list)}
    return None
