"""The plan of a build, in its ledger: what the source lists, which files are there, and which hold the same content.

    make_plan(ledger, source, identity, part, progress)

Three steps, each resumable: list the clips; look for their files; find the files of equal content. Nothing is decoded
yet. Only files of equal size are compared, first by their ends and then, where those agree, as a whole.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipeline.columns import Clip
from data_pipeline.ledger import PAGE, Ledger, Loss, Planned
from data_pipeline.schema import LossReason
from data_pipeline.sources import Part, Source

Progress = Callable[[str, int, int | None, int], None]  # step, done, of how many (None: not known yet), lost

_THREADS = 16  # they wait for the disk, or for a network behind it
_END = 1 << 16  # bytes of a file's beginning and of its end


def make_plan(
    ledger: Ledger,
    source: Source,
    identity: dict[str, Any],
    part: Part,
    progress: Progress,
    *,
    compare: bool = True,
) -> None:
    """Bring the ledger to the stage `planned`, from wherever it is; `compare` False leaves equal contents alone.

    Raises UserError where no row has a caption or no file is there: then the ledger is as if nothing had been asked.
    """
    if ledger.about("stage") is None:
        with ledger.transaction():
            ledger.list_clips(_counted(source.clips(part), progress))
            ledger.note(request=identity, stage="listed")
    if ledger.about("stage") == "listed":
        if part.count == 1:  # a part may be as small as it likes
            _refuse_without_captions(ledger)
        _look(ledger, source.root, progress)
        if part.count == 1:
            _refuse_without_files(ledger, source.root)
        with ledger.transaction() as database:
            if compare:
                _join_duplicates(ledger, source.root, progress)
            database.execute(_CAPTIONLESS, (LossReason.EMPTY_CAPTION,))
            ledger.note(stage="planned")


def location(root: Path, clip: Clip) -> Path:
    """The file that holds a clip: its own, or the tar that it is in."""
    return root / (clip.inside[0] if clip.inside else clip.file)


def _counted(clips: Iterator[tuple[int, Clip]], progress: Progress) -> Iterator[tuple[int, Clip]]:
    for count, item in enumerate(clips, start=1):
        if count % PAGE == 0:
            progress("listing", count, None, 0)
        yield item


def _refuse_without_captions(ledger: Ledger) -> None:
    total = ledger.one("SELECT count(*) FROM clips")
    if total and not ledger.one("SELECT EXISTS (SELECT 1 FROM clips WHERE captions <> '[]')"):
        asked = ledger.about("request")
        ledger.clear()
        columns = ", ".join(asked.get("columns", {}).get("caption", ()))
        where = f"in column '{columns}' of {asked['manifest']}" if columns else f"of {asked['source']}"
        cure = "Name the column that holds them: --columns caption=NAME."
        if not columns:
            cure = "Give each clip a caption: NAME.txt or NAME.json beside its file, or in the tar."
        raise UserError(f"Every caption {where} is empty ({total} clips).", cure)


def _look(ledger: Ledger, root: Path, progress: Progress) -> None:
    """Note the size of every listed clip's file, or that it is not there or empty."""
    total = ledger.one("SELECT count(*) FROM clips WHERE status = 'listed'")
    seen = missing = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for page in ledger.pages("listed"):
            found = list(pool.map(lambda planned: _size(location(root, planned.clip), planned), page))
            losses = [loss for loss in found if isinstance(loss, tuple)]
            with ledger.transaction() as database:
                ledger.lose(losses)
                database.executemany(
                    "UPDATE clips SET status = 'planned', bytes = ? WHERE position = ?",
                    ((size, p.position) for size, p in zip(found, page, strict=True) if isinstance(size, int)),
                )
            seen, missing = seen + len(page), missing + len(losses)
            progress("looking for files", seen, total, missing)


def _size(path: Path, planned: Planned) -> int | Loss:
    try:
        size = path.stat().st_size
    except OSError as error:
        return planned.position, LossReason.MISSING_FILE, error.strerror or str(error)
    if path.is_dir():
        return planned.position, LossReason.MISSING_FILE, "is a folder"
    if planned.clip.inside is not None:
        size = planned.size
    return size or (planned.position, LossReason.EMPTY_FILE, "the file has no bytes")


