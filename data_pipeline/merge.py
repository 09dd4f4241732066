"""`videomamba data merge`: the parts that `data build --part i/n` made become one corpus.

Shards are linked under their new numbers, without a copy where the disk allows it. Only a shard that holds a clip
which an earlier part has too, or the clip which then gets that one's captions, is written anew. Killed at any moment,
the same call goes on: what is in place stays, the card comes last, and the parts are removed after it.
"""

import json
import os
import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.files import disk_errors, part_name, sync_folder
from data_pipeline.card import BuildSummary, read_card, summarise, write_card
from data_pipeline.index import Member, read_index
from data_pipeline.ingest import part_folder
from data_pipeline.ledger import Ledger
from data_pipeline.planning import Progress
from data_pipeline.schema import LossReason
from data_pipeline.shards import CARD, LEDGER, Corpus, ShardWriter, shard_name, shard_number
from data_pipeline.sources import Part

_FOLDER = re.compile(r"part-(\d{5})-of-(\d{5})")
_REMOVED = ".removed-"  # a part's folder goes under another name first, so that none is ever there by halves
_COLUMNS = (
    "position, file, start, stop, tar, tar_offset, status, reason, detail, shard, key, offset, bytes, sha256, media, "
    "width, height, frames, duration, captions, attributes"
)


@dataclass(frozen=True)
class _Shard:
    """A shard of a part, and the name that it gets."""

    folder: Path
    old: str
    new: str


def merge(out: Path, progress: Progress | None = None, *, keep_parts: bool = False) -> BuildSummary:
    """Join the parts in `out`; `progress(step, done, of how many, 0)` is called after every shard.

    Raises UserError where parts are missing, unfinished, of different builds, or hold the same clips.
    """
    begun = time.monotonic()
    progress = progress or (lambda *_: None)
    folders = _parts(out)
    for rest in out.glob(f"{_REMOVED}*"):  # of a merge that was killed while it removed its parts
        shutil.rmtree(rest)
    if not folders and (out / CARD).is_file():
        with Ledger(out / LEDGER) as ledger:
            return replace(summarise(out, ledger), nothing_to_do=True)
    if not (out / LEDGER).exists() and any(out.glob("*.tar")):
        raise UserError(f"{out} holds shards that no ledger accounts for.", "Merge in a folder that holds only parts.")
    with ExitStack() as locks:
        ledger = locks.enter_context(Ledger(out / LEDGER))
        _refuse_unrelated(out, ledger, folders)
        if not (out / CARD).is_file():
            parts = [locks.enter_context(Ledger(folder / LEDGER)) for folder in _complete(out, folders)]
            request = _common_request(out, folders, parts)
            shards = _gather(ledger, folders, parts, request)
            with disk_errors(out):
                _place(out, ledger, shards, progress)
            write_card(out, ledger)
        summary = replace(summarise(out, ledger), seconds=time.monotonic() - begun)
    if not keep_parts:
        for folder in folders:
            shutil.rmtree(folder.rename(out / f"{_REMOVED}{folder.name}"))
    return summary


def _parts(out: Path) -> list[Path]:
    if not out.is_dir():
        raise UserError(f"There is no folder {out}.", "Give the folder that the parts were built into.")
    folders = sorted(path for path in out.iterdir() if path.is_dir() and _FOLDER.fullmatch(path.name))
    if not folders and not (out / CARD).is_file():
        raise UserError(
            f"There are no parts in {out}.", f"Build them first: videomamba data build ... {out} --part 1/4"
        )
    return folders


def _refuse_unrelated(out: Path, ledger: Ledger, folders: list[Path]) -> None:
    """Refuse where the ledger beside the parts is not that of their own merge."""
    if ledger.about("stage") is None:
        return
    known = ledger.about("parts")
    if known is None:
        raise UserError(f"{out} holds a build of its own beside the parts.", "Build the parts into another folder.")
    for folder in folders:
        if known.get(folder.name) != read_card(folder)["content"]:
            cause = f"{out} is a merged corpus, and {folder.name} in it has been built again since."
            raise UserError(cause, "Build all parts into an empty folder, and merge them there.")


