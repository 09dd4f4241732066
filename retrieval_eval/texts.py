"""Captions to one vector each, with the states that re-ranking starts from, into a store, chunk by chunk.

Equal texts are encoded once, so that equal texts have equal scores. All captions of a corpus are encoded, those of
clips that turn out to be unreadable too: so a part of the work need not know what another part could read.

C captions, U different texts, P some of them, L words, D width, E joint width.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.loader import digest
from data_pipeline.sources import Part
from pretrain.tokenizer import tokenize
from retrieval_eval.chunks import ChunkRows, Chunks
from retrieval_eval.decoder import PairScorer
from retrieval_eval.embed import EVERYTHING, VECTORS, Tell, finite, quiet
from retrieval_eval.encoders import Encoders
from retrieval_eval.store import RowWriter, Store, count_rows

STATES, TEXTS = "states.f32", "texts.json"
CHUNK = 512


class Rows(Protocol):
    """An array, or what is read like one, a row at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> NDArray[Any]: ...


@dataclass(frozen=True)
class TextStates:
    """What re-ranking starts from: `states_ULD` float32 (memory-mapped) and the words of each text.

    `rows_U` says in which row of the states each text stands, where it is not its own number.
    """

    states_ULD: Rows
    lengths_U: NDArray[np.int64]
    rows_U: NDArray[np.int64] | None = None

    def take(self, texts_P: NDArray[np.int64], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """States (P, L, D) of some texts and their mask (P, L), cut at the longest of them."""
        lengths_P = self.lengths_U[texts_P]
        rows = [self.states_ULD[int(row)] for row in (texts_P if self.rows_U is None else self.rows_U[texts_P])]
        longest = min(int(lengths_P.max()), max(len(row) for row in rows))
        states_PLD = np.zeros((len(rows), longest, rows[0].shape[1]), dtype=np.float32)
        for place, row in enumerate(rows):
            states_PLD[place, : len(row)] = row[:longest]
        mask_PL = torch.arange(longest)[None] < torch.from_numpy(lengths_P)[:, None]
        return torch.from_numpy(states_PLD).to(device), mask_PL.to(device)


class TextPlan:
    """The different texts of all captions of a corpus, cleaned and in alphabetical order, and how they are cut."""

    def __init__(self, encoders: Encoders, captions: Sequence[str]) -> None:
        self._clean = encoders.text.clean_caption
        self.texts = sorted({self._clean(caption) for caption in captions})
        self.kind = f"texts-{digest({'texts': self.texts})}"
        self.chunks = Chunks(len(self.texts), CHUNK)

    def rows(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """For each caption the row of its text."""
        row_of = {text: row for row, text in enumerate(self.texts)}
        return np.array([row_of[self._clean(caption)] for caption in captions], dtype=np.int64)


@dataclass(frozen=True)
class TextTable:
    """The different texts of some captions: `text_of_C[c]` is the row of caption c."""

    texts: list[str]
    text_of_C: NDArray[np.int64]
    vectors_UE: NDArray[np.float32]
    cut: int
    """How many of the texts had more tokens than the checkpoint reads."""
    rows_U: NDArray[np.int64]
    """Where each text stands in the plan that it is of."""


def embed_texts(
    encoders: Encoders,
    plan: TextPlan,
    store: Store,
    with_states: bool,
    batch: int = 256,
    tell: Tell = quiet,
    part: Part = EVERYTHING,
) -> None:
    """Write the chunks of texts that the store lacks; with a `part` only that share of them."""
    scorer = PairScorer(encoders.model) if with_states else None
    mine = [chunk for chunk in range(len(plan.chunks)) if part.has_turn(chunk)]
    for place, chunk in enumerate(mine):
        piece = plan.chunks.piece(plan.kind, chunk)
        if not store.has(piece, VECTORS, TEXTS, *([STATES] if with_states else [])):
            start, stop = plan.chunks.span(chunk)
            _embed_chunk(encoders, plan.texts[start:stop], store, piece, scorer, batch)
        tell("texts", place + 1, len(mine))


def _embed_chunk(
    encoders: Encoders, texts: list[str], store: Store, piece: str, scorer: PairScorer | None, batch: int
) -> None:
    ids_UL, mask_UL = tokenize(encoders.tokenizer, texts, encoders.text.max_tokens)
    lengths_U = mask_UL.sum(1)
    encoders.tokenizer.no_truncation()
    cut = [len(encoding.ids) > encoders.text.max_tokens for encoding in encoders.tokenizer.encode_batch_fast(texts)]
    vectors: list[Tensor] = []
    with store.writing(piece) as folder, ExitStack() as stack:
        rows = stack.enter_context(RowWriter(folder / STATES, np.float32)) if scorer else None
        for start in range(0, len(texts), batch):
            made = encoders.tokens(ids_UL[start : start + batch], mask_UL[start : start + batch])
            vectors.append(made.vectors_BE.float().cpu())
            if scorer is not None and rows is not None:
                with torch.inference_mode():
                    rows.write(scorer.start(made.hidden_BLD, made.mask_BL).float().cpu().numpy())
        np.save(folder / VECTORS, finite(torch.cat(vectors), "text vectors"))
        (folder / TEXTS).write_text(json.dumps({"texts": texts, "lengths": lengths_U.tolist(), "cut": cut}))


def read_texts(plan: TextPlan, captions: Sequence[str], store: Store) -> TextTable:
    """The texts of some captions of the plan, with their vectors."""
    rows_U, text_of_C = np.unique(plan.rows(captions), return_inverse=True)
    vectors_E = np.concatenate([np.load(store.path(piece, VECTORS)) for piece in plan.chunks.pieces(plan.kind)])
    cut = int(np.array(_said(plan, store, "cut"), dtype=bool)[rows_U].sum())
    texts = [plan.texts[row] for row in rows_U]
    return TextTable(texts, text_of_C.reshape(-1).astype(np.int64), vectors_E[rows_U], cut, rows_U)


def read_states(plan: TextPlan, table: TextTable, store: Store) -> TextStates:
    """What re-ranking of the table's texts starts from."""
    paths = [store.path(piece, STATES) for piece in plan.chunks.pieces(plan.kind)]
    lengths_U = np.array(_said(plan, store, "lengths"), dtype=np.int64)[table.rows_U]
    return TextStates(ChunkRows(paths, [count_rows(path) for path in paths]), lengths_U, table.rows_U)


def _said(plan: TextPlan, store: Store, name: str) -> list[Any]:
    """One of the lists of texts.json, over all chunks."""
    pieces = plan.chunks.pieces(plan.kind)
    return [value for piece in pieces for value in json.loads(store.path(piece, TEXTS).read_text())[name]]
