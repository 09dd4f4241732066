"""Bytes of a video or an image become RGB frames, with PyAV, on one thread (the loader's workers are the threads).

The packets are read first, which costs a hundredth of decoding them: they tell how many frames there are, when each
is shown and where the keyframes lie. So frames are chosen by time, not by number, and only the packets that the
chosen ones need are decoded, from the keyframe before each or in one run from the start, whichever is less work; the
frames are the same (see timeline.py). H.264 frames that no other refers to are passed over undecoded. Where packets
do not tell (no timestamps, or other numbers than the decoder gives), frames are counted, in sequence from the start.

Frames come out upright (rotation metadata applied), with square pixels (sample aspect ratio applied), opaque, and in
the range and gamut of BT.709 (see colour.py); only the chosen ones are converted. Every fault of the content is a
SampleError; no error of the media library leaves this package.

T frames, H height, W width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from data_pipeline.colour import Converter
from data_pipeline.media import AnyPacket, Media, last_packet, opened
from data_pipeline.schema import Kind, LossReason, SampleError
from data_pipeline.timeline import Run, Timeline

Frames = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.integer[Any]]
Choose = Callable[[int, float], Indices]

MAX_PIXELS = 1 << 26  # of a frame, 8192 x 8192: a damaged header must not take the machine's memory
MAX_STRETCH = 16  # of a pixel: a sample aspect ratio past it is damage


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


def probe(data: bytes, *, time_limit: float | None = None) -> Probe:
    """Decode every frame (that is what finds damage) and say what is there.

    Raises SampleError: EMPTY_FILE, NOT_MEDIA, NO_VIDEO_STREAM, TOO_SHORT (no frame at all), TIMEOUT (after
    `time_limit` seconds) or DECODE_ERROR, the latter also where frames came out but the container promised clearly
    more of them or marked them as damaged.
    """
    with opened(data, time_limit) as media:
        first: VideoFrame | None = None
        count, corrupt, last_time = 0, 0, 0.0
        for frame in media.decode(media.packets()):
            first = first or frame
            count += 1
            corrupt += frame.is_corrupt
            last_time = media.time(frame) or last_time
        if first is None:
            raise SampleError(LossReason.TOO_SHORT, "no frame could be decoded")
        if corrupt:
            raise SampleError(LossReason.DECODE_ERROR, f"{corrupt} of {count} frames are marked as damaged")
        _refuse_if_cut(media, count)
        _refuse_if_ends_early(data, media, last_time, time_limit)
        width, height = shown_size(first, media.stream)
        rate = float(media.stream.average_rate or media.stream.guessed_rate or 0)
        start = media.time(first) or 0.0
        spacing = (last_time - start) / (count - 1) if count > 1 else (1 / rate if rate else 0.0)
        duration = last_time - start + spacing
        return Probe(
            frames=count,
            width=width,
            height=height,
            fps=round(count / duration, 3) if duration > 0 else round(rate, 3),
            duration=round(duration, 4),
            codec=media.stream.codec.canonical_name,
            rotation=_rotation(first),
            kind=media.kind,
        )


def decode_video(
    data: bytes,
    choose: Choose,
    *,
    size: tuple[int, int] | None = None,
    max_short_side: int | None = None,
    count: int | None = None,
    interpolation: str = "BILINEAR",
    time_limit: float | None = None,
) -> Frames:
    """The chosen frames as uint8 (T, H, W, 3).

    `choose` maps a number of equal slots of the clip's time, one a frame there is, and the clip's length in seconds
    (0: not known) to sorted slots, which may repeat; the frame on the screen in the middle of each is given. At a
    constant frame rate, slots are frames. `count` is the number of frames a full decode gave, where it is known (the
    sample's probe). Should fewer frames come out than were promised, `choose` is asked again with the true number.
    `size` (height, width) stretches to that size while converting, the cheapest way to resize; `max_short_side`
    shrinks longer clips in proportion. Raises SampleError as `probe` does, TIMEOUT after about `time_limit` seconds.
    """
    scale = _Scale(size, max_short_side)
    with opened(data, time_limit) as media:
        picker = _Picker(media, scale, interpolation)
        packets = list(media.packets())
        timeline = media.timeline(packets)
        _refuse_if_cut(media, len(timeline))
        if timeline.tells(count):
            slots = _checked(choose(len(timeline), timeline.seconds), len(timeline))
            frames = picker.by_time(packets, timeline, timeline.frames_at(slots))
            if frames is not None:
                return frames
            media.restart()
        if count is None or timeline.tells(count):  # the packets gave another number than the decoder does
            count = sum(1 for _ in media.decode(packets))
            media.restart()
        return picker.by_number(packets, choose, count)


def decode_image(
    data: bytes,
    *,
    size: tuple[int, int] | None = None,
    max_short_side: int | None = None,
    time_limit: float | None = None,
) -> Frames:
    """An image (or a video's first frame) as uint8 (1, H, W, 3); arguments and errors as in `decode_video`."""
    with opened(data, time_limit) as media:
        picker = _Picker(media, _Scale(size, max_short_side), "BILINEAR")
        return picker.by_number(media.packets(), lambda *_: np.zeros(1, np.int64), 1)


@dataclass(frozen=True)
class _Scale:
    size: tuple[int, int] | None
    max_short_side: int | None

    def shown(self, width: int, height: int) -> tuple[int, int]:
        """The size (width, height), upright, in which a frame shown as width x height is wanted."""
        if self.size is not None:
            return self.size[1], self.size[0]
        short = min(width, height)
        if self.max_short_side is None or short <= self.max_short_side:
            return width, height
        ratio = self.max_short_side / short
        return max(1, round(width * ratio)), max(1, round(height * ratio))


class _Picker:
    """Decodes a medium's packets and keeps the frames that are wanted, as RGB of one size."""

    def __init__(self, media: Media, scale: _Scale, interpolation: str) -> None:
        self.media = media
        self.scale = scale
        self.codec = media.stream.codec.canonical_name
        self.converter = Converter(self.codec, interpolation)
        self._shape: tuple[int, int, int] | None = None

    def by_time(self, packets: Sequence[AnyPacket], timeline: Timeline, wanted: Indices) -> Frames | None:
        """The frames of these indices (sorted); None if the decoder does not give one of them at its time."""
        different, places = np.unique(wanted, return_inverse=True)
        found: list[Frames] = []
        for number, run in enumerate(timeline.plan(different.tolist())):
            if number:
                self.media.restart()
            missing = list(run.wanted)
            for frame in self._decoded(packets, run):
                if frame.pts == missing[0]:
                    found.append(self._rgb(frame))
                    missing.pop(0)
                if not missing:
                    break
            if missing:
                return None
        return np.stack([found[place] for place in places])

    def _decoded(self, packets: Sequence[AnyPacket], run: Run) -> Iterator[VideoFrame]:
        """The frames of a run; packets after its last are read as long as the decoder holds a frame back."""
        wanted = set(run.wanted)
        decoder = self.media.decoder

        def fed() -> Iterator[AnyPacket]:
            for packet in packets[run.start :]:
                if self.codec == "h264":
                    decoder.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                yield packet

        try:
            yield from self.media.decode(fed())
        finally:
            decoder.skip_frame = "DEFAULT"

    def by_number(self, packets: Iterable[AnyPacket], choose: Choose, count: int) -> Frames:
        """The frames that `choose` names out of `count`, counted from the start; asked again if there are less."""
        found: dict[int, Frames] = {}
        seen = 0
        if count:
            wanted = _checked(choose(count, self._seconds(count)), count).tolist()
            for number, frame in enumerate(self.media.decode(packets)):
                seen = number + 1
                if number in wanted:
                    found[number] = self._rgb(frame)
                if number == wanted[-1]:
                    return np.stack([found[number] for number in wanted])
        if seen == 0:
            raise SampleError(LossReason.TOO_SHORT, "no frame could be decoded")
        self.media.restart()
        return self.by_number(packets, choose, seen)

    def _seconds(self, count: int) -> float:
        """How long so many frames last at the container's average rate; 0 if it has none."""
        rate = self.media.stream.average_rate
        return float(count / rate) if rate else 0.0

    def _rgb(self, frame: VideoFrame) -> Frames:
        """A frame upright, with square pixels, as large as the first one is wanted."""
        if self._shape is None:
            rotation = _rotation(frame)
            width, height = self.scale.shown(*shown_size(frame, self.media.stream))
            self._shape = (height, width, rotation) if rotation in (90, 270) else (width, height, rotation)
        width, height, rotation = self._shape
        if max(width * height, frame.width * frame.height) > MAX_PIXELS:
            raise SampleError(LossReason.DECODE_ERROR, f"a frame of {frame.width} x {frame.height} is too large")
        try:
            rgb = self.converter.rgb(frame, width, height)
        except (av.error.FFmpegError, ValueError) as error:
            raise SampleError(LossReason.DECODE_ERROR, f"no RGB of {frame.format.name}: {error}"[:200]) from error
        return np.rot90(rgb, rotation // 90) if rotation else rgb


def _checked(slots: Indices, count: int) -> Indices:
    chosen: list[int] = np.asarray(slots).tolist()
    if not chosen or chosen[0] < 0 or chosen[-1] >= count or chosen != sorted(chosen):
        raise ValueError(f"choose gave {chosen}: expected sorted indices in [0, {count})")
    return np.asarray(slots)


def _refuse_if_cut(media: Media, count: int) -> None:
    """Raise DECODE_ERROR where the container's index counts clearly more frames than there are: it was cut off."""
    if media.promised is not None and count < 0.9 * media.promised - 1:
        detail = f"{count} of {media.promised} frames are there: the file is cut"
        raise SampleError(LossReason.DECODE_ERROR, detail)


def _refuse_if_ends_early(data: bytes, media: Media, last_time: float, time_limit: float | None) -> None:
    """Raise DECODE_ERROR where a Matroska file ends well before it promises to.

    It has no index to disagree with: a cut file just ends. It promises the duration of its longest stream, which may
    be the sound, so the last packet of any stream decides.
    """
    if "matroska" not in media.container.format.name or not media.container.duration:
        return
    promised = media.container.duration / av.time_base
    if last_time < 0.9 * promised - 0.5 and (end := last_packet(data, time_limit)) < 0.9 * promised - 0.5:
        raise SampleError(LossReason.DECODE_ERROR, f"the file is cut at {end:.1f} s of {promised:.1f} s")


def _rotation(frame: VideoFrame) -> int:
    """Quarter turns, in degrees counter-clockwise, that bring the frame upright; odd angles count as none."""
    angle = round(frame.rotation) % 360
    return angle if angle % 90 == 0 else 0


def shown_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """(width, height) of a frame upright with square pixels: a stretched pixel widens or narrows the width."""
    width, height = frame.width, frame.height
    aspect = stream.sample_aspect_ratio
    if aspect is not None and 1 / MAX_STRETCH <= aspect <= MAX_STRETCH:
        width = max(1, round(width * aspect))
    return (height, width) if _rotation(frame) in (90, 270) else (width, height)
