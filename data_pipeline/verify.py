"""`videomamba data verify`: read everything again, against index, hash and card, and decode some of it."""

import json
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.errors import UserError
from data_pipeline.index import ShardIndex, read_index
from data_pipeline.schema import Sample, SampleError, as_captions, content_digest
from data_pipeline.shards import CARD, LEDGER, Corpus

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fault:
    """Something wrong: in which shard, at which sample and byte where that is known, and what."""

    shard: str
    key: str | None
    offset: int | None
    what: str


@dataclass(frozen=True)
class _Card:
    """What the card promises; `samples` None where there is none to read."""

    shards: frozenset[str] = frozenset()
    samples: int | None = None
    in_place: bool = False


def verify(folder: Path, decode_sample: int | Literal["all"] = 64, progress: Progress | None = None) -> list[Fault]:
    """The faults of a corpus, [] for a sound one; `progress(samples read, all)` is called after every sample.

    Every member is read and compared with index, sha256 and ledger, the tar is walked as another reader would, and
    `decode_sample` clips, evenly spaced, are decoded in full. Raises UserError only where there is nothing to verify.
    """
    if not folder.is_dir():
        raise UserError(f"There is no corpus folder {folder}.", "Give the folder that `videomamba data build` wrote.")
    present = {path.name for path in folder.glob("*.tar")}
    card, faults = _promised(folder)
    if not present and not card.shards:
        raise UserError(
            f"There are no shards (*.tar) in {folder}.", "Give a folder that `videomamba data build` wrote."
        )
    faults += [Fault(shard, None, None, "the shard is missing") for shard in sorted(card.shards - present)]
    if card.shards:
        faults += [Fault(shard, None, None, "the card does not know it") for shard in sorted(present - card.shards)]
    indexes = _indexes(folder, sorted(present), faults)
    total = sum(len(index.keys) for index in indexes.values())
    if card.samples is not None and len(indexes) == len(card.shards) and total != card.samples:
        faults.append(Fault(CARD, None, None, f"the card counts {card.samples} samples, the indexes {total}"))
    step = 1 if decode_sample == "all" else max(1, total // decode_sample) if decode_sample else total + 1
    read = 0
    for shard, index in indexes.items():
        noted = _noted(folder, shard)
        faults += _walked(folder / shard, index, card.in_place)
        lacking = sorted(noted.keys() - {*index.keys})
        faults += [Fault(shard, key, None, "the ledger has it, the index does not") for key in lacking]
        corpus = Corpus(folder, [shard], [index], "")
        for i in range(len(corpus)):
            faults += _sample_faults(corpus, i, noted, decode=read % step == 0 and step <= total)
            read += 1
            if progress is not None:
                progress(read, total)
    return faults


def _indexes(folder: Path, shards: list[str], faults: list[Fault]) -> dict[str, ShardIndex]:
    """The indexes that can be read; a fault is added for each that cannot."""
    indexes = {}
    for shard in shards:
        try:
            indexes[shard] = read_index((folder / shard).with_suffix(".idx"))
        except FileNotFoundError:
            faults.append(Fault(shard, None, None, "it has no index"))
        except UserError as error:
            faults.append(Fault(shard, None, None, error.cause))
    return indexes


def _noted(folder: Path, shard: str) -> dict[str, tuple[str, str]]:
    """Key to sha256 and captions (JSON) of what the ledger has in a shard; {} without a ledger that can be read."""
    if not (folder / LEDGER).is_file():
        return {}
    uri = f"{(folder / LEDGER).resolve().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=0)) as database:
            query = "SELECT key, sha256, captions FROM clips WHERE shard = ? AND status = 'done'"
            return {key: (sha256, captions) for key, sha256, captions in database.execute(query, (shard,))}
    except sqlite3.Error:  # a build is running, or it is damaged: the shards say enough
        return {}


def _promised(folder: Path) -> tuple[_Card, list[Fault]]:
    """What the card promises, and what is wrong with it."""
    path = folder / CARD
    if not path.is_file():
        return _Card(), [Fault(CARD, None, None, "there is no card: the build has not finished, or it was removed")]
    try:
        card = json.loads(path.read_bytes())
        in_place = bool((card.get("request") or {}).get("in_place"))
        return _Card(frozenset(card["shards"]), int(card["samples"]), in_place), []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _Card(), [Fault(CARD, None, None, f"the card is not readable ({error})")]


def _walked(path: Path, index: ShardIndex, in_place: bool) -> list[Fault]:
    """Compare what a plain tar reader finds with the index."""
    expected = [
        (f"{key}.{extension}", int(offset), int(size))
        for i, key in enumerate(index.keys)
        for extension, offset, size in sorted(
            (
                (index.extensions[i], index.media_offset[i], index.media_size[i]),
                ("txt" if index.text[i] else "json", index.meta_offset[i], index.meta_size[i]),
            ),
            key=lambda member: member[1],
        )
    ]
    size, least = path.stat().st_size, index.end()
    cut = [Fault(path.name, None, least, f"the shard is cut: {size} bytes, at least {least} expected")]
    faults = cut if size < least else []
    found = []
    try:
        with tarfile.open(path, "r:") as tar:
            found = [(member.name, member.offset_data, member.size) for member in tar]
        if in_place:  # other members, and samples that were lost, may stand between those of the index
            promised = set(expected)
            found = [member for member in found if member in promised]
    except tarfile.TarError as error:
        faults.append(Fault(path.name, None, None, f"a tar reader gives up: {error}"))
    if found != expected and not faults:
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
        name, offset, _ = expected[at] if at < len(expected) else (*found[at][:2], 0)
        faults.append(Fault(path.name, name, offset, "a tar reader finds other members than the index from here on"))
    return faults


def _sample_faults(corpus: Corpus, i: int, noted: dict[str, tuple[str, str]], decode: bool) -> list[Fault]:
    try:
        sample = corpus.read(i)
        what = _disagreement(sample, noted.get(sample.key) if noted else None)
        if noted and sample.key not in noted:
            what = "the ledger does not know it"
        if decode and not what:
            what = _decode_fault(sample)
    except SampleError as error:
        what = error.detail
    return [Fault(corpus.shards[0], corpus.key(i), corpus.offset(i), what)] if what else []


def _disagreement(sample: Sample, noted: tuple[str, str] | None) -> str:
    digest = content_digest(sample.media)
    if digest != sample.sha256:
        return "the medium has another sha256 than its json says"
    if noted is not None and digest != noted[0]:
        return "the medium has another sha256 than the ledger says"
    if noted is not None and list(as_captions(list(sample.captions))) != json.loads(noted[1]):
        return "it has other captions than the ledger says"
    return ""


def _decode_fault(sample: Sample) -> str:
    from data_pipeline.decode import probe  # PyAV takes a while to import

    try:
        found = probe(sample.media).frames
    except SampleError as error:
        return str(error)
    told = sample.probe.get("frames", found)
    return "" if found == told else f"it decodes to {found} frames, its json member says {told}"
