"""The media of a test set, found by name in a folder of files or in shards, read as a corpus is.

A file belongs to an entry whose name it bears, with or without its extension: sets name `video7020`, `x.mov` or
`<youtube id>_15_27`, and people keep them as `video7020.mp4`. A file that is called exactly as another entry is that
entry's alone, so that DiDeMo's `x.mov` and `x.mp4` are two videos where both are there.

Nothing is dropped: an entry without a file stays in the corpus, and reading it is a typed loss.
"""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipeline.schema import Kind, LossReason, Sample, SampleError, content_digest
from data_pipeline.shards import Corpus
from retrieval_eval.benchmarks import IMAGE_SUFFIXES, MEDIA_SUFFIXES, Entry, stem


class FileShelf:
    """Media files under a folder, at any depth, by their path below it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in MEDIA_SUFFIXES | {"", "."})
        self.names = [str(path.relative_to(folder)) for path in found if path.is_file()]

    def stamp(self, place: int) -> str:
        """What changes when the file does: its name, size and time of change."""
        seen = (self.folder / self.names[place]).stat()
        return f"{self.names[place]}:{seen.st_size}:{seen.st_mtime_ns}"

    def read(self, place: int) -> Sample:
        """The file as a sample without captions; SampleError where it cannot be read."""
        path = self.folder / self.names[place]
        try:
            media = path.read_bytes()
        except OSError as error:
            raise SampleError(LossReason.MISSING_FILE, f"{path}: {error.strerror}") from error
        kind: Kind = "image" if path.suffix.lower() in IMAGE_SUFFIXES else "video"
        return Sample(path.stem, media, path.suffix[1:], kind, (), str(path), content_digest(media), {})


class ShardShelf:
    """The samples of a corpus in shards, by the file each came from."""

    def __init__(self, folder: Path) -> None:
        self.corpus = Corpus.open(folder)
        self.names = [str(meta.get("source") or self.corpus.key(i)) for i, meta in enumerate(self.corpus.metas())]

    def stamp(self, place: int) -> str:
        """The corpus's own digest and the place in it."""
        return f"{self.corpus.digest}:{place}"

    def read(self, place: int) -> Sample:
        """The sample; SampleError where its bytes are not what the index says."""
        return self.corpus.read(place)


def open_shelf(folder: Path) -> FileShelf | ShardShelf:
    """A folder of shards if it holds tars, else of media files; UserError where there is neither."""
    if not folder.is_dir():
        raise UserError(f"There is no folder of media {folder}.", "Give data.media the folder that holds the videos.")
    if any(folder.glob("*.tar")):
        return ShardShelf(folder)
    shelf = FileShelf(folder)
    if not shelf.names:
        raise UserError(
            f"{folder} holds no media files.", f"Put the set's videos there ({', '.join(sorted(MEDIA_SUFFIXES)[:6])})."
        )
    return shelf


def match(entries: list[Entry], names: list[str]) -> list[int | str]:
    """For each entry the place of its file among `names` (paths), or why there is none."""
    asked = {entry.name for entry in entries}
    exact = {Path(name).name: place for place, name in enumerate(names)}
    counted = Counter(stem(Path(name).name) for name in names)
    loose = {stem(Path(name).name): place for place, name in enumerate(names)}
    found: list[int | str] = []
    for entry in entries:
        bare = stem(entry.name)
        if entry.name in exact:
            found.append(exact[entry.name])
        elif bare not in loose:
            found.append(f"no file is called {entry.name}")
        elif counted[bare] > 1:
            found.append(f"{counted[bare]} files are called {bare}, and none of them {entry.name}")
        elif Path(names[loose[bare]]).name in asked:
            found.append(f"{Path(names[loose[bare]]).name} is another video of the set")
        else:
            found.append(loose[bare])
    return found


class BenchmarkCorpus:
    """The videos of a test set in its order, each with its captions: read as a Corpus is, without shards of its own."""

    def __init__(self, entries: list[Entry], folder: Path) -> None:
        self.folder = folder
        self.entries = entries
        self.shelf = open_shelf(folder)
        self.places = match(entries, self.shelf.names)
        digest = hashlib.sha256()
        for entry, place in zip(entries, self.places, strict=True):
            stamp = self.shelf.stamp(place) if isinstance(place, int) else ""
            digest.update(repr((entry.name, entry.captions, entry.answer, stamp)).encode())
        self.digest = digest.hexdigest()
        self._last: tuple[int, Sample] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def missing(self) -> dict[str, str]:
        """The entries without a file, and why."""
        return {e.name: p for e, p in zip(self.entries, self.places, strict=True) if isinstance(p, str)}

    @property
    def keys(self) -> list[str]:
        """The names of the entries, in order."""
        return [entry.name for entry in self.entries]

    def key(self, i: int) -> str:
        """The name of entry `i`."""
        return self.entries[i].name

    def location(self, i: int) -> str:
        """The name by which a fault of entry `i` is told."""
        place = self.places[i]
        return self.entries[i].name if isinstance(place, str) else f"{self.entries[i].name} ({self.shelf.names[place]})"

    def read(self, i: int) -> Sample:
        """The medium of entry `i` with the entry's captions; SampleError(MISSING_FILE) where it has none."""
        if self._last is not None and self._last[0] == i:
            return self._last[1]
        place = self.places[i]
        if isinstance(place, str):
            raise SampleError(LossReason.MISSING_FILE, place)
        entry = self.entries[i]
        sample = replace(self.shelf.read(place), key=entry.name, captions=entry.captions)
        self._last = (i, sample)
        return sample

    def read_meta(self, i: int) -> dict[str, Any]:
        """What the json member of a shard would hold, as far as reading needs it."""
        sample = self.read(i)
        return {"captions": list(sample.captions), "sha256": sample.sha256, "media": sample.kind, "probe": sample.probe}

    def manifest(self) -> list[dict[str, Any]]:
        """A row an entry whose medium was found, for `videomamba data build --preset umt`: its path and its captions.

        So the train split of a set becomes a corpus by the rules that its test split is read by. UserError where the
        media are in shards, which are a corpus already.
        """
        if isinstance(self.shelf, ShardShelf):
            raise UserError(
                f"{self.folder} holds shards, not the files that a table could name.", "Train on the shards themselves."
            )
        found = zip(self.entries, self.places, strict=True)
        return [
            {"video": self.shelf.names[place], "caption": list(entry.captions)}
            for entry, place in found
            if isinstance(place, int)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}
