"""A searchable collection that a browser can play: small H.264 and VP9 clips, one that it cannot, one with markup."""

import io
from dataclasses import replace
from pathlib import Path

import av
import numpy as np

from data_pipeline.schema import Sample, content_digest
from data_pipeline.shards import ShardWriter
from retrieval_eval.search import embed_corpus
from tests.retrieval_eval.conftest import COLOURS

MARKUP = "<img src=x onerror=alert(1)> & <b>bold</b>"
COUNT = 30


def clip(number: int, codec: str = "libx264", form: str = "mp4") -> bytes:
    """One second of a square that moves."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for t in range(12):
            frame = np.full((48, 64, 3), 30 + 5 * number, np.uint8)
            frame[16:32, 3 * t : 3 * t + 16] = list(COLOURS.values())[number % 4]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def build(folder: Path, checkpoint: Path) -> Path:
    """The index of such a collection, built by the checkpoint."""
    shards = folder / "shards"
    shards.mkdir()
    with ShardWriter(shards, "played", 16) as writer:
        for number in range(COUNT):
            codec, form = {1: ("libvpx-vp9", "webm"), 2: ("mpeg4", "avi")}.get(number, ("libx264", "mp4"))
            media = clip(number, codec, form)
            caption = MARKUP if number == 3 else f"a {list(COLOURS)[number % 4]} square, take {number}"
            sample = Sample(f"{number:09d}", media, form, "video", (caption,), f"{number}.{form}", "", {})
            writer.write(replace(sample, sha256=content_digest(media), probe={"duration": 1.0}))
    embed_corpus(shards, folder / "index", checkpoint, device="cpu")
    return folder / "index"
