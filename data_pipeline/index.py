"""The index beside a shard, in the text format of DALI's wds2idx (v1.2), which other readers know too.

The first line is `v1.2 <samples>`, then a line a sample holds `extension offset size filename` for each of its
members, separated by blanks; `offset` is where the member's data begins in the tar, in bytes.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from configs.errors import UserError

VERSION = "v1.2"
# A name may hold blanks: it ends where the next member's three other fields follow.
_MEMBER = re.compile(r"(\S+) (\d+) (\d+) (.+?)(?= \S+ \d+ \d+ |$)")
VIDEOS = "mp4 m4v mov webm mkv avi flv ts mts m2ts mpg mpeg wmv 3gp 3g2 ogv gif"
IMAGES = "jpg jpeg png webp bmp tif tiff ppm avif"
MEDIA = frozenset(f"{VIDEOS} {IMAGES}".split())
REBUILD = "Build the corpus again into an empty folder (`videomamba data build`)."


@dataclass(frozen=True)
class Member:
    """One file in a tar: extension without the dot, where its data begins, its size in bytes, its name."""

    extension: str
    offset: int
    size: int
    name: str


@dataclass(frozen=True)
class ShardIndex:
    """The index of one shard as columns, one row a sample: the medium, and the member with the captions.

    That member is the sample's json, or (`text` is true, in shards that others made) its txt.
    """

    keys: list[str]
    extensions: list[str]
    media_offset: npt.NDArray[np.int64]
    media_size: npt.NDArray[np.int64]
    meta_offset: npt.NDArray[np.int64]
    meta_size: npt.NDArray[np.int64]
    text: npt.NDArray[np.bool_]

    def end(self) -> int:
        """The least size in bytes that the tar must have: the end of its last member."""
        if not self.keys:
            return 0
        return int(max((self.media_offset + self.media_size).max(), (self.meta_offset + self.meta_size).max()))


def encode_index(samples: list[tuple[Member, ...]]) -> bytes:
    """The text of an index, a line a sample."""
    lines = [f"{VERSION} {len(samples)}"]
    lines += [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in members) for members in samples]
    return ("\n".join(lines) + "\n").encode()


def key_of(name: str) -> str:
    """WebDataset's key of a member: its path up to the first dot of the file name."""
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    return name if dot < 0 else name[:dot]


def read_index(path: Path) -> ShardIndex:
    """Parse an index, ours (a medium and a json member a sample) or wds2idx's own, which may list other members too.

    The medium is the first member that is one, the captions' member the first json or txt. Raises UserError for
    another version, a line that does not parse, or a count that disagrees with the first line.
    """
    text = path.read_text(encoding="utf-8")
    head, _, body = text.partition("\n")
    version, _, count = head.partition(" ")
    if version != VERSION or not count.strip().isdigit():
        raise UserError(f"{path} begins with '{head[:40]}', not with '{VERSION} <samples>'.", REBUILD, exit_code=1)
    samples, lines = int(count), body.count("\n")
    if lines != samples or not text.endswith("\n"):
        raise UserError(
            f"{path} promises {samples} samples, it holds {lines} whole lines.",
            f"The index is cut. {REBUILD}",
            exit_code=1,
        )
    try:
        tokens = body.split()
        if len(tokens) == 8 * samples and all(extension == "json" for extension in tokens[4::8]):
            return _columns(tokens)
        return _columns([token for line in body.splitlines() for token in _chosen(line)])
    except ValueError as error:
        raise UserError(f"{path} cannot be read as an index: {error}.", REBUILD, exit_code=1) from error


def _columns(tokens: list[str]) -> ShardIndex:
    """Of eight tokens a sample: extension, offset, size and name of the medium, then of the captions' member."""
    fields = [tokens[start::8] for start in range(8)]
    numbers = [np.array(fields[i], dtype=np.int64) if fields[i] else np.empty(0, np.int64) for i in (1, 2, 5, 6)]
    keys = [key_of(name) for name in fields[3]]
    text = np.array([extension.lower() == "txt" for extension in fields[4]], np.bool_)
    return ShardIndex(keys, fields[0], numbers[0], numbers[1], numbers[2], numbers[3], text)


def _chosen(line: str) -> list[str]:
    """The eight tokens of a line that may hold any number of members."""
    members = _MEMBER.findall(line)
    medium = next((member for member in members if member[0].lower() in MEDIA), None)
    told = next((member for member in members if member[0].lower() in ("json", "txt")), None)
    if medium is None or told is None:
        raise ValueError(f"expected a medium and a json or txt, found '{line[:80]}'")
    return [*medium, *told]
