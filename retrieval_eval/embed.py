"""Clips of a corpus to one vector each, with the patch tokens that re-ranking needs, into a store, chunk by chunk.

Clips are decoded once for all views: the clip itself, its frames in a drawn, wrong order, and its middle frame
repeated (the same frames that EvalLoader's controls give).

V clips, B batch, T frames, N patch tokens, D width, E joint width.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import UserError
from data_pipeline.frames import shuffled_order
from data_pipeline.loader import Batch, EvalLoader
from data_pipeline.schema import Kind, Samples
from data_pipeline.sources import Part
from retrieval_eval.chunks import ChunkRows, Chunks
from retrieval_eval.encoders import Encoders
from retrieval_eval.store import CHUNK, RowWriter, Store, count_rows

log = logging.getLogger(__name__)

View = Literal["clips", "clips-shuffled", "clips-single"]
Tell = Callable[[str, int, int], None]
VECTORS, TOKENS, CLIPS = "vectors.npy", "tokens.f16", "clips.json"
EVERYTHING = Part()


def quiet(_what: str, _done: int, _total: int) -> None:
    """A `Tell` that says nothing."""


@dataclass(frozen=True)
class ClipList:
    """The clips of a corpus that could be read, in its order, and those that could not."""

    keys: list[str]
    index: list[int]
    captions: list[list[str]]
    lost: list[dict[str, str]]

    def queries(self, policy: Literal["all", "first"]) -> tuple[list[str], NDArray[np.int64]]:
        """The captions (C) by policy, and the row (C,) of the clip that each belongs to."""
        chosen = [captions if policy == "all" else captions[:1] for captions in self.captions]
        owner_C = np.repeat(np.arange(len(chosen)), [len(captions) for captions in chosen])
        return [caption for captions in chosen for caption in captions], owner_C.astype(np.int64)


def embed_clips(
    encoders: Encoders,
    corpus: Samples,
    store: Store,
    views: Sequence[View] = ("clips",),
    with_tokens: Sequence[View] = (),
    batch: int = 32,
    workers: int = 0,
    seed: int = 0,
    tell: Tell = quiet,
    kind: Kind = "video",
    part: Part = EVERYTHING,
) -> None:
    """Write the chunks of the pieces `views` that the store lacks, those of `with_tokens` with their patch tokens.

    With a `part` only that share of the chunks. Raises UserError if a value is not finite.
    """
    chunks = Chunks(len(corpus), store.chunk)
    mine = [chunk for chunk in range(len(chunks)) if part.has_turn(chunk)]
    missing = {chunk: _missing(store, chunks, chunk, views, with_tokens) for chunk in mine}
    todo = [chunk for chunk in mine if missing[chunk]]
    if not todo:
        log.info("embeddings of the clips are there (%s)", store.folder)
        return
    spans = [span for chunk in todo for span in chunks.batches(chunk, batch)]
    loader = EvalLoader(corpus, encoders.visual, batch, workers, kind=kind, seed=seed, spans=spans)
    sizes = {chunk: stop - start for chunk in mine for start, stop in [chunks.span(chunk)]}
    done = sum(sizes[chunk] for chunk in mine if chunk not in todo)
    batches = iter(loader)
    for chunk in todo:
        reads = islice(batches, len(chunks.batches(chunk, batch)))
        pieces = {view: chunks.piece(view, chunk) for view in missing[chunk]}
        _embed_chunk(encoders, store, pieces, with_tokens, reads)
        done += sizes[chunk]
        tell("clips", done, sum(sizes.values()))


def _missing(
    store: Store, chunks: Chunks, chunk: int, views: Sequence[View], with_tokens: Sequence[View]
) -> list[View]:
    return [view for view in views if not store.has(chunks.piece(view, chunk), *_files(view in with_tokens))]


def _embed_chunk(
    encoders: Encoders,
    store: Store,
    pieces: Mapping[View, str],
    with_tokens: Sequence[View],
    reads: Iterable[Batch],
) -> None:
    """Write the pieces of one chunk, by view, from its batches."""
    with ExitStack() as stack:
        folders = {view: stack.enter_context(store.writing(piece)) for view, piece in pieces.items()}
        tokens = {
            view: stack.enter_context(RowWriter(folder / TOKENS, np.float16))
            for view, folder in folders.items()
            if view in with_tokens
        }
        vectors: dict[View, list[Tensor]] = {view: [torch.empty(0, encoders.width)] for view in folders}
        clips = ClipList([], [], [], [])
        for read in reads:
            _note(clips, read)
            for view in folders if len(read) else ():
                made = encoders.clips(seen_as(view, read))
                vectors[view].append(made.vectors_BE.float().cpu())
                if view in tokens:
                    tokens[view].write(_half(made.patches_BND))
        for view, folder in folders.items():
            np.save(folder / VECTORS, finite(torch.cat(vectors[view]), "clip vectors"))
            (folder / CLIPS).write_text(json.dumps(clips.__dict__))


def seen_as(view: View, batch: Batch) -> Tensor:
    """The batch's frames (B, C, T, H, W) as a view shows them."""
    frames_BCTHW = batch.frames
    T = frames_BCTHW.shape[2]
    if view == "clips-single":
        return frames_BCTHW[:, :, T // 2 : T // 2 + 1].expand_as(frames_BCTHW)
    if view == "clips-shuffled":
        order_BT = torch.stack([torch.from_numpy(shuffled_order(T, seed)) for seed in batch.seeds.tolist()])
        return frames_BCTHW.gather(2, order_BT[:, None, :, None, None].expand_as(frames_BCTHW))
    return frames_BCTHW


def read_clips(store: Store, view: View = "clips") -> tuple[ClipList, NDArray[np.float32]]:
    """The clips of a view and their vectors (V, E); UserError where a chunk is missing, or no clip could be read."""
    pieces = whole(store, view, VECTORS, CLIPS)
    clips = ClipList([], [], [], [])
    for piece in pieces:
        for name, values in json.loads(store.path(piece, CLIPS).read_text()).items():
            getattr(clips, name).extend(values)
    if not clips.keys:
        raise UserError(
            f"Not one of the {len(clips.lost)} clips could be read (the first: {clips.lost[0]['detail']}).",
            "Run `videomamba data verify` on them, then this again with --fresh.",
            exit_code=1,
        )
    return clips, np.concatenate([np.load(store.path(piece, VECTORS)) for piece in pieces])


def read_tokens(store: Store, view: View = "clips") -> ChunkRows:
    """Patch tokens (V, N, D) of a view, memory-mapped, a clip at a time."""
    paths = [store.path(piece, TOKENS) for piece in whole(store, view, TOKENS)]
    return ChunkRows(paths, [count_rows(path) for path in paths])


def whole(store: Store, view: View, *names: str) -> list[str]:
    """The pieces of a view, all of them; UserError where one is not there."""
    pieces = Chunks(int(store.identity["samples"]), store.chunk).pieces(view)
    absent = sum(not store.has(piece, *names) for piece in pieces)
    if absent:
        raise UserError(
            f"{absent} of {len(pieces)} pieces of {store.folder / view} are not there.",
            "Run every part of `videomamba eval CONFIG --only embed` first, or the evaluation without --only.",
        )
    return pieces


def _files(tokens: bool) -> tuple[str, ...]:
    return (VECTORS, CLIPS, *([TOKENS] if tokens else []))


def _note(clips: ClipList, batch: Batch) -> None:
    clips.keys.extend(batch.keys)
    clips.index.extend(batch.index.tolist())
    clips.captions.extend(list(captions) for captions in batch.all_captions)
    clips.lost.extend(
        {"clip": loss.location, "reason": loss.reason.value, "detail": loss.detail} for loss in batch.losses
    )


def _half(patches_BND: Tensor) -> NDArray[np.float16]:
    half = patches_BND.to(torch.float16)
    if not torch.isfinite(half).all():
        raise UserError(
            "Patch tokens hold numbers that are not finite, or too large for 16 bits.",
            "Look at the losses of that checkpoint, or give rerank.top=0.",
            exit_code=1,
        )
    return half.cpu().numpy()


def finite(vectors: Tensor, what: str) -> NDArray[np.float32]:
    """As an array; UserError where a value is not finite."""
    if not torch.isfinite(vectors).all():
        raise UserError(f"Some {what} are not finite.", "Look at the losses of that checkpoint.", exit_code=1)
    return vectors.numpy()


def identity_of(encoders: Encoders, corpus: Samples, seed: int, chunk: int = CHUNK) -> dict[str, Any]:
    """What a store of this checkpoint and corpus is called by."""
    return {
        "checkpoint": encoders.digest,
        "step": encoders.meta.step,
        "visual": encoders.visual.digest,
        "text": encoders.text.digest,
        "corpus": corpus.digest[:16],
        "samples": len(corpus),
        "chunk": chunk,
        "precision": encoders.precision,
        "seed": seed,
    }
