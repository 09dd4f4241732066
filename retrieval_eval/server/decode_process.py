"""The process that decodes what strangers upload: `python -P -m retrieval_eval.server.decode_process`, by decoding.py.

It writes `ready`, then takes clips from its standard input, each as eight bytes of length and the clip itself, and
answers each with a line of JSON: `{"shape": [...]}` and the uint8 frames (C, T, H, W) behind it, or `{"code",
"reason"}`. Its memory is bounded, it can open no file and no connection, and it ends when its input does. A decoder
that crashes or hangs takes this process with it, and not the server.
"""

import io
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from configs.errors import UserError
from data_pipeline.batches import EvalBatches
from data_pipeline.clips import ClipSource
from data_pipeline.preprocess import VisualPreprocess
from data_pipeline.schema import Kind, Sample

PAGE = resource.getpagesize()


class OneClip:
    """A corpus of one upload, so that its frames are chosen and resized by the very code that made the index."""

    folder, digest = Path("upload"), ""

    def __init__(self, media: bytes, kind: Kind) -> None:
        self.sample = Sample("upload", media, "", kind, ("upload",), "upload", "0" * 64, {})

    def __len__(self) -> int:
        return 1

    def key(self, _: int) -> str:
        """The name of every upload."""
        return self.sample.key

    location = key

    def read(self, _: int) -> Sample:
        """The upload."""
        return self.sample

    def read_meta(self, _: int) -> dict[str, object]:
        """What a shard's json member would say of it."""
        return {"captions": list(self.sample.captions), "sha256": self.sample.sha256}


def decode(media: bytes, visual: VisualPreprocess, kind: Kind, seconds: float) -> tuple[dict[str, object], bytes]:
    """The head of the answer, and the frames behind it."""
    source = ClipSource(OneClip(media, kind), kind, visual, time_limit=seconds)
    try:
        batch = EvalBatches(source, "normal", 0).make((0, 0, 1))
    except MemoryError:
        return {"code": "too_large", "reason": "decoding it takes more memory than an upload may"}, b""
    if isinstance(batch, UserError):
        return {"code": "decode_error", "reason": batch.cause}, b""
    if batch.losses:
        return {"code": batch.losses[0].reason.value, "reason": batch.losses[0].detail}, b""
    frames_CTHW = batch.frames[0].contiguous().numpy()
    return {"shape": list(frames_CTHW.shape)}, frames_CTHW.tobytes()


def main(visual: str, kind: Kind, seconds: str, memory: str) -> None:
    """Answer until the input ends; the arguments are the preprocessing as JSON, the kind, and the two bounds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to take
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand between the answers
    held = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (held + int(memory),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    preprocess = VisualPreprocess.model_validate_json(visual)
    if kind == "image":
        preprocess = preprocess.model_copy(update={"frames": 1})
    decode(_example(), preprocess, kind, float(seconds))  # what is imported late is imported now
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    answers.write(b"ready\n")
    answers.flush()
    for media in _clips(sys.stdin.buffer):
        head, frames = decode(media, preprocess, kind, float(seconds))
        answers.write(json.dumps(head).encode() + b"\n" + frames)
        answers.flush()


def _example() -> bytes:
    """A clip of two grey frames."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode())
    return file.getvalue()


def _clips(stream: BinaryIO) -> Iterator[bytes]:
    while len(head := stream.read(8)) == 8:
        yield stream.read(int.from_bytes(head, "big"))


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