def _complete(out: Path, folders: list[Path]) -> list[Path]:
    """The folders of the parts, once all of one division are there and finished."""
    counts = {int(match[2]) for folder in folders if (match := _FOLDER.fullmatch(folder.name))}
    if len(counts) > 1:
        raise UserError(
            f"{out} holds parts of several divisions (of {', of '.join(map(str, sorted(counts)))}), which overlap.",
            "Remove the folders of all but one of them.",
        )
    count = counts.pop()
    missing = [index for index in range(1, count + 1) if out / part_folder(Part(index, count)) not in folders]
    unfinished = [folder.name for folder in folders if not (folder / CARD).is_file()]
    if missing:
        named = ", ".join(f"{index}/{count}" for index in missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise UserError(f"{out} lacks {len(missing)} of {count} parts: {named}.", "Build them, then merge again.")
    if unfinished:
        raise UserError(
            f"{len(unfinished)} of {count} parts are not finished: {', '.join(unfinished[:10])}.",
            "Run their builds again; each goes on where it was.",
        )
    return folders


def _common_request(out: Path, folders: list[Path], parts: list[Ledger]) -> dict[str, Any]:
    """What all the parts were asked for, and the merged corpus with them."""
    common: dict[str, Any] | None = None
    for folder, part in zip(folders, parts, strict=True):
        request = {**(part.about("request") or {}), "part": None}
        common = common or request
        changed = [name for name in common if request.get(name) != common[name]]
        if changed:
            name = changed[0]
            cause = f"{folder.name} is of another build than {folders[0].name}: its {name} is {request.get(name)}, "
            raise UserError(f"{cause}not {common[name]}.", "Build all parts with the same source and options.")
    if common is None:
        raise UserError(f"There are no parts in {out}.", "Build them first.")
    return common


def _gather(ledger: Ledger, folders: list[Path], parts: list[Ledger], request: dict[str, Any]) -> list[_Shard]:
    """Fill the merged ledger, shards under their new names, duplicates between parts marked; the shards to place."""
    shards: list[_Shard] = []
    rows: list[tuple[Ledger, dict[str, str]]] = []
    for folder, part in zip(folders, parts, strict=True):
        names = {}
        for (old,) in part.rows("SELECT DISTINCT shard FROM clips WHERE shard <> '' ORDER BY shard"):
            names[old] = shard_name(request["name"], len(shards))
            shards.append(_Shard(folder, old, names[old]))
        rows.append((part, names))
    if ledger.about("stage") is None:
        with ledger.transaction():
            for (part, names), folder in zip(rows, folders, strict=True):
                _copy_rows(ledger, part, names, folder)
            _join_duplicates(ledger)
            contents = {folder.name: read_card(folder)["content"] for folder in folders}
            ledger.note(request=request, stage="planned", parts=contents)
    return shards


def _copy_rows(ledger: Ledger, part: Ledger, names: dict[str, str], folder: Path) -> None:
    shard = _COLUMNS.split(", ").index("shard")
    marks = ", ".join("?" for _ in _COLUMNS.split(", "))
    for row in part.stream(f"SELECT {_COLUMNS} FROM clips ORDER BY position"):
        new = (*row[:shard], names.get(row[shard]), *row[shard + 1 :])
        if not ledger.run(f"INSERT OR IGNORE INTO clips ({_COLUMNS}) VALUES ({marks})", *new):
            raise UserError(
                f"{folder.name} holds {row[1]}, which another part has too.", "Build the parts again: they overlap."
            )


def _join_duplicates(ledger: Ledger) -> None:
    """Of clips with the same content keep the first, with the captions of all; note the shards that this changes.

    A clip that goes keeps its shard's name in the ledger until that shard has been written without it.
    """
    ledger.run("CREATE TABLE IF NOT EXISTS changed (shard TEXT PRIMARY KEY)")
    same = (
        "SELECT position, first, captions, shard FROM (SELECT position, captions, shard, "
        "min(position) OVER (PARTITION BY sha256) AS first FROM clips WHERE status = 'done') WHERE position <> first"
    )
    ledger.run(f"CREATE TEMP TABLE same AS {same} ORDER BY first, position")
    for position, first, captions, shard in ledger.stream("SELECT * FROM temp.same ORDER BY rowid"):
        file, own, home = ledger.rows("SELECT file, captions, shard FROM clips WHERE position = ?", first)[0]
        known = json.loads(own)
        new = [caption for caption in json.loads(captions) if caption not in known]
        if new:
            text = json.dumps([*known, *new], ensure_ascii=False)
            ledger.run("UPDATE clips SET captions = ? WHERE position = ?", text, first)
            ledger.run("INSERT OR IGNORE INTO changed VALUES (?)", home)
        ledger.run("INSERT OR IGNORE INTO changed VALUES (?)", shard)
        ledger.lose([(position, LossReason.DUPLICATE, f"same content as {file}")])
    ledger.run("DROP TABLE temp.same")


def _place(out: Path, ledger: Ledger, shards: list[_Shard], progress: Progress) -> None:
    """Put every shard under its new name: linked, or written anew where its clips have changed."""
    changed = {row[0] for row in ledger.rows("SELECT shard FROM changed")}
    for count, shard in enumerate(shards, start=1):
        if shard.new in changed:
            _rewrite(out, ledger, shard)
        else:
            for old, new in ((shard.old, shard.new), (_index(shard.old), _index(shard.new))):
                _link(shard.folder / old, out / new)
        progress("merging", count, len(shards), 0)
    sync_folder(out)
    with ledger.transaction():
        ledger.run("UPDATE clips SET shard = NULL, key = NULL, offset = NULL WHERE status = 'lost'")


def _index(shard: str) -> str:
    return str(Path(shard).with_suffix(".idx"))


def _link(old: Path, new: Path) -> None:
    """Have a file under a second name: by a hard link, or where the disk has none by a copy."""
    if new.exists() and new.stat().st_size == old.stat().st_size:
        return
    part = part_name(new)
    part.unlink(missing_ok=True)
    try:
        os.link(old, part)
    except OSError:
        shutil.copyfile(old, part)
    part.replace(new)


def _rewrite(out: Path, ledger: Ledger, shard: _Shard) -> None:
    """Write a shard with the clips that stay, their captions as the ledger has them now."""
    query = "SELECT key, captions FROM clips WHERE shard = ? AND status = 'done'"
    keep = {key: tuple(json.loads(captions)) for key, captions in ledger.rows(query, shard.new)}
    corpus = Corpus(shard.folder, [shard.old], [read_index(shard.folder / _index(shard.old))], "")
    offsets: list[tuple[str, int]] = []
    name = Path(shard.new).stem.rpartition("-")[0]

    def settle(_: str, members: list[tuple[Member, ...]]) -> None:
        offsets.extend((medium.name.partition(".")[0], medium.offset) for medium, _ in members)

    with ShardWriter(out, name, max(1, len(keep)), first=shard_number(shard.new), finished=settle) as writer:
        for i in range(len(corpus)):
            if (captions := keep.get(corpus.key(i))) is not None:
                writer.write(replace(corpus.read(i), captions=captions))
    with ledger.transaction() as database:
        database.executemany(
            "UPDATE clips SET offset = ? WHERE shard = ? AND key = ?",
            ((offset, shard.new, key) for key, offset in offsets),
        )
