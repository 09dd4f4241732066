"""The rendered world as real files: many H.264 clips from one ffmpeg process, pictures, captions, some damage.

`render_world(out, config)`, which `videomamba data synthetic` calls, writes

    out/world.json                       version, seed, counts, which training clips are damaged and how
    out/{train,val,test,images}/         the media, and captions.csv: one row a caption, rows with one file
                                         are captions of one clip; the first object's attributes beside it

A split's folder has its name only when it is whole; run again, finished splits are kept.
"""

import contextlib
import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import IO

import ffmpeg

from configs.errors import UserError
from data_pipeline.ffmpeg import ffmpeg_program
from data_pipeline.world import (
    COMBINATIONS,
    DISCLAIMER,
    SPLITS,
    WORLD_VERSION,
    ClipSpec,
    Split,
    WorldConfig,
    clip_specs,
    held_out,
)
from data_pipeline.world_damage import damage, damaged
from data_pipeline.world_render import render_clip

COLUMNS = ("file", "caption", "shape", "colour", "size", "motion", "look", "seen", "objects")
CLIPS_A_PROCESS = 120
KEYFRAME_EVERY = 12  # frames
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WorldSummary:
    """What a call of `render_world` did."""

    out: Path
    rendered: tuple[Split, ...]
    kept: tuple[Split, ...]  # finished by an earlier call
    files: int  # rendered by this call, damaged ones included
    damaged: dict[str, str]  # file, relative to `out` -> way
    seconds: float


def render_world(
    out: Path, config: WorldConfig, workers: int = 2, progress: Progress = lambda _done, _total: None
) -> WorldSummary:
    """Render every split that `out` does not hold yet; `progress(clips done, clips in all)` follows it.

    Raises UserError for an `out` that holds something else, or (exit code 1) when ffmpeg or the disk fails.
    """
    began = time.monotonic()
    ffmpeg_program()
    with _disk_faults(out):
        _claim(out, config)
        kept = tuple(split for split in SPLITS if (out / split).is_dir())
        missing = tuple(split for split in SPLITS if split not in kept and config.count(split))
        total = sum(config.count(split) for split in missing)
        done = 0
        progress(done, total)
        try:
            with _pool(workers if total > CLIPS_A_PROCESS else 1) as run:
                for split in missing:
                    for count in _render_split(out, config, split, run):
                        done += count
                        progress(done, total)
        finally:  # after the processes have ended: what an interruption or a full disk left
            for split in missing:
                shutil.rmtree(_partial(out, split), ignore_errors=True)
    return WorldSummary(out, missing, kept, total, damaged(config), time.monotonic() - began)


def _claim(out: Path, config: WorldConfig) -> None:
    """Write world.json into a new folder; refuse a folder that holds anything but this same world."""
    wanted = {
        "version": WORLD_VERSION,
        "note": DISCLAIMER,
        **config.model_dump(mode="json"),
        "combinations": len(COMBINATIONS),
        "held_out": len(held_out(config.seed)),
        "damaged": damaged(config),
    }
    card = out / "world.json"
    cure = "Give another folder, or delete that one."
    if card.is_file():
        try:
            found = json.loads(card.read_bytes())
        except ValueError as error:
            raise UserError(f"{card} is not readable as JSON.", cure) from error
        for key in wanted:
            if not isinstance(found, dict) or found.get(key) != wanted[key]:
                has = found.get(key) if isinstance(found, dict) else found
                raise UserError(f"{out} holds another world: {key} is {has!r}, not {wanted[key]!r}.", cure)
        return
    if out.exists() and (not out.is_dir() or any(entry.name != ".world.json" for entry in out.iterdir())):
        raise UserError(f"{out} exists and is no rendered world (it has no world.json).", cure)
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".world.json").open("w", encoding="utf-8") as file:
        json.dump(wanted, file, indent=2)
        _flush(file)
    (out / ".world.json").replace(card)


