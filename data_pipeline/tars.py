"""Tars that others made, sample by sample: WebDataset's grouping by key, and which member holds the captions."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.index import MEDIA, key_of
from data_pipeline.schema import CAPTION_KEYS, SampleError, as_captions, captions_in, decode_text
from data_pipeline.tables import flat

_OURS = ("source", "sha256", "media", "probe")  # keys of a json member that a build writes anew


@dataclass(frozen=True)
class TarSample:
    """The members of one key: the medium, and the member that holds its captions (None where there is none)."""

    key: str
    members: list[tarfile.TarInfo]
    medium: tarfile.TarInfo | None
    told: tarfile.TarInfo | None
    captions: tuple[str, ...]
    attributes: dict[str, Any]
    fault: str | None = None


def walk(path: Path) -> Iterator[TarSample]:
    """The samples of a tar, in its order; raises tarfile.TarError where it breaks off, after what stands before."""
    with tarfile.open(path, "r:") as tar:
        group: list[tarfile.TarInfo] = []
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would remember every header
            if group and key_of(member.name) != key_of(group[0].name):
                yield _sample(tar, group)
                group = []
            if member.isfile():
                group.append(member)
        if group:
            yield _sample(tar, group)
        _expect_end(tar)


def extension_of(member: tarfile.TarInfo) -> str:
    """What follows the key in a member's name, without the dot."""
    return member.name[len(key_of(member.name)) + 1 :]


def told_in(tree: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions and attributes of a side-car's or a sample's json: a text, a list of texts, or a mapping."""
    if not isinstance(tree, dict):
        return as_captions(tree), {}
    given = tree.get("attributes")
    if not isinstance(given, dict):
        given = {key: cell for key, cell in tree.items() if key not in (*CAPTION_KEYS, *_OURS)}
    return captions_in(tree), {key: value for key, cell in given.items() if (value := flat(cell)) is not None}


def _sample(tar: tarfile.TarFile, group: list[tarfile.TarInfo]) -> TarSample:
    """The captions are those of the json, or where it has none those of the txt."""
    key = key_of(group[0].name)
    by_extension = {extension_of(member).lower(): member for member in group}
    medium = next((member for extension, member in by_extension.items() if extension in MEDIA), None)
    told, text = by_extension.get("json"), by_extension.get("txt")
    captions: tuple[str, ...] = ()
    attributes: dict[str, Any] = {}
    fault = None if medium else f"no medium among its members ({', '.join(by_extension)})"
    try:
        if told is not None:
            captions, attributes = told_in(json.loads(_content(tar, told)))
        if text is not None and not captions:
            told, captions = text, as_captions(decode_text(_content(tar, text))["captions"])
    except (ValueError, SampleError) as error:
        fault = f"its json or txt member cannot be read ({error})"
    return TarSample(key, group, medium, told, captions, attributes, fault)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _expect_end(tar: tarfile.TarFile) -> None:
    """Raise where the walk stopped at a damaged header, which `tarfile` takes for the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header stands at {tar.offset}")
