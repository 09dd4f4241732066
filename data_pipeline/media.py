"""Opens bytes as a video or an image with PyAV, and gives its packets and frames; faults of the content are typed.

No error of the media library leaves this file: everything is a SampleError. Decoding takes one thread, because the
loader's workers are the threads, and at most as long as its caller allows, as far as the library lets itself be asked
between two packets; a decoder that hangs inside one packet can only be ended with its process.
"""

import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import av
import av.error
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from data_pipeline.h264 import decodes_from
from data_pipeline.schema import Kind, LossReason, SampleError
from data_pipeline.timeline import Stamp, Timeline
from data_pipeline.webp import as_apng, is_animated

# Containers whose index counts the frames.
_COUNTED = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "avi"})
# The library's own decoders of these leave transparency out, Google's do not.
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# What names other media, as playlists and session descriptions do, opens none of them, on this machine or elsewhere.
ALONE = {"protocol_whitelist": "none"}
_FAULTS = (av.error.FFmpegError, ValueError, OverflowError)

if TYPE_CHECKING:
    AnyPacket = Packet[Any]
else:
    AnyPacket = Packet  # a generic in its stubs alone

Deadline = Callable[[], None]


def deadline(seconds: float | None) -> Deadline:
    """A check that raises SampleError(TIMEOUT) once this thread has computed for `seconds` from now; None: never.

    Seconds of computing, so that a busy machine, or a process that was stopped for a while, loses no clip.
    """
    if seconds is None:
        return lambda: None
    end = time.thread_time() + seconds

    def check() -> None:
        if time.thread_time() > end:
            raise SampleError(LossReason.TIMEOUT, f"decoding took longer than {seconds:g} s")

    return check


@dataclass
class Media:
    """An open medium: its first stream of moving pictures, and the decoder for it."""

    container: InputContainer
    stream: VideoStream
    decoder: VideoCodecContext
    check: Deadline

    @property
    def kind(self) -> Kind:
        """Whether it is a still image, by its container."""
        name = self.container.format.name
        return "image" if name == "image2" or name.endswith("_pipe") else "video"

    @property
    def promised(self) -> int | None:
        """The number of frames that the container's index counts, where it can be asked."""
        return (self.stream.frames or None) if self.container.format.name in _COUNTED else None

    def packets(self) -> Iterator[AnyPacket]:
        """Every packet of the stream, in the order in which they are decoded."""
        try:
            for packet in self.container.demux(self.stream):
                self.check()
                if packet.size:
                    yield packet
        except _FAULTS as error:
            raise _fault(error) from error

    def decode(self, packets: Iterable[AnyPacket]) -> Iterator[VideoFrame]:
        """The frames of consecutive packets, those included that the decoder holds back until the end."""
        try:
            for packet in packets:
                self.check()
                yield from self.decoder.decode(packet)
            yield from self.decoder.decode(None)
        except _FAULTS as error:
            raise _fault(error) from error

    def time(self, frame: VideoFrame) -> float | None:
        """When a frame is shown, in seconds; None if it does not say. (Frames held back do not know their tick.)"""
        tick = self.stream.time_base
        return None if frame.pts is None or tick is None else float(frame.pts * tick)

    def _decodes_from(self, packet: AnyPacket) -> bool:
        """Whether decoding may begin here. Transparency is a second stream inside the first, whose keyframes nobody
        marks, so there it may not."""
        if not packet.is_keyframe or self.decoder is not self.stream.codec_context:
            return False
        if self.stream.codec.canonical_name == "h264":
            return decodes_from(bytes(packet), self.decoder.extradata)
        return True

    def restart(self) -> None:
        """Forget what was decoded, so that decoding may begin at another keyframe."""
        self.decoder.flush_buffers()

    def timeline(self, packets: Iterable[AnyPacket]) -> Timeline:
        """When the frames of all `packets` are shown."""
        stamps = [Stamp(packet.pts, self._decodes_from(packet), packet.is_discard) for packet in packets]
        return Timeline(stamps, float(self.stream.time_base or 0))


@contextmanager
def opened(data: bytes, seconds: float | None = None) -> Iterator[Media]:
    """The medium in `data`; raises SampleError EMPTY_FILE, NOT_MEDIA, NO_VIDEO_STREAM or DECODE_ERROR (no decoder).

    What is done with it raises TIMEOUT after `seconds`.
    """
    if not data:
        raise SampleError(LossReason.EMPTY_FILE, "the file has no bytes")
    check = deadline(seconds)
    if is_animated(data):
        data = as_apng(data)
    try:
        container = av.open(io.BytesIO(data), mode="r", metadata_errors="replace", options=ALONE)
    except _FAULTS as error:
        raise SampleError(LossReason.NOT_MEDIA, _short(error)) from error
    with container:
        streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams:
            raise SampleError(LossReason.NO_VIDEO_STREAM, f"{len(container.streams)} streams, none of them video")
        yield Media(container, streams[0], _decoder(streams[0]), check)


def _decoder(stream: VideoStream) -> VideoCodecContext:
    decoder: Any = stream.codec_context
    if decoder is None:
        raise SampleError(LossReason.DECODE_ERROR, "no decoder for its codec")
    better = _WITH_ALPHA.get(decoder.codec.canonical_name)
    if better in av.codecs_available and stream.metadata.get("alpha_mode") == "1":
        extradata, decoder = decoder.extradata, av.CodecContext.create(better, "r")
        decoder.extradata = extradata
    decoder.thread_type = "NONE"
    decoder.thread_count = 1
    return decoder  # type: ignore[no-any-return]


def last_packet(data: bytes, seconds: float | None = None) -> float:
    """The time in seconds of the last packet of any stream."""
    end = 0.0
    with opened(data, seconds) as media:
        try:
            for packet in media.container.demux():
                media.check()
                if packet.pts is not None:
                    end = max(end, float(packet.pts * packet.time_base))
        except _FAULTS as error:
            raise _fault(error) from error
    return end


def _fault(error: Exception) -> SampleError:
    return SampleError(LossReason.DECODE_ERROR, _short(error))


def _short(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return str(text)[:200]
