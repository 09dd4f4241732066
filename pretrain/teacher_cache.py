"""What the teacher makes of clips that nothing changes, kept beside the data: filled once, read in every step.

The features are the same in every epoch only if the teacher's view is: whole clips, their middle frames, no crop, no
mirror image (`pretrain.config` refuses anything else, because a feature of the clip is wrong for its mirror image).
`videomamba teacher-cache CONFIG` fills it with the very batches that such a run sees; `teacher.cache` reads it.

B samples, J layers, L tokens, C width, K token frames, N patches a frame.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from configs.loader import digest
from data_pipeline.config import CorpusConfig
from data_pipeline.feature_cache import FeatureShards, FeatureSpec
from data_pipeline.loader import Batch, EvalLoader
from data_pipeline.shards import Corpus
from pretrain.config import PretrainConfig
from pretrain.models.teacher import ClipTeacher, TeacherOutput

CURE = "Fill it with `videomamba teacher-cache CONFIG`, or name another folder as teacher.cache."


class TeacherCache:
    """The caches of a run's corpora, in the order of `data.train`; read as the teacher would be asked."""

    def __init__(self, stores: list[FeatureShards]) -> None:
        self.stores = stores

    @classmethod
    def open(cls, config: PretrainConfig, teacher: ClipTeacher) -> "TeacherCache":
        """The caches that `config` names; UserError if one is not complete, or of another teacher or view."""
        stores = open_stores(config, teacher)
        for store in stores:
            store.require_complete()
        return cls(stores)

    def read(self, batch: Batch, device: torch.device) -> TeacherOutput:
        """What the teacher made of the batch's clips when the cache was filled."""
        held = self.stores[batch.corpus].read(batch.index.tolist(), device)
        return TeacherOutput(held["features"].transpose(0, 1).contiguous(), held.get("attention"))


def teacher_digest(teacher: ClipTeacher) -> str:
    """64 hex digits of the tower's weights and of everything that shapes what it gives."""
    made = hashlib.sha256()
    for name, tensor in sorted(teacher.visual.state_dict().items()):
        made.update(name.encode())
        made.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    settings = {
        "mean": list(teacher.mean), "std": list(teacher.std), "layers": list(teacher.layers), "stride": teacher.stride,
        "tubelet": teacher.tubelet, "ln_post": teacher.ln_post, "grid": list(teacher.tower.grid),
    }  # fmt: skip
    made.update(digest(settings).encode())
    return made.hexdigest()


def open_stores(config: PretrainConfig, teacher: ClipTeacher) -> list[FeatureShards]:
    """The cache of each corpus of `config`, whatever is in it yet."""
    assert config.teacher is not None  # asked by the callers
    assert config.teacher.cache is not None
    producer = teacher_digest(teacher)
    stores = []
    for item in config.data.train:
        corpus = Corpus.open(Path(item.path))
        view = digest({"kind": item.kind, "visual": config.data.visual().digest, "frames": config.data.frames.rule})
        spec = FeatureSpec(corpus.digest, len(corpus), producer, view, config.teacher.cache_width)
        stores.append(FeatureShards(Path(config.teacher.cache), spec, CURE))
    return stores


def fill(config: PretrainConfig, teacher: ClipTeacher, device: torch.device, batch: int) -> Iterator[tuple[int, int]]:
    """Fill what is missing of the caches, yielding (samples done, samples to do) after each shard.

    The tower runs at the precision of the run, in whose place this stands.
    """
    stores = open_stores(config, teacher)
    todo = sum(stop - start for store in stores for start, stop in map(store.span, store.missing()))
    done = 0
    yield done, todo
    for item, store in zip(config.data.train, stores, strict=True):
        missing = store.missing()
        batches = iter(_unchanged(config, item, batch, [_cut(*store.span(shard), batch) for shard in missing]))
        for shard in missing:
            start, stop = store.span(shard)
            parts = [part for part in (next(batches) for _ in _cut(start, stop, batch)) if len(part)]
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                made = [teacher(part.frames.to(device)) for part in parts]
            features = {"features": torch.cat([out.features_JBLC.transpose(0, 1) for out in made])} if made else {}
            seen = [out.attention_BKN for out in made if out.attention_BKN is not None]
            attention = {"attention": torch.cat(seen)} if seen else {}
            store.write(shard, [index for part in parts for index in part.index.tolist()], features, attention)
            done += stop - start
            yield done, todo


def _cut(start: int, stop: int, batch: int) -> list[tuple[int, int]]:
    return [(first, min(first + batch, stop)) for first in range(start, stop, batch)]


def _unchanged(
    config: PretrainConfig, item: CorpusConfig, batch: int, shards: list[list[tuple[int, int]]]
) -> EvalLoader:
    """The clips of these spans of a corpus as a run without augmentation sees them."""
    visual = config.data.visual()
    return EvalLoader(
        item.path,
        visual.model_copy(update={"frames": 1}) if item.kind == "image" else visual,
        batch=batch,
        workers=config.data.workers,
        kind=item.kind,
        cache=config.data.cache,
        spans=[span for spans in shards for span in spans],
    )
