"""A corpus to one vector a clip and one a text, with what re-ranking needs, into a store.

Clips are decoded once for all views: the clip itself, its frames in a drawn, wrong order, and its middle frame
repeated (the same frames that EvalLoader's controls give). Equal texts are encoded once, so that equal texts have
equal scores.

V clips, C captions, U different texts, B batch, T frames, N patch tokens, L words, D widths, E joint width.
"""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import UserError
from data_pipeline.frames import shuffled_order
from data_pipeline.loader import Batch, EvalLoader
from data_pipeline.schema import Kind, Samples
from pretrain.tokenizer import tokenize
from retrieval_eval.decoder import PairScorer
from retrieval_eval.encoders import Encoders
from retrieval_eval.store import RowWriter, Store, read_rows

log = logging.getLogger(__name__)

View = Literal["clips", "clips-shuffled", "clips-single"]
Tell = Callable[[str, int, int], None]
VECTORS, TOKENS, STATES = "vectors.npy", "tokens.f16", "states.f32"


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


@dataclass(frozen=True)
class TextStates:
    """What re-ranking starts from: `states_ULD` float32 (memory-mapped) and the words of each text."""

    states_ULD: NDArray[np.float32]
    lengths_U: NDArray[np.int64]

    def take(self, texts_P: NDArray[np.int64], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """States (P, L, D) of some texts and their mask (P, L), cut at the longest of them."""
        lengths_P = self.lengths_U[texts_P]
        longest = min(int(lengths_P.max()), self.states_ULD.shape[1])
        states = torch.from_numpy(np.ascontiguousarray(self.states_ULD[texts_P, :longest]))
        mask_PL = torch.arange(longest)[None] < torch.from_numpy(lengths_P)[:, None]
        return states.to(device), mask_PL.to(device)


@dataclass(frozen=True)
class TextTable:
    """The different texts of some captions: `text_of_C[c]` is the row of caption c."""

    texts: list[str]
    text_of_C: NDArray[np.int64]
    vectors_UE: NDArray[np.float32]
    cut: int
    """How many of the texts had more tokens than the checkpoint reads."""


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
) -> None:
    """Write the pieces `views` that the store does not hold yet, those of `with_tokens` with their patch tokens.

    Raises UserError if no clip can be read, or a value is not finite.
    """
    missing = [view for view in views if not store.has(view, *_files(view in with_tokens))]
    if not missing:
        log.info("embeddings of the clips are there (%s)", store.folder)
        return
    loader = EvalLoader(corpus, encoders.visual, batch, workers, kind=kind, seed=seed)
    with ExitStack() as stack:
        pieces = {view: stack.enter_context(store.writing(view)) for view in missing}
        tokens = {
            view: stack.enter_context(RowWriter(pieces[view] / TOKENS, np.float16))
            for view in missing
            if view in with_tokens
        }
        vectors: dict[str, list[Tensor]] = {view: [] for view in missing}
        clips = ClipList([], [], [], [])
        for read in loader:
            _note(clips, read)
            for view in missing if len(read) else ():
                made = encoders.clips(seen_as(view, read))
                vectors[view].append(made.vectors_BE.float().cpu())
                if view in tokens:
                    tokens[view].write(_half(made.patches_BND))
            tell("clips", int(read.step + 1) * batch, len(corpus))
        if not clips.keys:
            raise UserError(
                f"Not one clip of {corpus.folder} could be read.", "Run `videomamba data verify` on it.", exit_code=1
            )
        for view in missing:
            np.save(pieces[view] / VECTORS, _finite(torch.cat(vectors[view]), "clip vectors"))
            (pieces[view] / "clips.json").write_text(json.dumps(clips.__dict__))


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


def embed_texts(
    encoders: Encoders, captions: list[str], store: Store, with_states: bool, batch: int = 256, tell: Tell = quiet
) -> TextTable:
    """Write the piece `texts` for the different captions, cleaned, unless the store holds it; returns it."""
    cleaned = [encoders.text.clean_caption(caption) for caption in captions]
    texts, text_of_C = np.unique(np.array(cleaned, dtype=object).astype(str), return_inverse=True)
    words = texts.tolist()
    if not (store.has("texts", *_files(False, with_states)) and _listed(store)["texts"] == words):
        _write_texts(encoders, words, store, with_states, batch, tell)
    vectors_UE = np.load(store.path("texts", VECTORS))
    return TextTable(words, text_of_C.reshape(-1).astype(np.int64), vectors_UE, _listed(store)["cut"])


def _write_texts(encoders: Encoders, texts: list[str], store: Store, with_states: bool, batch: int, tell: Tell) -> None:
    ids_UL, mask_UL = tokenize(encoders.tokenizer, texts, encoders.text.max_tokens)
    lengths_U = mask_UL.sum(1)
    encoders.tokenizer.no_truncation()
    cut = sum(len(encoding.ids) > encoders.text.max_tokens for encoding in encoders.tokenizer.encode_batch(texts))
    scorer = PairScorer(encoders.model) if with_states else None
    vectors: list[Tensor] = []
    with store.writing("texts") as piece, ExitStack() as stack:
        rows = stack.enter_context(RowWriter(piece / STATES, np.float32)) if scorer else None
        for start in range(0, len(texts), batch):
            made = encoders.tokens(ids_UL[start : start + batch], mask_UL[start : start + batch])
            vectors.append(made.vectors_BE.float().cpu())
            if scorer is not None and rows is not None:
                with torch.inference_mode():
                    rows.write(scorer.start(made.hidden_BLD, made.mask_BL).float().cpu().numpy())
            tell("texts", min(start + batch, len(texts)), len(texts))
        np.save(piece / VECTORS, _finite(torch.cat(vectors), "text vectors"))
        listed = {"texts": texts, "lengths": lengths_U.tolist(), "cut": cut}
        (piece / "texts.json").write_text(json.dumps(listed))


def read_clips(store: Store, view: View = "clips") -> tuple[ClipList, NDArray[np.float32]]:
    """The clips of a view and their vectors (V, E)."""
    return ClipList(**json.loads(store.path(view, "clips.json").read_text())), np.load(store.path(view, VECTORS))


def read_tokens(store: Store, view: View = "clips") -> NDArray[np.float16]:
    """Patch tokens (V, N, D) of a view, memory-mapped."""
    return read_rows(store.path(view, TOKENS))


def read_states(store: Store) -> TextStates:
    """What re-ranking starts from."""
    return TextStates(read_rows(store.path("texts", STATES)), np.array(_listed(store)["lengths"], dtype=np.int64))


def _files(tokens: bool, states: bool = False) -> tuple[str, ...]:
    return (VECTORS, *([TOKENS] if tokens else []), *([STATES] if states else []))


def _listed(store: Store) -> dict[str, Any]:
    return dict(json.loads(store.path("texts", "texts.json").read_text()))


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


def _finite(vectors: Tensor, what: str) -> NDArray[np.float32]:
    if not torch.isfinite(vectors).all():
        raise UserError(f"Some {what} are not finite.", "Look at the losses of that checkpoint.", exit_code=1)
    return vectors.numpy()


def identity_of(encoders: Encoders, corpus: Samples, seed: int) -> dict[str, Any]:
    """What a store of this checkpoint and corpus is called by."""
    return {
        "checkpoint": encoders.digest,
        "step": encoders.meta.step,
        "visual": encoders.visual.digest,
        "text": encoders.text.digest,
        "corpus": corpus.digest[:16],
        "precision": encoders.precision,
        "seed": seed,
    }