def _flush(file: IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _partial(out: Path, split: Split) -> Path:
    return out / f".{split}.partial"


def _render_split(out: Path, config: WorldConfig, split: Split, run: "Runner") -> Iterator[int]:
    """Render one split into a temporary folder, then name it; yields how many clips each finished batch holds."""
    partial = _partial(out, split)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    specs = clip_specs(config, split)
    yield from run([(batch, partial) for batch in _batches(specs)])
    if split == "train":
        for file, way in damaged(config).items():
            damage(partial / Path(file).name, way)
    _write_captions(partial / "captions.csv", specs)
    partial.replace(out / split)


def _batches(specs: list[ClipSpec]) -> list[list[ClipSpec]]:
    """Clips of equal canvas and rate, few enough for one ffmpeg process; the long ones first."""

    def camera(spec: ClipSpec) -> tuple[int, int, float]:
        return spec.width, spec.height, float(spec.rate)

    batches: list[list[ClipSpec]] = []
    for _, group in itertools.groupby(sorted(specs, key=camera), camera):
        members = list(group)
        batches += [members[at : at + CLIPS_A_PROCESS] for at in range(0, len(members), CLIPS_A_PROCESS)]
    return sorted(batches, key=len, reverse=True)


def _write_captions(path: Path, specs: Iterable[ClipSpec]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for spec in specs:
            first = spec.objects[0].what
            motion = "none" if spec.split == "images" else first.motion
            for caption in spec.captions:
                seen = str(spec.seen).lower()
                attributes = (first.shape, first.colour, first.size, motion, first.look, seen, len(spec.objects))
                table.writerow((spec.name, caption, *attributes))
        _flush(file)


Batch = tuple[list[ClipSpec], Path]
Runner = Callable[[list[Batch]], Iterator[int]]


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Runner]:
    """A function that renders batches, in `workers` processes or, for one, here."""
    if workers <= 1:
        yield lambda batches: (render_batch(*batch) for batch in batches)
        return
    executor = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_leave_interrupts_to_the_parent)

    def run(batches: list[Batch]) -> Iterator[int]:
        futures: list[Future[int]] = [executor.submit(render_batch, *batch) for batch in batches]
        for future in as_completed(futures):
            yield future.result()

    try:
        yield run
    except BrokenProcessPool as error:
        raise UserError("A rendering process was killed.", "Free some memory and run it again.", exit_code=1) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def render_batch(specs: list[ClipSpec], folder: Path) -> int:
    """Render clips of one canvas and rate by one ffmpeg process into `folder`, each under its name; their number."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".batch-") as scratch, tempfile.TemporaryFile() as messages:
        command = _command(specs, Path(scratch))
        # a session of its own: Ctrl-C reaches us first, and the closed pipe then ends ffmpeg
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=messages, start_new_session=True)
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                for spec in specs:
                    pipe.write(render_clip(spec).data)
            failed = process.wait() != 0
        except BaseException:
            process.kill()
            process.wait()
            raise
        made = sorted(Path(scratch).iterdir())
        if failed or len(made) != len(specs):
            messages.seek(0)
            raise _failure(folder, messages.read().decode(errors="replace"), process.returncode)
        for spec, path in zip(specs, made, strict=True):
            path.replace(folder / spec.name)
    return len(specs)


def _failure(folder: Path, said: str, code: int) -> UserError:
    """What ffmpeg said last; a full disk speaks differently, depending on where in a file it was met."""
    lines = [line.split("] ", 1)[-1] for line in said.strip().splitlines()]
    cause = f"ffmpeg failed in {folder}: {(lines or [f'exit code {code}'])[-1].rstrip('.')}."
    if "No space left" in said or shutil.disk_usage(folder).free < 4 << 20:
        return UserError(f"{cause} The disk is full.", "Free some space and run it again.", 1)
    return UserError(cause, "Run it again; `videomamba doctor` looks at ffmpeg.", 1)


def _command(specs: list[ClipSpec], scratch: Path) -> list[str]:
    """The ffmpeg that reads the clips' frames one after another and cuts them into a file each.

    A keyframe is forced on each clip's first frame, where alone the segment muxer can cut; without B-frames
    every file starts at 0 and plays in the order it was written.
    """
    one = specs[0]
    frames = ffmpeg.input(
        "pipe:",
        loglevel="error",
        format="rawvideo",
        pixel_format="rgb24",
        video_size=(one.width, one.height),
        framerate=one.rate,
    )
    if one.split == "images":
        made = frames.output(str(scratch / "%06d.png"), format="image2", vcodec="png")
    else:
        cuts = list(itertools.accumulate(spec.frames for spec in specs))[:-1]
        # just before the frame: some releases take the first frame after that time, some round it to a frame
        seconds = (f"{float((cut - 0.25) / one.rate):.6f}" for cut in cuts)
        where = {"segment_frames": ",".join(map(str, cuts)), "force_key_frames": ",".join(seconds)}
        made = frames.output(
            str(scratch / "%06d.mp4"),
            format="segment",
            segment_format="mp4",
            segment_format_options="movflags=+faststart",
            reset_timestamps=1,
            vcodec="libx264",
            pix_fmt="yuv420p",
            preset="ultrafast",
            crf=18,
            threads=1,
            bf=0,
            g=KEYFRAME_EVERY,
            **(where if cuts else {"segment_time": 1e6}),
        )
    return [str(part) for part in ffmpeg.compile(made, cmd=ffmpeg_program())]


@contextlib.contextmanager
def _disk_faults(out: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}.", "Free space there, or give another folder.", 1
        ) from error
