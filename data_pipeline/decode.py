"""Bytes of a video or an image become RGB frames, with PyAV, on one thread (the loader's workers are the threads).

Frames come out upright (rotation metadata applied) and with square pixels (sample aspect ratio applied), and only
the chosen ones are converted to RGB. Every fault of the content is a SampleError; no error of the media library
leaves this file. What is not done here yet: tone mapping of HDR (it is converted as if it were SDR), and choosing
by time in clips of variable frame rate (frames are counted).

T frames, H height, W width.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from data_pipeline.schema import Kind, LossReason, SampleError

Frames = npt.NDArray[np.uint8]
Choose = Callable[[int], npt.NDArray[np.integer[Any]]]

# Containers whose index counts the frames; elsewhere a missing count means decoding twice.
_COUNTED = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "avi"})


@dataclass(frozen=True)
class Probe:
    """What a full decode found: `width` and `height` as shown (upright, square pixels), `duration` in seconds."""

    frames: int
    width: int
    height: int
    fps: float
    duration: float
    codec: str
    rotation: int
    kind: Kind

    def tree(self) -> dict[str, Any]:
        """The flat mapping that a sample's json member carries."""
        tree = asdict(self)
        del tree["kind"]
        return tree


def probe(data: bytes) -> Probe:
    """Decode every frame (that is what finds damage) and say what is there.

    Raises SampleError: EMPTY_FILE, NOT_MEDIA, NO_VIDEO_STREAM, TOO_SHORT (no frame at all) or DECODE_ERROR, the
    latter also where frames came out but the container promised clearly more of them or marked them as damaged.
    """
    with _opened(data) as (container, stream):
        first: VideoFrame | None = None
        count, corrupt, last_time = 0, 0, 0.0
        for frame in _decoded(container, stream):
            first = first or frame
            count += 1
            corrupt += frame.is_corrupt
            last_time = frame.time or last_time
        if first is None:
            raise SampleError(LossReason.TOO_SHORT, "no frame could be decoded")
        if corrupt:
            raise SampleError(LossReason.DECODE_ERROR, f"{corrupt} of {count} frames are marked as damaged")
        _refuse_if_cut(data, container, stream, count, last_time)
        width, height = _shown_size(first, stream)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        start = first.time or 0.0
        spacing = (last_time - start) / (count - 1) if count > 1 else (1 / rate if rate else 0.0)
        duration = last_time - start + spacing
        return Probe(
            frames=count,
            width=width,
            height=height,
            fps=round(count / duration, 3) if duration > 0 else round(rate, 3),
            duration=round(duration, 4),
            codec=stream.codec.canonical_name,
            rotation=_rotation(first),
            kind="image" if _is_image(container) else "video",
        )


def decode_video(
    data: bytes,
    choose: Choose,
    *,
    size: tuple[int, int] | None = None,
    max_short_side: int | None = None,
    count: int | None = None,
    interpolation: str = "BILINEAR",
) -> Frames:
    """The chosen frames as uint8 (T, H, W, 3), decoded in sequence up to the last one that is chosen.

    `choose` maps the number of decodable frames to sorted indices, which may repeat. `count` is that number where
    it is known (the sample's probe); else the container's index gives it where it can be trusted, and a first
    decode gives it elsewhere. Should a container promise more frames than it holds, `choose` is asked again with
    the true number. `size` (height, width) stretches to that size while converting, the cheapest way to resize;
    `max_short_side` shrinks longer clips in proportion. Raises SampleError as `probe` does.
    """
    scale = _Scale(size, max_short_side, interpolation)
    with _opened(data) as (container, stream):
        if count is None and _is_counted(container):
            count = stream.frames or None
        if count is not None:
            frames, seen = _pick(container, stream, _checked(choose(count), count), scale)
            if frames is not None:
                return frames
            count = seen
    if count is None:
        with _opened(data) as (container, stream):
            count = sum(1 for _ in _decoded(container, stream))
    if count == 0:
        raise SampleError(LossReason.TOO_SHORT, "no frame could be decoded")
    with _opened(data) as (container, stream):
        frames, seen = _pick(container, stream, _checked(choose(count), count), scale)
    if frames is None:
        raise SampleError(LossReason.DECODE_ERROR, f"decoded {seen} frames, then {count} were expected")
    return frames


def decode_image(data: bytes, *, size: tuple[int, int] | None = None, max_short_side: int | None = None) -> Frames:
    """An image (or a video's first frame) as uint8 (1, H, W, 3); arguments and errors as in `decode_video`."""
    return decode_video(data, lambda _: np.zeros(1, np.int64), size=size, max_short_side=max_short_side, count=1)


