"""Embed a corpus once, index it exactly or approximately, then find clips by a sentence."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UserError
from configs.files import write_whole
from retrieval_eval.approximate import Kind, Recall, build, recall, sample_rows
from retrieval_eval.config import RetrievalData
from retrieval_eval.embed import ClipList, Tell, embed_clips, identity_of, quiet, read_clips
from retrieval_eval.encoders import Encoders
from retrieval_eval.index import DeviceIndex, VectorIndex, Vectors, load_faiss, open_index
from retrieval_eval.store import CHUNK, Store, read_identity
from retrieval_eval.testset import open_set

if TYPE_CHECKING:
    from torch import Tensor

SOURCE, PIECE = "source.json", "index"
RECALL_QUERIES, RECALL_NOISE, RECALL_K = 1000, 0.2, 10


@dataclass(frozen=True)
class Hit:
    """A clip that was found: its dual score, its key and first caption, and its place in the corpus.

    `row` is its place among the vectors, which leave out the clips that could not be read.
    """

    score: float
    key: str
    caption: str
    index: int
    row: int


def embed_corpus(
    shards: Path,
    out: Path,
    checkpoint: Path,
    batch: int = 32,
    workers: int = 0,
    device: str = "auto",
    fresh: bool = False,
    tell: Tell = quiet,
    chunk: int = CHUNK,
) -> int:
    """Write the vectors of every clip of a corpus into the folder `out`; returns how many there are.

    What is there already, made by the same checkpoint from the same corpus, is left; `chunk` clips are finished, and
    leave memory, together. Raises UserError for a folder that was made otherwise.
    """
    found, encoders = open_set(RetrievalData(path=str(shards))), Encoders.load(checkpoint, device)
    store = Store(out, identity_of(encoders, found.corpus, seed=0, chunk=chunk), fresh)
    source = {"checkpoint": str(encoders.folder.resolve()), "corpus": str(shards.resolve())}
    write_whole(out / SOURCE, json.dumps(source, indent=2).encode())
    embed_clips(encoders, found.corpus, store, batch=batch, workers=workers, tell=tell, kind=found.kind)
    clips, _ = read_clips(store)
    return len(clips.keys)


def write_index(folder: Path, kind: Kind, seed: int = 0) -> Recall:
    """Build the piece `index` over the vectors of a folder of embeddings, and measure its recall on some of them.

    Queries are the collection's own vectors with noise, since no sentences belong to it. Raises UserError where the
    collection is too small for the kind.
    """
    store = _store(folder)
    _, vectors_VE = read_clips(store)
    built = build(kind, vectors_VE)
    rows = sample_rows(len(vectors_VE), RECALL_QUERIES, seed)
    noise = np.random.default_rng(seed).standard_normal((len(rows), vectors_VE.shape[1])) / vectors_VE.shape[1] ** 0.5
    found = recall(built, vectors_VE, (vectors_VE[rows] + RECALL_NOISE * noise).astype(np.float32), RECALL_K)
    said = {"kind": kind, "vectors": len(built), "recall": found._asdict(), "faiss": load_faiss().__version__}
    with store.writing(PIECE) as piece:
        (piece / "index.faiss").write_bytes(built.to_bytes())
        (piece / "index.json").write_text(json.dumps(said, indent=2))
    return found


@dataclass(frozen=True)
class Searcher:
    """A folder of embeddings with the checkpoint that made it, opened once and asked often.

    `kind` is that of the index, `identity` what the folder was made by (store.py).
    """

    encoders: Encoders
    clips: ClipList
    vectors_VE: Vectors
    index: VectorIndex | DeviceIndex
    kind: str
    identity: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, checkpoint: Path | None = None, device: str = "auto") -> "Searcher":
        """Open a folder; `checkpoint` says where the checkpoint is now. UserError if it did not make the embeddings."""
        identity = read_identity(folder)
        encoders = Encoders.load(checkpoint or said_source(folder)["checkpoint"], device)
        _refuse_other(encoders, identity, folder)
        store = _store(folder)
        clips, vectors_VE = read_clips(store)
        kind, index = _open_index(store, vectors_VE, device)
        return cls(encoders, clips, vectors_VE, index, kind, identity)

    def __len__(self) -> int:
        return len(self.clips.keys)

    def find(self, query: str, top: int = 5) -> list[Hit]:
        """The `top` clips by their dual score with a sentence, best first."""
        return self.nearest(self.text_vectors([query])[0], top)

    def text_vectors(self, queries: list[str]) -> Vectors:
        """The unit vectors (B, E) of some sentences."""
        vectors_BE: Vectors = self.encoders.texts(queries).vectors_BE.cpu().numpy()
        return vectors_BE

    def tokens(self, query: str) -> int:
        """How many tokens a sentence has, [CLS] and [SEP] included; the text tower reads `encoders.text.max_tokens`."""
        self.encoders.tokenizer.no_truncation()
        return len(self.encoders.tokenizer.encode(self.encoders.text.clean_caption(query)).ids)

    def clip_vector(self, frames_BCTHW: "Tensor") -> Vectors:
        """The vector (E,) of one clip of uint8 frames, made a unit vector: as a query only its direction counts."""
        return as_unit(self.encoders.clips(frames_BCTHW).vectors_BE[0].float().cpu().numpy())

    def nearest(self, vector_E: Vectors, top: int) -> list[Hit]:
        """The `top` clips by the inner product of their vector with `vector_E`, best first."""
        scores, rows = self.index.search(vector_E[None], top)
        return [
            Hit(float(score), self.clips.keys[row], self.clips.captions[row][0], self.clips.index[row], int(row))
            for score, row in zip(scores[0], rows[0], strict=True)
            if row >= 0  # an approximate index may find fewer
        ]


def as_unit(vector_E: Vectors) -> Vectors:
    """A vector (E,) scaled to length 1; one of zeros as it is."""
    unit: Vectors = vector_E / np.float32(max(float(np.linalg.norm(vector_E)), 1e-12))
    return unit


def find(query: str, index: Path, top: int = 5, checkpoint: Path | None = None, device: str = "auto") -> list[Hit]:
    """The `top` clips of a folder of embeddings for one sentence; see Searcher."""
    return Searcher.open(index, checkpoint, device).find(query, top)


def _store(folder: Path) -> Store:
    return Store(folder, {name: value for name, value in read_identity(folder).items() if name != "format"})


def _open_index(store: Store, vectors_VE: Vectors, device: str) -> tuple[str, VectorIndex | DeviceIndex]:
    """The index that was built, or an exact one made now."""
    if not store.has(PIECE, "index.faiss", "index.json"):
        return "flat", open_index(vectors_VE, device)
    said = json.loads(store.path(PIECE, "index.json").read_text())
    built = VectorIndex.from_bytes(store.path(PIECE, "index.faiss").read_bytes())
    if len(built) != len(vectors_VE):
        raise UserError(
            f"The index in {store.folder} holds {len(built)} vectors, the embeddings {len(vectors_VE)}.",
            "Build it again with `videomamba index`.",
        )
    return str(said["kind"]), built


def said_source(index: Path) -> dict[str, str]:
    """Where the checkpoint and the shards were when the embeddings in `index` were made."""
    try:
        said = json.loads((index / SOURCE).read_text())
        return {"checkpoint": str(said["checkpoint"]), "corpus": str(said["corpus"])}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{index} does not say where its checkpoint is.", "Give --checkpoint.") from error


def _refuse_other(encoders: Encoders, identity: dict[str, Any], folder: Path) -> None:
    """UserError if the preprocessing or anything else of the checkpoint is not what made the embeddings."""
    again = "Give --checkpoint the one that did, or make the index again with --fresh."
    for what, digest in (("visual", encoders.visual.digest), ("text", encoders.text.digest)):
        if digest != identity[what]:
            raise UserError(
                f"{encoders.folder} has another {what} preprocessing ({digest}) than the checkpoint that made {folder} "
                f"({identity[what]}).",
                again,
            )
    if encoders.digest != identity["checkpoint"]:
        raise UserError(
            f"{encoders.folder} is not the checkpoint that made {folder} ({encoders.digest}, not "
            f"{identity['checkpoint']}).",
            again,
        )
