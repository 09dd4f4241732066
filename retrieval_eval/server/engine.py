"""From a query to its hits, in the model's thread, and from hits to what is said of them, beside it."""

import hashlib
from collections import OrderedDict, deque
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool

from data_pipeline.schema import SampleError
from retrieval_eval.collection import ClipInfo, Collection
from retrieval_eval.index import Vectors
from retrieval_eval.search import Hit, as_unit
from retrieval_eval.server.limits import Limits
from retrieval_eval.server.media import media_type
from retrieval_eval.server.refusals import Refused
from retrieval_eval.server.requests import Page
from retrieval_eval.server.worker import Worker

JSON = dict[str, Any]


class Engine:
    """A collection behind the model's thread. The vectors of the last queries are kept, so that a next page is the
    same ranking further on, and costs no model."""

    def __init__(self, collection: Collection, worker: Worker, limits: Limits) -> None:
        self.collection, self.worker, self.limits = collection, worker, limits
        self._known: OrderedDict[tuple[str, str], Vectors] = OrderedDict()  # touched in the worker's thread alone
        self._wanted: deque[str] = deque(maxlen=limits.queued)

    async def by_text(self, text: str, page: Page) -> JSON:
        """The hits of a sentence; Refused (422) where nothing is left of it, or it is more than the model reads."""
        self._wanted.append(text)
        try:
            hits = await self.worker.run(self._text_hits, text, page)
        finally:
            with suppress(ValueError, IndexError):  # taken up by another's turn, or being so now
                self._wanted.remove(text)
        return await self._answer({"text": text}, page, hits)

    async def by_frames(self, media: bytes, frames_BCTHW: NDArray[np.uint8], page: Page) -> JSON:
        """The hits of an uploaded clip; `query.clip` in the answer names it for the next pages."""
        name = hashlib.sha256(media).hexdigest()[:32]
        found = await self.worker.run(self._frame_hits, name, frames_BCTHW, page)
        return await self._answer({"clip": name, "bytes": len(media)}, page, found)

    async def by_upload(self, name: str, page: Page) -> JSON:
        """Further hits of a clip that was uploaded before; Refused (404) where it is forgotten."""
        return await self._answer({"clip": name}, page, await self.worker.run(self._upload_hits, name, page))

    async def like(self, name: str, page: Page) -> JSON:
        """The clips nearest to one of the collection."""
        row = self.row(name)
        return await self._answer({"like": name}, page, await self.worker.run(self._like_hits, row, page))

    async def listing(self, shard: str, page: Page) -> JSON:
        """The clips of a shard, in its order."""
        rows = self.collection.shard_rows(shard)
        if rows is None:
            raise Refused(404, "no_such_shard", f"No shard of this index is called {shard[:80]!r}.")
        shown = rows[page.first : page.last]
        clips = await run_in_threadpool(lambda: [self.describe(self.collection.about(row)) for row in shown])
        return {"shard": shard, "clips": clips, "total": len(rows), **_pages(page, len(rows))}

    async def about(self, name: str) -> JSON:
        """Everything known of one clip."""
        row = self.row(name)
        info = await run_in_threadpool(self.collection.about, row)
        medium: JSON = {}
        try:
            found = await run_in_threadpool(self.collection.medium, row)
            medium = {"bytes": found.size, "type": media_type(found.extension)}
        except SampleError as error:
            medium = {"fault": error.detail}
        more = {"captions": list(info.captions), "offset": info.offset, "source": info.source, "probe": info.probe}
        return self.describe(info) | medium | more

    def row(self, name: str) -> int:
        """The row of a clip by its name; Refused (404) where there is none."""
        row = self.collection.row(name)
        if row is None:
            raise Refused(404, "no_such_clip", f"No clip of this index is called {name[:80]!r}.")
        return row

    def describe(self, info: ClipInfo) -> JSON:
        """A clip as every answer shows it. Addresses are of this server, and relative."""
        name = quote(info.name, safe="")
        return {
            "name": info.name,
            "key": info.key,
            "caption": info.captions[0] if info.captions else "",
            "shard": info.shard,
            "kind": info.kind,
            "seconds": info.seconds,
            "span": info.span,
            "time": info.time,
            "info": f"/api/clips/{name}",
            "media": f"/api/media/{name}",
            **({"fault": info.fault} if info.fault else {}),
        }

    async def _answer(self, query: JSON, page: Page, hits: list[Hit]) -> JSON:
        def described() -> list[JSON]:
            return [
                {"rank": rank, "score": round(hit.score, 6)} | self.describe(self.collection.about(hit.row))
                for rank, hit in enumerate(hits, start=page.first + 1)
            ]

        total = min(len(self.collection), self.limits.deepest)
        shown = await run_in_threadpool(described)
        return {"query": query, "hits": shown, "clips": len(self.collection), **_pages(page, total)}

    def _text_hits(self, text: str, page: Page) -> list[Hit]:
        if ("text", text) not in self._known:
            if reason := self._unreadable(text):
                raise Refused(422, *reason)
            self._encode([text, *self._waiting(but=text)])
        return self._nearest(("text", text), page)

    def _encode(self, texts: list[str]) -> None:
        """The vectors of several sentences in one pass: eight together cost little more than one."""
        for text, vector in zip(texts, self.collection.searcher.text_vectors(texts), strict=True):
            self._keep(("text", text), vector)

    def _waiting(self, but: str) -> list[str]:
        """Other sentences whose turn has not come, to be encoded with this one; theirs is then found known."""
        found: dict[str, None] = {}
        while self._wanted and len(found) < min(self.limits.together, self.limits.remembered) - 1:
            text = self._wanted.popleft()
            if text != but and ("text", text) not in self._known and not self._unreadable(text):
                found[text] = None
        return list(found)

    def _unreadable(self, text: str) -> tuple[str, str] | None:
        """The code and reason for which a sentence is refused."""
        searcher = self.collection.searcher
        if not searcher.encoders.text.clean_caption(text):
            return "empty_query", "The query holds no words: give a sentence."
        tokens, most = searcher.tokens(text), searcher.encoders.text.max_tokens
        if tokens > most:
            return "query_too_long", f"The query has {tokens} tokens; this checkpoint reads {most}: shorten it."
        return None

    def _frame_hits(self, name: str, frames_BCTHW: NDArray[np.uint8], page: Page) -> list[Hit]:
        import torch

        self._keep(("clip", name), self.collection.searcher.clip_vector(torch.from_numpy(frames_BCTHW.copy())))
        return self._nearest(("clip", name), page)

    def _upload_hits(self, name: str, page: Page) -> list[Hit]:
        if ("clip", name) not in self._known:
            raise Refused(404, "clip_forgotten", "This clip is not among the last that were sent: send it again.")
        return self._nearest(("clip", name), page)

    def _like_hits(self, row: int, page: Page) -> list[Hit]:
        searcher = self.collection.searcher
        return searcher.nearest(as_unit(searcher.vectors_VE[row]), page.last)[page.first :]

    def _nearest(self, key: tuple[str, str], page: Page) -> list[Hit]:
        self._known.move_to_end(key)
        return self.collection.searcher.nearest(self._known[key], page.last)[page.first :]

    def _keep(self, key: tuple[str, str], vector_E: Vectors) -> None:
        self._known[key] = vector_E
        while len(self._known) > self.limits.remembered:
            self._known.popitem(last=False)


def _pages(page: Page, total: int) -> JSON:
    return {"page": page.number, "per_page": page.size, "pages": max(1, -(-total // page.size))}
