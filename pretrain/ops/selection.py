"""Which backends of the scan run on this machine, and which one a tensor gets.

`backend="auto"` takes the fastest that serves the tensor at hand; the environment variable VIDEOMAMBA_OPS=reference
keeps everything in plain PyTorch.
"""

import functools
import logging
import os
from dataclasses import dataclass

import torch

from configs.errors import UserError
from pretrain.ops import build

log = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu")
CPU_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BackendStatus:
    """One backend as `videomamba doctor` shows it: whether it runs here, if not why, and whether it is the default."""

    name: str
    available: bool
    reason: str
    default: bool


def backends() -> list[BackendStatus]:
    """Every backend, whether it runs on this machine, and which one CPU tensors get; compiles what was not yet."""
    forced = os.environ.get("VIDEOMAMBA_OPS") == "reference"
    reason = load_cpu_kernels()
    default = "reference" if forced or reason else "cpu"
    return [
        BackendStatus("cpu", not reason, reason, default == "cpu"),
        BackendStatus("reference", True, "", default == "reference"),
    ]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose_backend(backend: str, device: str, dtype: torch.dtype) -> str:
    """The backend for tensors of this device and type; to torch.compile a constant."""
    if backend not in ("auto", *BACKENDS):
        raise UserError(f"There is no scan backend {backend!r}.", f"Use one of auto, {', '.join(BACKENDS)}.")
    if backend == "cpu":
        require_backend("cpu")
        if device != "cpu" or dtype not in CPU_TYPES:
            raise ValueError(f"the cpu backend takes float32, bfloat16 and float16 on a CPU, not {dtype} on {device}")
        return "cpu"
    if backend == "reference" or os.environ.get("VIDEOMAMBA_OPS") == "reference" or torch.compiler.is_exporting():
        return "reference"  # an exported graph holds no operator of ours, so that it runs where we are not installed
    if device != "cpu" or dtype not in CPU_TYPES:
        return "reference"
    reason = load_cpu_kernels()
    if reason:
        warn_slow(reason)
        return "reference"
    return "cpu"


def require_backend(backend: str) -> None:
    """UserError if the backend does not run here."""
    if backend == "cpu" and (reason := load_cpu_kernels()):
        raise UserError(f"The CPU kernels are not available: {reason}.", "Install g++, or use backend=auto.", 1)


@functools.cache
def load_cpu_kernels() -> str:
    """Build and load the C++ kernels, once a process; why that failed, or nothing."""
    try:
        torch.ops.load_library(build.build())
    except build.BuildError as error:
        return str(error)
    except OSError as error:
        return f"the compiled library does not load: {error}"
    return ""


@functools.cache
def warn_slow(reason: str) -> None:
    """Say, once for each reason, that the scan is slow and what would make it fast."""
    log.warning(
        "the scan runs in plain PyTorch, about 10 times slower than the C++ kernels: %s. Install g++ (Debian, Ubuntu:"
        " apt install g++) and start again; VIDEOMAMBA_OPS=reference keeps PyTorch and silences this.",
        reason,
    )
