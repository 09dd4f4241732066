"""A clip's bytes as they come, refused as soon as they are too many, too slow, or nothing that could be a clip.

The body is the clip itself, not a form: it can then be counted while it streams, and a page elsewhere cannot send it
without asking first (only forms and plain text can be sent across origins unasked).
"""

import asyncio

from starlette.requests import ClientDisconnect, Request

from retrieval_eval.server.limits import MIB, Limits
from retrieval_eval.server.refusals import Refused


async def receive_clip(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises Refused: 415 by its type, 413 by its size, 408 by its time, 400 where it breaks off."""
    _check_type(request)
    _check_length(request, limits.upload_bytes)
    parts = bytearray()
    try:
        async with asyncio.timeout(limits.upload_seconds):
            async for part in request.stream():
                parts += part
                if len(parts) > limits.upload_bytes:
                    raise _too_large(limits.upload_bytes)
    except TimeoutError:
        reason = f"The clip did not come within {limits.upload_seconds:g} s."
        raise Refused(408, "upload_too_slow", reason, {"Connection": "close"}) from None
    except ClientDisconnect:
        raise Refused(400, "upload_cut", "The upload broke off.") from None
    if not parts:
        raise Refused(422, "empty_upload", "The upload has no bytes: send a clip as the body.")
    return bytes(parts)


def _check_type(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (kind.startswith(("video/", "image/")) or kind == "application/octet-stream"):
        said = f"is {kind[:60]!r}" if kind else "is not given"
        raise Refused(
            415,
            "unsupported_type",
            f"The content type {said}: send the clip itself as video/*, image/* or application/octet-stream, no form.",
        )
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise Refused(415, "unsupported_encoding", f"The body is encoded ({encoding[:20]!r}): send it as it is.")


def _check_length(request: Request, most: int) -> None:
    """Refuse by what is promised, before a byte is read; a client that waits for `100 Continue` never sends it."""
    promised = request.headers.get("content-length")
    if promised is not None and int(promised) > most:  # h11 lets only digits through
        raise _too_large(most)


def _too_large(most: int) -> Refused:
    return Refused(413, "upload_too_large", f"The clip is larger than {most // MIB} MiB.", {"Connection": "close"})
