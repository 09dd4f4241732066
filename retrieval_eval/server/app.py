"""The application: routes behind the guard, and every failure as JSON with a reason and without a traceback."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from retrieval_eval.collection import Collection
from retrieval_eval.server.api import Api
from retrieval_eval.server.decoding import Decoder
from retrieval_eval.server.engine import JSON, Engine
from retrieval_eval.server.guard import Guard
from retrieval_eval.server.limits import Limits
from retrieval_eval.server.login import Access
from retrieval_eval.server.pages import page_routes
from retrieval_eval.server.refusals import Refused, of_status
from retrieval_eval.server.worker import Worker

log = logging.getLogger(__name__)


def make_app(collection: Collection, access: Access, loopback: bool, limits: Limits, about: JSON) -> Starlette:
    """The ASGI application over an open collection; `loopback` has the Host header checked."""
    worker = Worker(limits.queued, limits.model_seconds)
    decoder = Decoder(collection.searcher.encoders.visual, collection.kind, limits)
    api = Api(Engine(collection, worker, limits), decoder, limits, about)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        warming = asyncio.create_task(_warm(decoder))
        yield
        warming.cancel()
        await decoder.stop()
        worker.close()

    app = Starlette(
        routes=[*api.routes(), *page_routes(access)],
        middleware=[Middleware(Guard, access=access, loopback=loopback, limits=limits)],
        exception_handlers={Refused: _refused, HTTPException: _by_status, Exception: _failed},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


async def _warm(decoder: Decoder) -> None:
    """Have the process that decodes uploads ready before the first one comes."""
    try:
        await decoder.start()
    except (OSError, Refused, TimeoutError) as error:
        log.warning("Searching by a clip will not work: %s", error)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _by_status(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return of_status(error.status_code, error.headers).response()


async def _failed(_: Request, __: Exception) -> Response:
    """Starlette raises the error again after this answer, so that uvicorn logs it with its traceback."""
    return Refused(500, "failed", "Something failed here; the server's log says what.").response()