@dataclass(frozen=True)
class _Scale:
    size: tuple[int, int] | None
    max_short_side: int | None
    interpolation: str

    def shown(self, width: int, height: int) -> tuple[int, int]:
        """The size (width, height), upright, in which a frame shown as width x height is wanted."""
        if self.size is not None:
            return self.size[1], self.size[0]
        short = min(width, height)
        if self.max_short_side is None or short <= self.max_short_side:
            return width, height
        ratio = self.max_short_side / short
        return max(1, round(width * ratio)), max(1, round(height * ratio))


def _checked(indices: npt.NDArray[np.integer[Any]], count: int) -> list[int]:
    chosen: list[int] = np.asarray(indices).tolist()
    if not chosen or chosen[0] < 0 or chosen[-1] >= count or chosen != sorted(chosen):
        raise ValueError(f"choose({count}) gave {chosen}: expected sorted indices in [0, {count})")
    return chosen


def _pick(
    container: InputContainer, stream: VideoStream, chosen: list[int], scale: _Scale
) -> tuple[Frames | None, int]:
    """The chosen frames; None and the number of frames seen when the stream ends before the last of them."""
    reformatter = VideoReformatter()
    out: Frames | None = None
    position, seen = 0, 0
    rotation, target = 0, (0, 0)
    for frame in _decoded(container, stream):
        if chosen[position] == seen:
            if out is None:
                rotation = _rotation(frame)
                width, height = scale.shown(*_shown_size(frame, stream))
                target = (height, width) if rotation in (90, 270) else (width, height)
                out = np.empty((len(chosen), height, width, 3), np.uint8)
            rgb = reformatter.reformat(
                frame, *target, format="rgb24", interpolation=scale.interpolation, threads=1
            ).to_ndarray()
            if rotation:
                rgb = np.rot90(rgb, rotation // 90)
            while position < len(chosen) and chosen[position] == seen:
                out[position] = rgb
                position += 1
            if position == len(chosen):
                return out, seen + 1
        seen += 1
    return None, seen


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    if not data:
        raise SampleError(LossReason.EMPTY_FILE, "the file has no bytes")
    try:
        container = av.open(io.BytesIO(data), mode="r", metadata_errors="replace")
    except (av.error.FFmpegError, ValueError) as error:
        raise SampleError(LossReason.NOT_MEDIA, _short(error)) from error
    with container:
        streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams:
            raise SampleError(LossReason.NO_VIDEO_STREAM, f"{len(container.streams)} streams, none of them video")
        stream = streams[0]
        if stream.codec_context is None:
            raise SampleError(LossReason.DECODE_ERROR, "no decoder for its codec")
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        yield container, stream


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    try:
        yield from container.decode(stream)
    except (av.error.FFmpegError, ValueError) as error:
        raise SampleError(LossReason.DECODE_ERROR, _short(error)) from error


def _refuse_if_cut(data: bytes, container: InputContainer, stream: VideoStream, count: int, last_time: float) -> None:
    """Raise DECODE_ERROR where the container promises clearly more than came out: it was cut off."""
    if _is_counted(container) and count < 0.9 * stream.frames - 1:
        raise SampleError(LossReason.DECODE_ERROR, f"decoded {count} of {stream.frames} frames: the file is cut")
    if "matroska" not in container.format.name or not container.duration:
        return
    # Matroska has no index to disagree with: a cut file just ends. It promises the duration of its longest stream,
    # which may be the sound, so the last packet of any stream decides.
    promised = container.duration / av.time_base
    if last_time < 0.9 * promised - 0.5 and (end := _last_packet(data)) < 0.9 * promised - 0.5:
        raise SampleError(LossReason.DECODE_ERROR, f"the file is cut at {end:.1f} s of {promised:.1f} s")


def _last_packet(data: bytes) -> float:
    """The time in seconds of the last packet of any stream."""
    end = 0.0
    with _opened(data) as (container, _):
        try:
            for packet in container.demux():
                if packet.pts is not None:
                    end = max(end, float(packet.pts * packet.time_base))
        except av.error.FFmpegError as error:
            raise SampleError(LossReason.DECODE_ERROR, _short(error)) from error
    return end


def _short(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return str(text)[:200]


def _is_counted(container: InputContainer) -> bool:
    return container.format.name in _COUNTED


def _is_image(container: InputContainer) -> bool:
    name = container.format.name
    return name == "image2" or name.endswith("_pipe")


def _rotation(frame: VideoFrame) -> int:
    """Quarter turns, in degrees counter-clockwise, that bring the frame upright; odd angles count as none."""
    angle = round(frame.rotation) % 360
    return angle if angle % 90 == 0 else 0


def _shown_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """(width, height) of a frame upright with square pixels: a stretched pixel widens or narrows the width."""
    width, height = frame.width, frame.height
    aspect = stream.sample_aspect_ratio
    if aspect is not None and aspect > 0:
        width = max(1, round(width * aspect))
    return (height, width) if _rotation(frame) in (90, 270) else (width, height)
