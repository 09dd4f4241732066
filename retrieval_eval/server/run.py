"""`videomamba serve` from an address to its end: open the collection, say where, serve until Ctrl-C or SIGTERM."""

import asyncio
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from retrieval_eval.collection import Collection
from retrieval_eval.server.address import Address
from retrieval_eval.server.app import make_app
from retrieval_eval.server.engine import JSON
from retrieval_eval.server.limits import Limits
from retrieval_eval.server.login import Access
from retrieval_eval.server.protocol import protocol_of

GRACEFUL_SECONDS = 5


@dataclass(frozen=True)
class Serving:
    """What is served."""

    index: Path
    checkpoint: Path | None = None
    shards: Path | None = None
    device: str = "auto"
    limits: Limits = field(default_factory=Limits)


def serve(asked: Serving, address: Address, say: Callable[[str], None]) -> None:
    """Serve until told to stop; `say` is given the lines for whoever started it."""
    collection = Collection.open(asked.index, asked.checkpoint, asked.shards, asked.device)
    about = describe(collection, asked.limits)
    access = Access(address.token, asked.limits.wrong_tokens)
    app = make_app(collection, access, address.loopback, asked.limits, about)
    _Server(configuration(app, asked.limits), lambda: _announce(say, address, about)).run(sockets=[address.listening])
    say("Stopped.")


def configuration(app: Starlette, limits: Limits) -> uvicorn.Config:
    """How uvicorn is to serve the application."""
    return uvicorn.Config(
        app,
        http=protocol_of(limits),
        ws="none",
        lifespan="on",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACEFUL_SECONDS,
    )


def describe(collection: Collection, limits: Limits) -> JSON:
    """What is served, as /api/health says it."""
    identity, clips = collection.searcher.identity, len(collection)
    made = datetime.fromtimestamp((collection.folder / "identity.json").stat().st_mtime, UTC)
    return {
        "index": collection.folder.resolve().name,
        "clips": clips,
        "lost": len(collection.searcher.clips.lost),
        "shards": len(collection.corpus.shards),
        "kind": collection.searcher.kind,
        "media": collection.kind,
        "made": made.isoformat(timespec="seconds"),
        "checkpoint": {"digest": identity["checkpoint"], "step": identity["step"]},
        "limits": {
            "query_characters": limits.query_characters,
            "query_tokens": collection.searcher.encoders.text.max_tokens,
            "upload_bytes": limits.upload_bytes,
            "hits": limits.deepest,
        },
    }


def _announce(say: Callable[[str], None], address: Address, about: JSON) -> None:
    checkpoint, plural = about["checkpoint"], "s" if about["shards"] != 1 else ""
    say(
        f"{about['clips']:,} clips in {about['shards']:,} shard{plural} ({about['kind']} index {about['index']}, made "
        f"{about['made'][:10]} by checkpoint {checkpoint['digest']}, step {checkpoint['step']})"
    )
    say(f"Serving at {address.url}{' (asks for the token)' if address.token else ''}. Ctrl-C stops.")


class _Server(uvicorn.Server):
    """uvicorn's server, which ends with exit code 0 at Ctrl-C and SIGTERM, and at a second one without waiting."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
