"""What a worker does with one clip: read it, make of it what was asked, and see that every frame of it decodes.

    result = prepare(Task(position=0, path="a.mov", size=1234), Recipe(transcode=Transcode(short_side=256)))

A clip that is transcoded is not decoded twice: ffmpeg's word is taken where it reports nothing and as much comes out
as the container promised. Else a full decode of the source judges, and gives the same reason as for a copy.
"""

import errno
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.schema import LossReason, SampleError, content_digest
from data_pipeline.transcode import Look, Transcode, command, look

if TYPE_CHECKING:
    from data_pipeline.decode import Probe

_PATHS_FAULT = (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
_DISK_WORDS = {"No space left on device": errno.ENOSPC, "Disk quota exceeded": errno.EDQUOT}
_KEPT_PICTURES = (".jpg", ".jpeg", ".png")  # kinds in which a smaller picture is written; of others it is a .png


@dataclass(frozen=True)
class Task:
    """A clip to prepare: a file, or `size` bytes from `offset` of a tar; `start` and `end` in seconds cut it."""

    position: int
    path: str
    size: int
    suffix: str = ""
    offset: int | None = None
    start: float | None = None
    end: float | None = None

    @property
    def is_cut(self) -> bool:
        """Whether only a span of it is wanted."""
        return self.start is not None or self.end is not None


@dataclass(frozen=True)
class Recipe:
    """What is done with every clip: `transcode` (None: copied as it is), and the fewest frames a video may have.

    `scratch` is a folder for files that are being made.
    """

    transcode: Transcode | None = None
    min_frames: int = 1
    scratch: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A clip that decodes: its bytes, their kind as a suffix, and what `decode.probe` found (`kind` apart)."""

    position: int
    media: bytes
    extension: str
    sha256: str
    kind: str
    probe: dict[str, str | int | float]


@dataclass(frozen=True)
class Lost:
    """A clip that does not, and why."""

    position: int
    reason: LossReason
    detail: str


Result = Prepared | Lost


def prepare(task: Task, recipe: Recipe) -> Result:
    """Prepare one clip; faults of the content, and files that cannot be read, are a Lost.

    Raises OSError where the machine is at fault (an I/O error, a full disk).
    """
    try:
        if recipe.transcode is None and not task.is_cut:
            made = _as_it_is(task)
        else:
            made = _transcoded(task, recipe.transcode or Transcode(), recipe.scratch)
        found = made.found
        if found.kind == "video" and found.frames < recipe.min_frames:
            raise SampleError(LossReason.TOO_SHORT, f"{found.frames} frames, of {recipe.min_frames} asked")
    except SampleError as error:
        return Lost(task.position, error.reason, error.detail)
    except MemoryError:
        return Lost(task.position, LossReason.DECODE_ERROR, "decoding it takes more memory than there is")
    except OSError as error:
        if error.errno not in _PATHS_FAULT:
            raise
        return Lost(task.position, LossReason.MISSING_FILE, error.strerror or str(error))
    media = made.media
    return Prepared(task.position, media, _extension(made.suffix), content_digest(media), found.kind, found.tree())


def _extension(suffix: str) -> str:
    name = suffix.lower().lstrip(".")
    return name if name.isalnum() and name.isascii() and name not in ("json", "txt") else "bin"


def _read(task: Task) -> bytes:
    with Path(task.path).open("rb") as file:
        if task.offset is None:
            return file.read()
        file.seek(task.offset)
        media = file.read(task.size)
    if len(media) < task.size:
        raise SampleError(LossReason.DAMAGED_SHARD, f"the tar ends {task.size - len(media)} bytes before it does")
    return media


@dataclass(frozen=True)
class _Made:
    media: bytes
    suffix: str
    found: "Probe"


def _as_it_is(task: Task) -> _Made:
    """The clip as it stands, decoded in full; raises its SampleError."""
    from data_pipeline.decode import probe

    media = _read(task)
    return _Made(media, task.suffix, probe(media))


def _transcoded(task: Task, options: Transcode, scratch: str | None) -> _Made:
    """The clip made anew."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder, _as_path(task, Path(folder)) as source:
        seen = look(source)
        if seen is None or (seen.still and not _shrinks(seen, options)):
            kept = _as_it_is(task)
            if task.is_cut:
                raise SampleError(LossReason.BAD_SPAN, "a picture, or what ffmpeg cannot read, has no span to cut out")
            return kept
        suffix = task.suffix.lower() if task.suffix.lower() in _KEPT_PICTURES else ".png"
        target = Path(folder, f"made{suffix}" if seen.still else "made.mp4")
        said = _run(command(source, target, options, seen, task.start, task.end))
        return _checked(task, seen, target, said.splitlines()[-1][:200] if said else "")


def _shrinks(seen: Look, options: Transcode) -> bool:
    return options.short_side is not None and min(seen.width, seen.height) > options.short_side


@contextmanager
def _as_path(task: Task, folder: Path) -> Iterator[Path]:
    """The clip as a file of its own, which ffmpeg can seek in."""
    if task.offset is None:
        with Path(task.path).open("rb"):  # a file that is missing or forbidden is told apart from one that is broken
            yield Path(task.path)
        return
    path = folder / f"source{task.suffix}"
    path.write_bytes(_read(task))
    yield path


def _run(arguments: list[str]) -> str:
    """Run ffmpeg; what it said of faults, "" for none. Raises OSError where the disk is full."""
    done = subprocess.run(arguments, check=False, capture_output=True, stdin=subprocess.DEVNULL)
    said = done.stderr.decode(errors="replace").strip()
    for words, number in _DISK_WORDS.items():
        if words in said:
            raise OSError(number, words)
    if done.returncode and not said:
        return f"ffmpeg ended with exit code {done.returncode}"
    return said


def _checked(task: Task, seen: Look, target: Path, complaint: str) -> _Made:
    """What ffmpeg made. Where it complained, or less came out than was promised, the typed reason is raised."""
    from data_pipeline.decode import probe

    if task.is_cut and complaint:
        raise SampleError(LossReason.DECODE_ERROR, complaint)
    try:
        media = target.read_bytes()
        found = probe(media)
    except (SampleError, FileNotFoundError) as error:
        if task.is_cut:
            raise SampleError(LossReason.TOO_SHORT, "there is no frame in its span") from error
        _as_it_is(task)
        raise SampleError(LossReason.DECODE_ERROR, complaint or "nothing came out of it") from error
    if not task.is_cut and (complaint or (not seen.still and found.duration < 0.9 * seen.seconds - 0.5)):
        _as_it_is(task)
    return _Made(media, target.suffix, found)
