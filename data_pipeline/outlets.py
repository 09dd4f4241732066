"""Where prepared clips go, a shard at a time, the ledger following: into new shards, or as indexes beside old ones."""

import contextlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from configs.files import disk_errors, write_whole
from data_pipeline.index import Member, encode_index, key_of
from data_pipeline.ledger import Done, Ledger, Loss, Planned
from data_pipeline.schema import Sample
from data_pipeline.shards import ShardWriter, shard_number
from data_pipeline.tars import extension_of, walk


class Outlet(Protocol):
    """A context manager that takes the clips of a build in order; what is not settled when it is left is not done."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def add(self, planned: Planned, sample: Sample, done: Done) -> None:
        """Take a clip that is good."""

    def lose(self, planned: Planned, loss: Loss) -> None:
        """Take note of one that is lost, so that it is settled with its neighbours."""

    def holder(self, sha256: str) -> str | None:
        """The file of a clip with this content among those that are not settled yet."""


@dataclass
class _Open:
    """What has come since the last shard was settled."""

    done: list[Done] = field(default_factory=list)
    lost: list[Loss] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # content to file

    def settle(self, ledger: Ledger, shard: str, offsets: list[int]) -> None:
        ledger.settle(shard, zip(self.done, offsets, strict=True), self.lost)
        self.done.clear()
        self.lost.clear()
        self.files.clear()


class NewShards:
    """Writes samples into new shards; numbers go on behind those that the ledger has."""

    def __init__(self, folder: Path, name: str, samples_per_shard: int, ledger: Ledger) -> None:
        known = ledger.stream("SELECT DISTINCT shard FROM clips WHERE shard IS NOT NULL")
        first = max((shard_number(row[0]) for row in known), default=-1) + 1
        self._ledger = ledger
        self._open = _Open()
        self._writer = ShardWriter(folder, name, samples_per_shard, first=first, finished=self._settle)

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)
        if kind is None and self._open.lost:
            self._open.settle(self._ledger, "", [])

    def add(self, planned: Planned, sample: Sample, done: Done) -> None:
        """Write it."""
        self._open.done.append(done)
        self._open.files[sample.sha256] = planned.clip.file
        self._writer.write(sample)

    def lose(self, planned: Planned, loss: Loss) -> None:  # noqa: ARG002  the protocol's
        """Keep it for the end of the shard."""
        self._open.lost.append(loss)

    def holder(self, sha256: str) -> str | None:
        """The file with this content in the shard that is being written."""
        return self._open.files.get(sha256)

    def _settle(self, shard: str, members: list[tuple[Member, ...]]) -> None:
        self._open.settle(self._ledger, shard, [medium.offset for medium, _ in members])


class InPlace:
    """Writes an index beside each tar that names the good samples in it; the tars stay as they are."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self._folder = folder
        self._ledger = ledger
        self._open = _Open()
        self._offsets: list[int] = []
        self._tar = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._turn_to("")

    def add(self, planned: Planned, sample: Sample, done: Done) -> None:
        """Note where it is."""
        tar, offset, _ = planned.clip.inside or ("", 0, 0)
        self._turn_to(tar)
        name = planned.clip.file.removeprefix(f"{tar}:")
        self._open.done.append(replace(done, key=key_of(name)))
        self._open.files[sample.sha256] = planned.clip.file
        self._offsets.append(offset)

    def lose(self, planned: Planned, loss: Loss) -> None:
        """Keep it for the end of the tar."""
        self._turn_to(planned.clip.inside[0] if planned.clip.inside else self._tar)
        self._open.lost.append(loss)

    def holder(self, sha256: str) -> str | None:
        """The file with this content in the tar that is at hand."""
        return self._open.files.get(sha256)

    def _turn_to(self, tar: str) -> None:
        """Settle the tar that came before, once another comes."""
        if self._tar not in ("", tar):
            known = {
                int(row[0])
                for row in self._ledger.stream(
                    "SELECT offset FROM clips WHERE shard = ? AND status = 'done'", self._tar
                )
            }
            path = self._folder / self._tar
            with disk_errors(path):
                samples = list(_members(path, known | set(self._offsets)))
                write_whole(path.with_suffix(".idx"), encode_index(samples))
            self._open.settle(self._ledger, self._tar, self._offsets)
            self._offsets.clear()
        self._tar = tar


def _members(path: Path, media: set[int]) -> Iterator[tuple[Member, ...]]:
    """The members of each sample whose medium begins at one of these offsets: the medium, its captions', the others.

    A tar that breaks off keeps what stands before; the ledger has a row for the break.
    """
    with contextlib.suppress(tarfile.TarError):
        for sample in walk(path):
            if sample.medium is not None and sample.told is not None and sample.medium.offset_data in media:
                first = [sample.medium, sample.told]
                members = [*first, *(member for member in sample.members if member not in first)]
                yield tuple(Member(extension_of(m), m.offset_data, m.size, m.name) for m in members)
