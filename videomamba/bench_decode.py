"""`videomamba bench decode`: 8 frames of a clip decoded and resized, against the plainest loop over PyAV's frames.

Clips are made here (10 seconds of 320 x 240 with texture that drifts, H.264) with keyframes near and far, or taken
from `--clips`. Both readers take one thread and give the same pixels, which is checked first.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import UserError
from videomamba.bench_table import Row, interleave, report, row

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FRAMES, SIDE, SECONDS, FPS = 8, 224, 10, 30


def made(keyframe_every: int) -> bytes:
    """An H.264 clip of SECONDS with a keyframe every so many frames."""
    import av
    import numpy as np
    from PIL import Image

    grain = np.random.default_rng(0).integers(0, 256, (36, 48, 3), np.uint8)
    texture = np.asarray(Image.fromarray(grain).resize((960, 720), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"g": str(keyframe_every), "preset": "fast"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for t in range(SECONDS * FPS):
            picture = np.ascontiguousarray(texture[t : t + 240, 2 * t : 2 * t + 320])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def bare_loop(data: bytes, count: int) -> "npt.NDArray[np.uint8]":
    """The middle frames, by decoding one after another up to the last of them."""
    import av
    import numpy as np

    from data_pipeline.frames import middle_indices

    wanted = set(middle_indices(count, FRAMES).tolist())
    found = []
    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                found.append(frame.to_ndarray(format="rgb24", width=SIDE, height=SIDE, threads=1))
            if number == max(wanted):
                break
    return np.stack(found)


def measure(clips: dict[str, bytes], repeats: int) -> Iterator[Row]:
    """Milliseconds a clip of both readers."""
    import numpy as np

    from data_pipeline.decode import decode_video, probe
    from data_pipeline.frames import middle_indices

    for name, data in clips.items():
        count = probe(data).frames

        def ours(data: bytes = data, count: int = count) -> "npt.NDArray[np.uint8]":
            return decode_video(data, lambda n, _: middle_indices(n, FRAMES), size=(SIDE, SIDE), count=count)

        def bare(data: bytes = data, count: int = count) -> "npt.NDArray[np.uint8]":
            return bare_loop(data, count)

        if not np.array_equal(ours(), bare()):
            raise UserError(f"{name}: the frames differ.", "Please report this.", exit_code=1)
        yield row(name, *interleave(ours, bare, repeats), "bare PyAV loop")


def decode(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
    clips: Annotated[list[Path] | None, typer.Option("--clip", help="A clip of your own; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 5,
) -> None:
    """Decoding and resizing 8 frames of a clip, against a bare loop over PyAV's frames."""
    given = {path.name: path.read_bytes() for path in clips or []}
    report(
        "decode", list(measure(given or {f"keyframe every {n}": made(n) for n in (12, 30, 250)}, repeats)), json_file
    )
