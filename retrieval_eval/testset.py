"""What an evaluation searches, opened: a corpus in shards or a published test set, and what a result says of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from data_pipeline.schema import Kind, SampleError, Samples
from data_pipeline.shards import CARD, Corpus
from data_pipeline.world import DISCLAIMER
from retrieval_eval.benchmarks import load
from retrieval_eval.config import BenchmarkData, RetrievalData
from retrieval_eval.embed import ClipList
from retrieval_eval.media import BenchmarkCorpus


@dataclass(frozen=True)
class TestSet:
    """Clips with captions. `protocol` is every choice and hash of the data that a result has to name."""

    corpus: Samples
    kind: Kind
    captions: Literal["all", "first"]
    protocol: dict[str, Any]
    answers: tuple[int, ...] | None = None
    """In multiple choice, which caption of each entry is right, in the corpus's order."""

    __test__ = False  # not a class of tests, whatever pytest makes of its name

    @property
    def missing(self) -> dict[str, str]:
        """The entries without a medium, and why; a corpus in shards has none."""
        return self.corpus.missing if isinstance(self.corpus, BenchmarkCorpus) else {}

    def all_captions(self) -> list[str]:
        """The captions of every entry that are queries by the policy, readable or not; no medium is decoded."""
        if isinstance(self.corpus, BenchmarkCorpus):
            of_each = [entry.captions for entry in self.corpus.entries]
        else:
            of_each = [self._captions(i) for i in range(len(self.corpus))]
        return [caption for one in of_each for caption in (one if self.captions == "all" else one[:1])]

    def _captions(self, i: int) -> tuple[str, ...]:
        try:
            return tuple(c for c in map(str, self.corpus.read_meta(i)["captions"]) if c.strip())
        except SampleError:  # counted where the clip itself is read
            return ()

    def manifest(self) -> list[dict[str, Any]]:
        """The table of a published set's media (see BenchmarkCorpus.manifest); UserError for a corpus in shards."""
        if not isinstance(self.corpus, BenchmarkCorpus):
            raise UserError(f"{self.corpus.folder} is a corpus already.", "Train on it as it is.")
        return self.corpus.manifest()

    def lines(self) -> list[str]:
        """What was found, for people: the data of an evaluation before it begins."""
        if not isinstance(self.corpus, BenchmarkCorpus):
            size = f"{len(self.corpus)} samples in {self.protocol['shards']} shards"
            return [f"corpus {self.corpus.folder}: {size}, digest {self.corpus.digest[:16]}"]
        missing = self.missing
        found = len(self.corpus) - len(missing)
        head = (
            f"{self.protocol['benchmark']['type']}: {self.protocol['benchmark']['sentences']} sentences, "
            f"{len(self.corpus)} {self.kind}s, {found} found in {self.corpus.folder}, {len(missing)} missing"
        )
        return [head, *(f"missing {name}: {why}" for name, why in missing.items())]


def answers(found: TestSet, clips: ClipList) -> NDArray[np.int64] | None:
    """The right caption of each clip that could be read, (V,); None where the set is no multiple choice."""
    return None if found.answers is None else np.array([found.answers[place] for place in clips.index], dtype=np.int64)


def open_set(data: RetrievalData | BenchmarkData) -> TestSet:
    """Open the data of an evaluation; UserError where annotations or media are not what they should be."""
    if isinstance(data, RetrievalData):
        shards = Corpus.open(Path(data.path))
        path = shards.folder / CARD
        card = json.loads(path.read_text()) if path.is_file() else {}
        protocol = {
            "corpus": str(shards.folder),
            "corpus_digest": shards.digest,
            "shards": len(shards.shards),
            "split": card.get("name"),
        }
        if "world" in card:
            protocol |= {"world": card["world"], "note": DISCLAIMER}
        return TestSet(shards, _kind(shards), data.captions, protocol)
    benchmark = load(data)
    corpus = BenchmarkCorpus(benchmark.entries, Path(data.media))
    chosen = data.model_dump(mode="json", exclude={"workers", "annotations", "videos", "media", "captions"})
    protocol = {
        "corpus": str(corpus.folder),
        "corpus_digest": corpus.digest,
        "split": data.type,
        "benchmark": chosen | {"sentences": benchmark.sentences, "videos": len(corpus), "files": benchmark.files},
    }
    answers = tuple(e.answer for e in benchmark.entries if e.answer is not None) or None
    return TestSet(corpus, _kind(corpus), data.captions, protocol, answers)


def _kind(corpus: Samples) -> Kind:
    """Videos or images, as the first sample that can be read says; a set of one kind is assumed."""
    for i in range(len(corpus)):
        try:
            return "image" if corpus.read_meta(i).get("media") == "image" else "video"
        except SampleError:
            continue
    raise UserError(
        f"Not one of the {len(corpus)} videos of this set is in {corpus.folder}.",
        "Give the folder that holds them, by their names in the annotations.",
    )
