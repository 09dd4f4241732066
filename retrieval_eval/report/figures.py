"""Frames as one small JPEG strip a clip.

Legend: T frames, H, W pixels.
"""

import base64
import io

import numpy as np
from numpy.typing import NDArray

GAP, BETWEEN = 4, (245, 245, 245)


def frame_strip(frames_THWC: NDArray[np.uint8], height: int = 64, columns: int = 8) -> str:
    """At most `columns` evenly spaced frames side by side, `height` pixels high, as a base64 JPEG."""
    from PIL import Image

    count = min(columns, len(frames_THWC))
    chosen = np.linspace(0, len(frames_THWC) - 1, count).round().astype(int)
    _, source_height, source_width, _ = frames_THWC.shape
    width = max(1, round(height * source_width / source_height))
    sheet = Image.new("RGB", (count * (width + GAP) - GAP, height), BETWEEN)
    for place, position in enumerate(chosen):
        frame = Image.fromarray(frames_THWC[position])
        sheet.paste(frame.resize((width, height), Image.Resampling.BICUBIC), (place * (width + GAP), 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
