"""Animated WebP, which the media library cannot decode (FFmpeg 8), handed on as an animated PNG by Pillow.

Pixels, transparency and times stay what they were; equal neighbours become one frame that lasts as long as both.
"""

import io

from data_pipeline.schema import LossReason, SampleError

_ANIMATED = 0x02  # of the flags of the extended header: https://developers.google.com/speed/webp/docs/riff_container


def is_animated(data: bytes) -> bool:
    """Whether these are the bytes of a WebP file whose header says that it moves."""
    return data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and len(data) > 20 and bool(data[20] & _ANIMATED)


def as_apng(data: bytes) -> bytes:
    """The same pictures as an animated PNG; SampleError(DECODE_ERROR) where they cannot be read."""
    from PIL import Image, ImageSequence

    out = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
            frames, times = [], []
            for frame in ImageSequence.Iterator(image):
                frames.append(frame.convert("RGBA"))
                times.append(frame.info.get("duration", 100))
        frames[0].save(out, "PNG", save_all=True, append_images=frames[1:], duration=times, compress_level=1)
    except (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError(LossReason.DECODE_ERROR, f"animated WebP: {error}"[:200]) from error
    return out.getvalue()
