"""The last stop of an error: what a user can mend is said in one sentence of cause and one of cure."""

import errno
import os
import sys
import traceback

from configs.errors import UserError

INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_EXTRAS = {
    "mamba_ssm": "gpu",
    "causal_conv1d": "gpu",
    "triton": "gpu",
    "wandb": "wandb",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "s3fs": "s3",
    "gcsfs": "gs",
}


def explain(error: BaseException) -> UserError | None:
    """`error` as a cause, a cure and an exit code, or None where it is a fault of ours that needs its traceback."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return UserError("Interrupted.", "What was finished is kept; the same command goes on from there.", INTERRUPTED)
    if _is_disk_full(error):
        where = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return UserError(f"The disk is full{where}.", "Free some space and run the same command again.", 1)
    if isinstance(error, OSError) and error.errno in _NOT_ALLOWED and error.filename:
        return UserError(f"{error.filename} cannot be opened: {error.strerror}.", "Give a path you may use.", 2)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _missing_package(error.name.partition(".")[0])
    return None


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
        return True
    # safetensors and other compiled writers keep the system's words and lose the number
    return "No space left on device" in str(error)


def _missing_package(name: str) -> UserError | None:
    if name in ("configs", "data_pipeline", "pretrain", "retrieval_eval", "slurm", "videomamba"):
        return None
    extra = _EXTRAS.get(name)
    cure = f"Install it with: pip install 'videomamba[{extra}]'." if extra else "Install again: `make install`."
    return UserError(f"The Python package '{name}' is missing.", cure, 1)


def report(error: BaseException, debug: bool) -> int | None:
    """Write cause and cure of `error` to stderr and return the exit code; None if it is not a user's to mend."""
    told = explain(error)
    if told is None:
        return None
    if debug:
        traceback.print_exception(error)
    sys.stderr.write(f"{_line('error: ' if told.exit_code != INTERRUPTED else '', told.cause)}\n")
    if told.cure:
        sys.stderr.write(f"{_line('  cure: ', told.cure)}\n")
    sys.stderr.flush()
    return told.exit_code


def end_rank(end: BaseException) -> None:
    """End this process at once if it is one rank of several and failed; returns if it is not.

    A failed rank must take the others with it, and the usual way out may never end: taking a process group down
    waits for ranks that wait for this one. Whoever started the ranks sees this one go, and ends the others.
    """
    code = end.code if isinstance(end, SystemExit) else 1
    if not code or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    if not isinstance(end, SystemExit):
        traceback.print_exception(end)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _line(prefix: str, text: str) -> str:
    return prefix + " ".join(text.split())
