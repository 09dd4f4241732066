"""A sample of a corpus: its two members in a shard, and the typed reasons for which a clip can be lost.

In a shard a sample is `<key>.<mp4|webm|jpg...>`, the medium byte for byte, and `<key>.json`:
`captions` (list), `source` (the file it came from), `sha256` (of the medium), `media` ("video" or "image"),
`probe` (width, height, frames, fps, duration, codec, rotation) and, where the manifest had more columns,
`attributes` (a flat mapping of text, numbers and truth values). Shards that others made are read too: there the
captions are under `caption` or `text`, or in `<key>.txt`. Pure: no media library is needed here.
"""

import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol

Kind = Literal["video", "image"]

CAPTION_KEYS = ("captions", "caption", "text")  # ours, video2dataset's, and what others write

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class LossReason(StrEnum):
    """Why a clip is not in the corpus, or not in a batch."""

    MISSING_FILE = "missing_file"
    EMPTY_FILE = "empty_file"
    NOT_MEDIA = "not_media"
    NO_VIDEO_STREAM = "no_video_stream"
    TOO_SHORT = "too_short"
    DECODE_ERROR = "decode_error"
    TIMEOUT = "timeout"
    DUPLICATE = "duplicate"
    EMPTY_CAPTION = "empty_caption"
    DAMAGED_SHARD = "damaged_shard"
    BAD_SPAN = "bad_span"


class SampleError(Exception):
    """A fault of one sample's content, never of the machine: counted by `reason`, told by `detail`."""

    def __init__(self, reason: LossReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[LossReason, str]]:
        """Survive the trip out of a worker process."""
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class Sample:
    """One medium with its captions. `probe` and `attributes` are flat mappings (see the module's head)."""

    key: str
    media: bytes
    extension: str
    kind: Kind
    captions: tuple[str, ...]
    source: str
    sha256: str
    probe: dict[str, Any]
    attributes: dict[str, Any] = field(default_factory=dict)


class Samples(Protocol):
    """A sequence of samples that a loader can read: a corpus in shards, or a test set over a folder of files.

    `digest` names its content; `folder` is where it lies, for messages; `location(i)` names a sample in a fault.
    Reading raises SampleError for a fault of one sample.
    """

    folder: Path
    digest: str

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """The key of sample `i`."""
        ...

    def location(self, i: int) -> str:
        """How a fault of sample `i` is named."""
        ...

    def read(self, i: int) -> Sample:
        """Sample `i`."""
        ...

    def read_meta(self, i: int) -> dict[str, Any]:
        """The json member of sample `i`, or what stands for it."""
        ...


def as_captions(value: Any) -> tuple[str, ...]:
    """The captions that a value holds, as given: one text, or a list of texts; empty ones are left out."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(str(text) for text in values if text is not None and str(text).strip())


def captions_in(tree: dict[str, Any]) -> tuple[str, ...]:
    """The captions of a json member, ours or an outsider's: the first of CAPTION_KEYS that is filled."""
    return next((found for key in CAPTION_KEYS if (found := as_captions(tree.get(key)))), ())


def content_digest(media: bytes) -> str:
    """The identity of a medium: sha256 of its bytes, 64 hex digits."""
    return hashlib.sha256(media).hexdigest()


def encode_meta(sample: Sample) -> bytes:
    """The json member of a sample: UTF-8, keys in a fixed order, so that equal samples give equal bytes."""
    tree: dict[str, Any] = {
        "captions": list(sample.captions),
        "source": sample.source,
        "sha256": sample.sha256,
        "media": sample.kind,
        "probe": sample.probe,
    }
    if sample.attributes:
        tree["attributes"] = sample.attributes
    return _JSON.encode(tree).encode()


def decode_meta(data: bytes) -> dict[str, Any]:
    """The tree of a json member; raises SampleError(DAMAGED_SHARD) when it is not one of ours."""
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise SampleError(LossReason.DAMAGED_SHARD, f"the json member is not JSON ({error})") from error
    if isinstance(tree, dict) and not isinstance(tree.get("captions"), list) and (found := captions_in(tree)):
        tree["captions"] = list(found)
    if not isinstance(tree, dict) or not isinstance(tree.get("captions"), list):
        raise SampleError(LossReason.DAMAGED_SHARD, "the json member has no list of captions")
    return tree


def decode_text(data: bytes) -> dict[str, Any]:
    """The tree of an outsider's txt member, which is one caption; raises SampleError(DAMAGED_SHARD) for no UTF-8."""
    try:
        return {"captions": [data.decode().rstrip("\r\n")]}
    except UnicodeDecodeError as error:
        raise SampleError(LossReason.DAMAGED_SHARD, f"the txt member is not UTF-8 ({error})") from error


def sample_of(key: str, extension: str, media: bytes, meta: dict[str, Any]) -> Sample:
    """Join a medium and its decoded json member; what an outsider's shard leaves out is filled in."""
    kind: Kind = "image" if meta.get("media") == "image" else "video"
    return Sample(
        key=key,
        media=media,
        extension=extension,
        kind=kind,
        captions=tuple(meta["captions"]),
        source=str(meta.get("source", key)),
        sha256=str(meta.get("sha256") or content_digest(media)),
        probe=dict(meta.get("probe") or {}),
        attributes=dict(meta.get("attributes") or {}),
    )
