"""The handlers of the JSON API: a request's words checked, the engine asked, its answer sent."""

from collections.abc import Awaitable, Callable

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from data_pipeline.schema import SampleError
from retrieval_eval.server.decoding import Decoder
from retrieval_eval.server.engine import JSON, Engine
from retrieval_eval.server.limits import Limits
from retrieval_eval.server.media import MediumResponse
from retrieval_eval.server.openapi import document
from retrieval_eval.server.refusals import Refused, busy
from retrieval_eval.server.requests import page_of, parameters, text_query
from retrieval_eval.server.uploads import receive_clip

BY = ("q", "like", "clip")


class Api:
    """The routes under /api. `about` says what is served; it is part of /api/health."""

    def __init__(self, engine: Engine, decoder: Decoder, limits: Limits, about: JSON) -> None:
        self.engine, self.decoder, self.limits, self.about = engine, decoder, limits, about
        self._uploads = 0

    def routes(self) -> list[Route]:
        """Every address of the API; openapi.py describes the same."""

        def get(path: str, handler: Callable[[Request], Awaitable[JSONResponse | MediumResponse]]) -> Route:
            return Route(path, handler, methods=["GET"])

        return [
            get("/api/search", self.search),
            Route("/api/search", self.search_by_clip, methods=["POST"]),
            get("/api/clips/{name:path}", self.clip),
            get("/api/media/{name:path}", self.media),
            get("/api/shards/{name:path}", self.shard),
            get("/api/health", self.health),
            get("/api/openapi.json", self.openapi),
        ]

    async def search(self, request: Request) -> JSONResponse:
        """Hits of a sentence (q), of a clip of the collection (like), or of one uploaded before (clip)."""
        given = parameters(request, *BY, "page", "per_page")
        by = [name for name in BY if name in given]
        if len(by) != 1:
            raise Refused(400, "one_query", f"Give one of {', '.join(BY)}; {len(by)} are given.")
        page = page_of(given, self.limits)
        if by == ["q"]:
            return JSONResponse(await self.engine.by_text(text_query(given["q"], self.limits), page))
        find = self.engine.like if by == ["like"] else self.engine.by_upload
        return JSONResponse(await find(given[by[0]], page))

    async def search_by_clip(self, request: Request) -> JSONResponse:
        """Hits of the clip that is the body."""
        page = page_of(parameters(request, "page", "per_page"), self.limits)
        if self._uploads >= self.limits.uploads:
            raise busy(f"{self._uploads} clips are being looked at already.", 2)
        self._uploads += 1
        try:
            media = await receive_clip(request, self.limits)
            frames_BCTHW = await self.decoder.frames(media)
            return JSONResponse(await self.engine.by_frames(media, frames_BCTHW, page))
        finally:
            self._uploads -= 1

    async def clip(self, request: Request) -> JSONResponse:
        """What is known of a clip."""
        parameters(request)
        return JSONResponse(await self.engine.about(request.path_params["name"]))

    async def media(self, request: Request) -> MediumResponse:
        """The clip itself, out of its shard."""
        parameters(request)
        row = self.engine.row(request.path_params["name"])
        collection = self.engine.collection
        try:
            medium = await run_in_threadpool(collection.medium, row)
        except SampleError as error:
            raise Refused(404, "clip_damaged", f"The shard no longer gives this clip: {error.detail}") from None
        return MediumResponse(medium, f"{collection.corpus.digest[:16]}-{row}", self.limits)

    async def shard(self, request: Request) -> JSONResponse:
        """The clips of a shard."""
        page = page_of(parameters(request, "page", "per_page"), self.limits)
        return JSONResponse(await self.engine.listing(request.path_params["name"], page))

    async def health(self, request: Request) -> JSONResponse:
        """That it answers, and what it serves."""
        parameters(request)
        return JSONResponse({"status": "ok", **self.about, "waiting": self.engine.worker.waiting})

    async def openapi(self, request: Request) -> JSONResponse:
        """The API's description."""
        parameters(request)
        return JSONResponse(document(self.limits))
