"""A decoded frame becomes RGB: by its own matrix and range, resized, made opaque, brought to the screen's range.

The matrix and range that a stream declares are believed. Where it declares no matrix, VP8 means BT.601 (its
specification says so) and others mean BT.709 from 720 lines up and BT.601 below, as players assume; where it
declares no range, the limited one is meant, unless the pixel format is one of JPEG's. Transparent pixels are laid on
BACKGROUND, what most web pages would show behind them. HDR and wide gamut are hdr.py's.

H height, W width.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, VideoReformatter

from data_pipeline.hdr import Transfer, to_sdr

Pixels = npt.NDArray[np.uint8]

BACKGROUND = (255, 255, 255)
HD_LINES = 720
_TRANSFERS: dict[int, Transfer] = {ColorTrc.SMPTE2084: "pq", ColorTrc.ARIB_STD_B67: "hlg"}
_UNSPECIFIED = 2  # ITU-T H.273, in matrices, primaries and transfers alike


class Converter:
    """Frames of one clip as RGB; keeps the scaler's tables from frame to frame."""

    def __init__(self, codec: str, interpolation: str = "BILINEAR") -> None:
        self.codec = codec
        self.interpolation = interpolation
        self._scaler = VideoReformatter()

    def rgb(self, frame: VideoFrame, width: int, height: int) -> Pixels:
        """uint8 (H, W, 3), stretched to that size."""
        transfer = transfer_of(frame)
        if transfer is not None:
            return to_sdr(self._convert(frame, width, height, "rgb48le"), transfer)
        if has_alpha(frame.format):
            opaque = VideoFrame.from_ndarray(
                lay_on(self._convert(frame, frame.width, frame.height, "rgba"), BACKGROUND)
            )
            return self._convert(opaque, width, height, "rgb24")
        return self._convert(frame, width, height, "rgb24")

    def _convert(self, frame: VideoFrame, width: int, height: int, pixels: str) -> npt.NDArray[Any]:
        matrix = self.matrix(frame)
        return self._scaler.reformat(
            frame, width, height, format=pixels, interpolation=self.interpolation, src_colorspace=matrix, threads=1
        ).to_ndarray()

    def matrix(self, frame: VideoFrame) -> int | None:
        """The matrix to read a frame's YUV by, where it does not say so itself; None: it says so, or is RGB."""
        if frame.colorspace != _UNSPECIFIED or frame.format.is_rgb:
            return None
        hd = frame.height >= HD_LINES and self.codec not in ("vp8", "mjpeg")
        return Colorspace.ITU709 if hd else Colorspace.ITU601


def transfer_of(frame: VideoFrame) -> Transfer | None:
    """The transfer function that hdr.py has to undo; None for a clip of the usual range and gamut."""
    if frame.format.is_rgb and frame.format.components[0].bits <= 8:
        return None
    wide = frame.color_primaries == ColorPrimaries.BT2020
    return _TRANSFERS.get(frame.color_trc, "sdr" if wide else None)


def has_alpha(pixels: VideoFormat) -> bool:
    """Whether frames of this format may be transparent; a palette may hold transparent colours."""
    return pixels.has_palette or any(component.is_alpha for component in pixels.components)


def lay_on(rgba_HWC: Pixels, background: tuple[int, int, int]) -> Pixels:
    """uint8 (H, W, 3): straight alpha over a colour, rounded to the nearest."""
    alpha = rgba_HWC[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba_HWC[..., :3])
    under = np.array(background, np.uint16) * (255 - alpha)
    return ((rgba_HWC[..., :3] * alpha + under + 127) // 255).astype(np.uint8)
