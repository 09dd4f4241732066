"""`videomamba data verify`: read everything again, against index, hash and card, and decode some of it."""

import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.errors import UserError
from data_pipeline.index import ShardIndex, read_index
from data_pipeline.schema import Sample, SampleError, content_digest
from data_pipeline.shards import CARD, Corpus

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fault:
    """Something wrong: in which shard, at which sample and byte where that is known, and what."""

    shard: str
    key: str | None
    offset: int | None
    what: str


def verify(folder: Path, decode_sample: int | Literal["all"] = 64, progress: Progress | None = None) -> list[Fault]:
    """The faults of a corpus, [] for a sound one; `progress(samples read, all)` is called after every sample.

    Every member is read and compared with index and sha256, the tar is walked as another reader would, and
    `decode_sample` clips, evenly spaced, are decoded in full. Raises UserError only where there is nothing to verify.
    """
    if not folder.is_dir():
        raise UserError(f"There is no corpus folder {folder}.", "Give the folder that `videomamba data build` wrote.")
    present = {path.name for path in folder.glob("*.tar")}
    promised, samples, faults = _promised(folder)
    if not present and not promised:
        raise UserError(
            f"There are no shards (*.tar) in {folder}.", "Give a folder that `videomamba data build` wrote."
        )
    faults += [Fault(shard, None, None, "the shard is missing") for shard in sorted(promised - present)]
    if promised:
        faults += [Fault(shard, None, None, "the card does not know it") for shard in sorted(present - promised)]
    indexes: dict[str, ShardIndex] = {}
    for shard in sorted(present):
        try:
            indexes[shard] = read_index((folder / shard).with_suffix(".idx"))
        except FileNotFoundError:
            faults.append(Fault(shard, None, None, "it has no index"))
        except UserError as error:
            faults.append(Fault(shard, None, None, error.cause))
    total = sum(len(index.keys) for index in indexes.values())
    if samples is not None and len(indexes) == len(promised) and total != samples:
        faults.append(Fault(CARD, None, None, f"the card counts {samples} samples, the indexes {total}"))
    step = 1 if decode_sample == "all" else max(1, total // decode_sample) if decode_sample else total + 1
    read = 0
    for shard, index in indexes.items():
        faults += _walked(folder / shard, index)
        corpus = Corpus(folder, [shard], [index], "")
        for i in range(len(corpus)):
            faults += _sample_faults(corpus, i, decode=read % step == 0 and step <= total)
            read += 1
            if progress is not None:
                progress(read, total)
    return faults


def _promised(folder: Path) -> tuple[set[str], int | None, list[Fault]]:
    """The shards and samples that the card counts, and what is wrong with the card."""
    path = folder / CARD
    if not path.is_file():
        return set(), None, [Fault(CARD, None, None, "there is no card: the build has not finished, or it was removed")]
    try:
        card = json.loads(path.read_bytes())
        return set(card["shards"]), int(card["samples"]), []
    except (ValueError, KeyError, TypeError) as error:
        return set(), None, [Fault(CARD, None, None, f"the card is not readable ({error})")]


def _walked(path: Path, index: ShardIndex) -> list[Fault]:
    """Compare what a plain tar reader finds with the index."""
    expected = [
        (f"{key}.{extension}", int(offset), int(size))
        for i, key in enumerate(index.keys)
        for extension, offset, size in (
            (index.extensions[i], index.media_offset[i], index.media_size[i]),
            ("json", index.meta_offset[i], index.meta_size[i]),
        )
    ]
    size, least = path.stat().st_size, index.end()
    cut = [Fault(path.name, None, least, f"the shard is cut: {size} bytes, at least {least} expected")]
    faults = cut if size < least else []
    found = []
    try:
        with tarfile.open(path, "r:") as tar:
            found = [(member.name, member.offset_data, member.size) for member in tar]
    except tarfile.TarError as error:
        faults.append(Fault(path.name, None, None, f"a tar reader gives up: {error}"))
    if found != expected and not faults:
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
        name, offset, _ = expected[at] if at < len(expected) else (*found[at][:2], 0)
        faults.append(Fault(path.name, name, offset, "a tar reader finds other members than the index from here on"))
    return faults


def _sample_faults(corpus: Corpus, i: int, decode: bool) -> list[Fault]:
    try:
        sample = corpus.read(i)
        what = (
            "" if content_digest(sample.media) == sample.sha256 else "the medium has another sha256 than its json says"
        )
        if decode and not what:
            what = _decode_fault(sample)
    except SampleError as error:
        what = error.detail
    return [Fault(corpus.shards[0], corpus.key(i), corpus.offset(i), what)] if what else []


def _decode_fault(sample: Sample) -> str:
    from data_pipeline.decode import probe  # PyAV takes a while to import

    try:
        found = probe(sample.media).frames
    except SampleError as error:
        return str(error)
    told = sample.probe.get("frames", found)
    return "" if found == told else f"it decodes to {found} frames, its json member says {told}"