def _refuse_without_files(ledger: Ledger, root: Path) -> None:
    if ledger.one("SELECT EXISTS (SELECT 1 FROM clips WHERE reason IS NOT 'missing_file')"):
        return
    rows = ledger.rows("SELECT file, (SELECT count(*) FROM clips) FROM clips ORDER BY position LIMIT 1")
    if rows:
        ledger.clear()
        raise UserError(
            f"None of the {rows[0][1]} files that the manifest names is in {root} (the first is {rows[0][0]}).",
            "Give the folder that its paths are relative to, or name the column with --columns file=NAME.",
        )


# Duplicates


_ALIKE = """
CREATE TEMP TABLE alike AS SELECT file, tar, tar_offset, bytes, NULL AS ends, NULL AS whole FROM (
    SELECT file, tar, tar_offset, bytes, count(*) OVER (PARTITION BY bytes) AS n
    FROM (SELECT * FROM clips WHERE status = 'planned' GROUP BY file)
) WHERE n > 1
"""
_UNLIKE = """
DELETE FROM temp.alike WHERE ends IS NULL OR rowid NOT IN (
    SELECT id FROM (SELECT rowid AS id, count(*) OVER (PARTITION BY bytes, ends) AS n FROM temp.alike) WHERE n > 1
)
"""
_SAME = """
CREATE TEMP TABLE same AS SELECT position, first, captions FROM (
    SELECT position, captions, min(position) OVER (
        PARTITION BY alike.bytes, whole, ifnull(start, -1), ifnull(stop, -1)
    ) AS first FROM clips JOIN temp.alike USING (file) WHERE status = 'planned' AND whole IS NOT NULL
) WHERE position <> first ORDER BY first, position
"""
_CAPTIONLESS = """
UPDATE clips SET status = 'lost', reason = ?, detail = 'all its captions are empty'
WHERE status = 'planned' AND captions = '[]'
"""


def _join_duplicates(ledger: Ledger, root: Path, progress: Progress) -> None:
    """Mark the planned clips whose content an earlier one has, and give that one their captions; in a transaction."""
    run = ledger.run
    run(_ALIKE)
    _digest_all(ledger, root, "ends", progress)
    run(_UNLIKE)
    _digest_all(ledger, root, "whole", progress)
    run("CREATE UNIQUE INDEX temp.alike_by_file ON alike (file)")
    run(_SAME)
    for position, first, captions in ledger.stream("SELECT * FROM temp.same ORDER BY rowid"):
        file, own = ledger.rows("SELECT file, captions FROM clips WHERE position = ?", first)[0]
        known = json.loads(own)
        known += [caption for caption in json.loads(captions) if caption not in known]
        run("UPDATE clips SET captions = ? WHERE position = ?", json.dumps(known, ensure_ascii=False), first)
        ledger.lose([(position, LossReason.DUPLICATE, f"same content as {file}")])
    run("DROP TABLE temp.same")
    run("DROP TABLE temp.alike")


def _digest_all(ledger: Ledger, root: Path, column: str, progress: Progress) -> None:
    """Fill a column of `alike`, a page at a time: what the ends of each file, or all of it, hash to."""
    total, last = ledger.one("SELECT count(*) FROM temp.alike"), 0
    query = f"SELECT rowid, file, tar, tar_offset, bytes FROM temp.alike WHERE rowid > ? ORDER BY rowid LIMIT {PAGE}"
    with ThreadPoolExecutor(_THREADS) as pool:
        done = 0
        while rows := ledger.rows(query, last):
            last = rows[-1][0]
            digests = list(pool.map(lambda row: _digest(root, *row[1:], whole=column == "whole"), rows))
            for digest, row in zip(digests, rows, strict=True):
                ledger.run(f"UPDATE temp.alike SET {column} = ? WHERE rowid = ?", digest, row[0])
            done += len(rows)
            progress("comparing files of equal size", done, total, 0)


def _digest(root: Path, file: str, tar: str | None, offset: int | None, size: int, *, whole: bool) -> str | None:
    begin = offset or 0
    spans = [(begin, size)] if whole or size <= 2 * _END else [(begin, _END), (begin + size - _END, _END)]
    digest = hashlib.sha256()
    try:
        with (root / (tar or file)).open("rb") as opened:
            for start, length in spans:
                opened.seek(start)
                while length > 0 and (block := opened.read(min(length, 1 << 20))):
                    digest.update(block)
                    length -= len(block)
    except OSError:
        return None  # counted when it is probed
    return digest.hexdigest()
