"""Where the `ffmpeg` program is: the system's, else the one in the imageio-ffmpeg wheel."""

import functools
import shutil
import subprocess

from configs.errors import UserError


@functools.cache
def ffmpeg_program() -> str:
    """The path of an ffmpeg that runs and can write H.264: the one on PATH, else the imageio-ffmpeg wheel's.

    Raises UserError where there is neither. The answer is kept for the life of the process.
    """
    seen: list[str] = []
    for where, program in (("on PATH", shutil.which("ffmpeg")), ("in the imageio-ffmpeg wheel", _wheel_program())):
        if program is not None and _writes_h264(program):
            return program
        seen.append(f"none {where}" if program is None else f"{program} does not run or has no libx264 encoder")
    cause = f"No usable ffmpeg was found ({'; '.join(seen)})."
    raise UserError(cause, "Run `pip install imageio-ffmpeg`.", exit_code=1)


@functools.cache
def ffmpeg_filters() -> frozenset[str]:
    """The names of the filters that `ffmpeg_program()` has."""
    question = [ffmpeg_program(), "-hide_banner", "-filters"]
    told = subprocess.run(question, check=False, capture_output=True, timeout=30, text=True).stdout
    return frozenset(words[1] for line in told.splitlines() if len(words := line.split()) > 2)


def _wheel_program() -> str | None:
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):  # no wheel, or a wheel without a binary for this platform
        return None


def _writes_h264(program: str) -> bool:
    """Some distributions ship an ffmpeg without libx264."""
    try:
        question = [program, "-hide_banner", "-h", "encoder=libx264"]
        asked = subprocess.run(question, check=False, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return False
    return asked.returncode == 0 and b"Encoder libx264" in asked.stdout
