"""An upload's frames, from a process of its own that is ended when it takes too long, and begun again when needed."""

import asyncio
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.preprocess import VisualPreprocess
from data_pipeline.schema import Kind
from retrieval_eval.server.limits import Limits
from retrieval_eval.server.refusals import Refused

log = logging.getLogger(__name__)

START_SECONDS = 120.0  # to import what decoding needs
GRACE_SECONDS = 3.0  # that a decode gets to end by its own clock
_LINE = 1 << 16


class Decoder:
    """One process for all uploads, one at a time. `start` makes it ready before the first of them."""

    def __init__(self, visual: VisualPreprocess, kind: Kind, limits: Limits) -> None:
        self.limits = limits
        self._arguments = (visual.model_dump_json(), kind, str(limits.decode_seconds), str(limits.decode_bytes))
        self._process: Process | None = None
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Have the process running."""
        async with self._turn:
            await self._running()

    async def frames(self, media: bytes) -> NDArray[np.uint8]:
        """Frames (1, C, T, H, W) of a clip, as the index saw its own; Refused (422) where there are none to be had."""
        async with self._turn:
            process = await self._running()
            try:
                async with asyncio.timeout(self.limits.decode_seconds + GRACE_SECONDS):
                    head, data = await _ask(process, media)
            except TimeoutError:
                await self.stop()
                raise _unreadable(f"decoding took longer than {self.limits.decode_seconds:g} s", "timeout") from None
            except (OSError, EOFError, ValueError):
                await self.stop()
                log.warning("the process that decodes uploads ended amid one of %d bytes", len(media))
                raise _unreadable("the decoder gave up on it", "decode_error") from None
            except BaseException:  # the request was cancelled: what is half said cannot be taken up again
                await self.stop()
                raise
        if "shape" not in head:
            raise _unreadable(str(head["reason"]), str(head["code"]))
        return np.frombuffer(data, np.uint8).reshape(1, *head["shape"])

    async def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    async def _running(self) -> Process:
        if self._process is None or self._process.returncode is not None:
            path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "retrieval_eval.server.decode_process", *self._arguments),
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stdin=PIPE,
                stdout=PIPE,
                limit=_LINE,
            )
            assert self._process.stdout is not None
            try:
                async with asyncio.timeout(START_SECONDS):
                    ready = await self._process.stdout.readline()
            except BaseException:
                await self.stop()
                raise
            if ready != b"ready\n":
                await self.stop()
                raise Refused(503, "no_decoder", "The process that decodes uploads does not start.")
        return self._process


async def _ask(process: Process, media: bytes) -> tuple[dict[str, Any], bytes]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(len(media).to_bytes(8, "big"))
    process.stdin.write(media)
    await process.stdin.drain()
    line = await process.stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head = json.loads(line)
    size = int(np.prod(head["shape"])) if "shape" in head else 0
    return head, await process.stdout.readexactly(size)


def _unreadable(why: str, code: str) -> Refused:
    what = "is no video or image" if code in ("not_media", "no_video_stream") else "cannot be decoded"
    return Refused(422, code, f"The upload {what} ({why}).")
