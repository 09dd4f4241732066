"""What a build may do to a clip on its way into a shard, by ffmpeg: smaller, slower, cut, silent, easy to seek in.

    arguments = command(Path("in.mov"), Path("out.mp4"), Transcode(short_side=256), look(Path("in.mov")))

What comes out of a video is H.264 in MP4 with its index in front, 8 bits, upright, with square pixels, HDR tone-mapped
to BT.709 as the reading side does it (`hdr`), without sound; pictures stay pictures. Equal inputs give equal bytes.
One thread a clip: the clips are what runs in parallel.
"""

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import ffmpeg
from pydantic import Field

from configs.errors import UserError
from configs.loader import Frozen
from data_pipeline.ffmpeg import ffmpeg_filters, ffmpeg_program
from data_pipeline.hdr import PEAK, WHITE

_HDR = {16: "smpte2084", 18: "arib-std-b67"}  # PQ and HLG, by the numbers of ITU-T H.273


class Transcode(Frozen):
    """`short_side` in pixels (never enlarged), `max_fps`, `keyframes`: a keyframe every so many frames, `crf`: quality.

    `audio` keeps the sound. Spans (the columns start and end) are cut in any case.
    """

    short_side: int | None = Field(None, ge=2)
    max_fps: float | None = Field(None, gt=0)
    keyframes: int | None = Field(None, ge=1)
    crf: int = Field(23, ge=0, le=51)
    audio: bool = False


@dataclass(frozen=True)
class Look:
    """What the header and the first frame of a video say; `width` and `height` upright with square pixels.

    `frames` and `seconds` are what the container promises, 0 where it does not. `still`: a picture.
    """

    stream: int
    width: int
    height: int
    fps: float
    frames: int
    seconds: float
    hdr: str | None
    still: bool


def look(path: Path) -> Look | None:
    """A look at a file without decoding it through; None where anything about it is unclear."""
    import av
    import av.error

    from data_pipeline.decode import shown_size

    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = next((s for s in container.streams.video if not s.disposition & s.disposition.attached_pic), None)
            if stream is None or stream.codec_context is None:
                return None
            frame = next(container.decode(stream))
            width, height = shown_size(frame, stream)
            rate = stream.average_rate or stream.guessed_rate or Fraction(0)
            length = stream.duration * stream.time_base if stream.duration and stream.time_base else None
            return Look(
                stream=stream.index,
                width=width,
                height=height,
                fps=float(rate),
                frames=stream.frames,
                seconds=float(length if length is not None else (container.duration or 0) / av.time_base),
                hdr=_HDR.get(int(frame.color_trc)),
                still=container.format.name == "image2" or container.format.name.endswith("_pipe"),
            )
    except (av.error.FFmpegError, ValueError, StopIteration):
        return None


def target_size(look: Look, options: Transcode) -> tuple[int, int]:
    """(width, height) of what comes out: the short side at most as asked, both even, in proportion."""
    short = min(look.width, look.height)
    scale = min(1.0, options.short_side / short) if options.short_side else 1.0
    return tuple(max(2, 2 * round(side * scale / 2)) for side in (look.width, look.height))  # type: ignore[return-value]


def command(
    source: Path, target: Path, options: Transcode, seen: Look, start: float | None = None, end: float | None = None
) -> list[str]:
    """The command line that makes `target` (.mp4, or for a picture the suffix of its kind) of a span of `source`."""
    asked: dict[str, Any] = {"ss": start} if start else {}
    if end is not None:
        asked["t"] = end - (start or 0.0)
    opened = ffmpeg.input(_as_file(source), **asked)
    video = opened[str(seen.stream)]
    for name, values in _filters(seen, options):
        video = video.filter(name, **values)
    streams = [video, opened["a:0?"]] if options.audio and not seen.still else [video]
    stream = ffmpeg.output(*streams, _as_file(target), **(_picture(target) if seen.still else _video(options)))
    stream = stream.global_args("-nostdin", "-hide_banner", "-loglevel", "error", "-y")
    return [str(word) for word in ffmpeg.compile(stream, cmd=ffmpeg_program())]


def _filters(seen: Look, options: Transcode) -> list[tuple[str, dict[str, Any]]]:
    filters: list[tuple[str, dict[str, Any]]] = []
    if options.max_fps and not seen.still and (seen.fps > options.max_fps or not seen.fps):
        # First, as what is dropped need not be scaled; rounded up, a frame shows what was on the screen at its time.
        filters.append(("fps", {"fps": options.max_fps, "round": "up"}))
    width, height = target_size(seen, options)
    scaled = ("scale", {"w": width, "h": height, "flags": "bicubic+accurate_rnd"})
    if seen.hdr is None:
        filters.append(scaled)
    else:
        if "zscale" not in ffmpeg_filters():
            cause = f"An HDR clip has to be tone-mapped, and {ffmpeg_program()} has no zscale filter."
            raise UserError(cause, "Install an ffmpeg with libzimg, or build without transcoding.", exit_code=1)
        filters += [
            ("zscale", {"w": width, "h": height, "t": "linear", "npl": WHITE}),
            ("format", {"pix_fmts": "gbrpf32le"}),
            ("zscale", {"p": "bt709"}),
            ("tonemap", {"tonemap": "mobius", "peak": PEAK, "desat": 0}),
            ("zscale", {"t": "bt709", "m": "bt709", "r": "tv"}),
        ]
    return [*filters, ("setsar", {"sar": 1}), *([] if seen.still else [("format", {"pix_fmts": "yuv420p"})])]


def _video(options: Transcode) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "vcodec": "libx264",
        "preset": "veryfast",
        "crf": options.crf,
        "threads": 1,
        "movflags": "+faststart",
        "map_metadata": -1,
        "map_chapters": -1,
        "fflags": "+bitexact",
        "flags:v": "+bitexact",
    }
    if options.audio:
        arguments |= {"acodec": "aac", "b:a": "96k", "flags:a": "+bitexact"}
    if options.keyframes:
        arguments |= {"g": options.keyframes, "keyint_min": options.keyframes, "sc_threshold": 0}
    return arguments


def _picture(target: Path) -> dict[str, Any]:
    quality = {"q:v": 2} if target.suffix in (".jpg", ".jpeg") else {}
    return {"frames:v": 1, "update": 1, "map_metadata": -1, "fflags": "+bitexact", "flags:v": "+bitexact", **quality}


def _as_file(path: Path) -> str:
    """A path as ffmpeg takes it, whatever it is called: `-x`, `a:b`, `frame%d` are no options, protocols, patterns."""
    return "file:" + os.path.abspath(path)  # noqa: PTH100  no link is followed
