"""Embed a corpus once, then find clips by a sentence."""

import json
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from data_pipeline.files import write_whole
from retrieval_eval.config import RetrievalData
from retrieval_eval.embed import Tell, embed_clips, identity_of, quiet, read_clips
from retrieval_eval.encoders import Encoders
from retrieval_eval.index import FlatIndex
from retrieval_eval.store import Store, read_identity
from retrieval_eval.testset import open_set

SOURCE = "source.json"


@dataclass(frozen=True)
class Hit:
    """A clip that was found: its dual score, its key and first caption, and its place in the corpus."""

    score: float
    key: str
    caption: str
    index: int


def embed_corpus(
    shards: Path,
    out: Path,
    checkpoint: Path,
    batch: int = 32,
    workers: int = 0,
    device: str = "auto",
    fresh: bool = False,
    tell: Tell = quiet,
) -> int:
    """Write the vectors of every clip of a corpus into the folder `out`; returns how many there are.

    What is there already, made by the same checkpoint from the same corpus, is left. Raises UserError otherwise.
    """
    found, encoders = open_set(RetrievalData(path=str(shards))), Encoders.load(checkpoint, device)
    store = Store(out, identity_of(encoders, found.corpus, seed=0), fresh)
    source = {"checkpoint": str(encoders.folder.resolve()), "corpus": str(shards.resolve())}
    write_whole(out / SOURCE, json.dumps(source, indent=2).encode())
    embed_clips(encoders, found.corpus, store, batch=batch, workers=workers, tell=tell, kind=found.kind)
    clips, _ = read_clips(store)
    return len(clips.keys)


def find(query: str, index: Path, top: int = 5, checkpoint: Path | None = None, device: str = "auto") -> list[Hit]:
    """The `top` clips of an index by their dual score with `query`, best first.

    `checkpoint` says where the checkpoint is now. Raises UserError if it is not the one that made the index.
    """
    identity = read_identity(index)
    encoders = Encoders.load(checkpoint or _source(index), device)
    if encoders.digest != identity["checkpoint"]:
        raise UserError(
            f"{encoders.folder} is not the checkpoint that made {index} ({encoders.digest}, not "
            f"{identity['checkpoint']}).",
            "Give --checkpoint the one that did, or embed again with --fresh.",
        )
    clips, vectors_VE = read_clips(Store(index, {name: value for name, value in identity.items() if name != "format"}))
    scores, rows = FlatIndex(vectors_VE).search(encoders.texts([query]).vectors_BE.cpu().numpy(), top)
    return [
        Hit(float(score), clips.keys[row], clips.captions[row][0], clips.index[row])
        for score, row in zip(scores[0], rows[0], strict=True)
    ]


def _source(index: Path) -> str:
    try:
        return str(json.loads((index / SOURCE).read_text())["checkpoint"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{index} does not say where its checkpoint is.", "Give --checkpoint.") from error
