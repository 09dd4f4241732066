"""A medium out of a shard over HTTP, whole or the part of it that a player asks for (RFC 9110, section 14).

One range a request; several, or a unit other than bytes, are answered with the whole, as the RFC allows.
"""

import asyncio
import re
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from data_pipeline.shards import Medium
from retrieval_eval.server.limits import Limits
from retrieval_eval.server.refusals import Refused

PART = 1 << 18
TYPES = {
    "mp4": "video/mp4", "m4v": "video/mp4", "mov": "video/quicktime", "webm": "video/webm", "mkv": "video/x-matroska",
    "avi": "video/x-msvideo", "flv": "video/x-flv", "ts": "video/mp2t", "mts": "video/mp2t", "m2ts": "video/mp2t",
    "mpg": "video/mpeg", "mpeg": "video/mpeg", "wmv": "video/x-ms-wmv", "3gp": "video/3gpp", "3g2": "video/3gpp2",
    "ogv": "video/ogg", "gif": "image/gif", "jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png",
    "webp": "image/webp", "bmp": "image/bmp", "tif": "image/tiff", "tiff": "image/tiff", "avif": "image/avif",
}  # fmt: skip
_RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.ASCII)


class Range(NamedTuple):
    """Bytes `first` up to and without `stop`."""

    first: int
    stop: int


def media_type(extension: str) -> str:
    """The content type of a member by its extension."""
    return TYPES.get(extension.lower(), "application/octet-stream")


def parse_range(header: str | None, size: int) -> Range | None:
    """The part of `size` bytes that a Range header asks for; None for the whole; Refused (416) for none of them."""
    found = _RANGE.fullmatch(header.replace(" ", "")) if header and len(header) < 100 else None
    if found is None or found.group(1) == found.group(2) == "":
        return None
    first, last = found.groups()
    if first == "":
        part = Range(max(0, size - int(last)), size)
    else:
        part = Range(int(first), min(size, int(last) + 1) if last else size)
        if last and int(last) < int(first):
            return None  # not a range by the RFC's grammar: as if it were not there
    if part.first >= part.stop:
        raise Refused(416, "range_not_satisfiable", f"The clip has {size} bytes.", {"Content-Range": f"bytes */{size}"})
    return part


class MediumResponse:
    """An ASGI response that reads a part at a time, off the event loop, and gives up on a client that takes none."""

    def __init__(self, medium: Medium, etag: str, limits: Limits) -> None:
        self.medium, self.etag, self.limits = medium, f'"{etag}"', limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET or HEAD."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        asked = headers.get(b"range") if headers.get(b"if-range", self.etag) == self.etag else None
        part = parse_range(asked, self.medium.size)
        whole = Range(0, self.medium.size)
        unchanged = headers.get(b"if-none-match") == self.etag
        first, stop = part or whole
        head = {
            "Content-Type": media_type(self.medium.extension),
            "Accept-Ranges": "bytes",
            "ETag": self.etag,
            "Cache-Control": "private, max-age=3600",
        }
        if not unchanged:
            head["Content-Length"] = str(stop - first)
        if part is not None:
            head["Content-Range"] = f"bytes {first}-{stop - 1}/{self.medium.size}"
        status = 304 if unchanged else 206 if part is not None else 200
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in head.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        if scope["method"] == "HEAD" or unchanged or first == stop:
            await send({"type": "http.response.body", "body": b""})
            return
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await self._send(send, first, stop, gone)
        finally:
            gone.cancel()

    async def _send(self, send: Send, first: int, stop: int, gone: "asyncio.Future[None]") -> None:
        for begin in range(first, stop, PART):
            size = min(PART, stop - begin)
            if gone.done():
                return
            data = await run_in_threadpool(self.medium.read, begin, size)
            if len(data) < size:
                raise OSError(f"{self.medium.shard} ends amid a clip")  # the connection breaks: the length was promised
            async with asyncio.timeout(self.limits.send_seconds):
                await send({"type": "http.response.body", "body": data, "more_body": begin + size < stop})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
