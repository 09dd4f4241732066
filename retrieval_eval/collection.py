"""An index with the shards that it was made from: what a clip that was found is, and where its bytes lie.

A clip is asked for by its name, which is its key, or `shard:key` where shards of others repeat a key. Names are looked
up among those of the index and are never made into a path.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipeline.schema import Kind, SampleError
from data_pipeline.shards import Corpus, Medium
from retrieval_eval.search import Searcher, said_source
from retrieval_eval.store import read_identity


@dataclass(frozen=True)
class ClipInfo:
    """What is known of one clip. `span` is the part of `source` it was cut from, in seconds, where the shard says so;
    `fault` why its shard no longer gives it.
    """

    name: str
    key: str
    captions: tuple[str, ...]
    shard: str
    offset: int
    kind: Kind
    seconds: float | None = None
    span: tuple[float, float] | None = None
    source: str = ""
    probe: dict[str, Any] | None = None
    fault: str = ""

    @property
    def time(self) -> str:
        """The time it covers, for people: of its source where that is known, else from its own start."""
        if self.span is not None:
            return f"{self.span[0]:.1f}–{self.span[1]:.1f} s"
        return "image" if self.kind == "image" else f"0.0–{self.seconds:.1f} s" if self.seconds else "–"


class Collection:
    """A searcher and the corpus of its clips; `kind` is that of the first of them."""

    def __init__(self, folder: Path, corpus: Corpus, searcher: Searcher) -> None:
        self.folder, self.corpus, self.searcher = folder, corpus, searcher
        clips = searcher.clips
        counted = Counter(clips.keys)
        self.names = [
            key if counted[key] == 1 else f"{self.corpus.shard(place)}:{key}"
            for key, place in zip(clips.keys, clips.index, strict=True)
        ]
        self._rows = {name: row for row, name in enumerate(self.names)}
        self._shards: dict[str, list[int]] = {}
        for row, place in enumerate(clips.index):
            self._shards.setdefault(self.corpus.shard(place), []).append(row)
        self.kind: Kind = "image" if self._meta(0).get("media") == "image" else "video"

    @classmethod
    def open(
        cls, folder: Path, checkpoint: Path | None = None, shards: Path | None = None, device: str = "auto"
    ) -> "Collection":
        """Open the folder of an index. Raises UserError where the checkpoint is not the one that made it, or the shards
        are not those it was made from; both may be said to lie elsewhere now.
        """
        corpus = open_corpus(folder, shards)  # first: that costs nothing beside loading the checkpoint
        made_from = read_identity(folder)["corpus"]
        if corpus.digest[:16] != made_from:
            raise UserError(
                f"The shards in {corpus.folder} are not those that {folder} was made from ({corpus.digest[:16]}, not "
                f"{made_from}).",
                "Give --shards the folder that was indexed, or build the index again with --fresh.",
            )
        return cls(folder, corpus, Searcher.open(folder, checkpoint, device))

    def __len__(self) -> int:
        return len(self.names)

    def row(self, name: str) -> int | None:
        """The row of a clip among the vectors, None where no clip is called so."""
        return self._rows.get(name)

    def shard_rows(self, shard: str) -> list[int] | None:
        """The rows of the clips in a shard, None where no shard is called so."""
        return self._shards.get(shard)

    def medium(self, row: int) -> Medium:
        """Where the clip's bytes lie; SampleError where its shard no longer holds it."""
        return self.corpus.medium(self.searcher.clips.index[row])

    def about(self, row: int) -> ClipInfo:
        """What is known of a clip."""
        clips, place = self.searcher.clips, self.searcher.clips.index[row]
        here = (self.corpus.shard(place), self.corpus.offset(place))
        name, key, captions = self.names[row], clips.keys[row], tuple(clips.captions[row])
        try:
            meta = self.corpus.read_meta(place)
        except SampleError as error:
            return ClipInfo(name, key, captions, *here, self.kind, fault=error.detail)
        probe = dict(meta.get("probe") or {})
        kind: Kind = "image" if meta.get("media") == "image" else "video"
        attributes = meta.get("attributes") or {}
        return ClipInfo(
            name, key, captions, *here, kind, _number(probe.get("duration")),
            _span(attributes), str(meta.get("source", "")), probe,
        )  # fmt: skip

    def _meta(self, row: int) -> dict[str, Any]:
        try:
            return self.corpus.read_meta(self.searcher.clips.index[row])
        except SampleError:
            return {}


def open_corpus(folder: Path, shards: Path | None = None) -> Corpus:
    """The shards that an index was made from, where they are now; UserError where they are not to be found."""
    where = shards or Path(said_source(folder)["corpus"])
    if not where.is_dir():
        raise UserError(f"The shards that {folder} was made from are not in {where}.", "Give --shards their folder.")
    return Corpus.open(where)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else None


def _span(attributes: dict[str, Any]) -> tuple[float, float] | None:
    for first, last in (("start", "end"), ("time_start", "time_end")):
        start, end = _number(attributes.get(first)), _number(attributes.get(last))
        if start is not None and end is not None and end > start:
            return start, end
    return None
