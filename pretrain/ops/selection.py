"""Which backends of the scan run on this machine, and which one a tensor gets.

`backend="auto"` takes the first that runs here of those in AUTO for the tensor's device, and plain PyTorch where none
does. The environment variable VIDEOMAMBA_OPS puts a backend of that name in the place of "auto".
"""

import functools
import importlib
import importlib.util
import logging
import os
from dataclasses import dataclass

import torch

from configs.errors import UserError
from pretrain.ops import build

log = logging.getLogger(__name__)

BACKENDS = ("cpu", "triton", "mamba_ssm", "reference")
AUTO = {"cpu": ("cpu",), "cuda": ("triton", "mamba_ssm")}
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_GPU = "there is no NVIDIA GPU here"
CURES = {
    "cpu": "apt-get install g++",
    "triton": "pip install --force-reinstall torch",  # torch's CUDA build brings the triton that fits it
    "mamba_ssm": "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation mamba-ssm",
}


@dataclass(frozen=True)
class BackendStatus:
    """One backend as `videomamba doctor` shows it.

    Whether it runs here; if not why, and the command that mends it (none where no command would); whether tensors of
    this machine's fastest device get it.
    """

    name: str
    available: bool
    reason: str
    default: bool
    cure: str = ""


def backends() -> list[BackendStatus]:
    """Every backend, whether it runs on this machine, and which one is the default; compiles what was not yet."""
    reasons = {name: why_missing(name) for name in BACKENDS}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    running = (name for name in (*AUTO[device], "reference") if not reasons[name])
    default = asked_for() or next(running)
    return [
        BackendStatus(name, not reason, reason, name == default, "" if reason in ("", NO_GPU) else CURES[name])
        for name, reason in reasons.items()
    ]


def asked_for() -> str:
    """The backend that VIDEOMAMBA_OPS names, or nothing. UserError if there is none of that name."""
    named = os.environ.get("VIDEOMAMBA_OPS", "auto")
    _check_name(named, ", which VIDEOMAMBA_OPS names")
    return "" if named == "auto" else named


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose_backend(backend: str, device: str, dtype: torch.dtype) -> str:
    """The backend for tensors of this device and type; to torch.compile a constant.

    UserError if the backend that was asked for does not exist or run here, ValueError if it does not take the tensor.
    """
    _check_name(backend)
    if backend == "auto":
        if torch.compiler.is_exporting():
            return "reference"  # an exported graph holds no operator of ours: it runs where we are not installed
        backend = asked_for() or _fastest(device, dtype)
    if backend != "reference":
        require_backend(backend)
        if dtype not in KERNEL_TYPES or device not in _devices(backend):
            takes = f"float32, bfloat16 and float16 on {' or '.join(_devices(backend))}"
            raise ValueError(f"the {backend} backend takes {takes}, not {dtype} on {device}")
    return backend


def require_backend(backend: str) -> None:
    """UserError if the backend does not run here."""
    if reason := why_missing(backend):
        cure = "Use backend=auto." if reason == NO_GPU else f"{CURES[backend]}, or use backend=auto."
        raise UserError(f"The scan backend {backend} does not run here: {reason}.", cure, 1)


def why_missing(backend: str) -> str:
    """Why the backend does not run here, or nothing; loads it, which for the C++ kernels may mean to compile them."""
    loaders = {"cpu": load_cpu_kernels, "triton": load_triton, "mamba_ssm": load_mamba_ssm}
    return loaders[backend]() if backend in loaders else ""


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
def load_triton() -> str:
    """Import the Triton kernels and start one of them; why that failed, or nothing.

    In Triton's interpreter the import is all there is to try.
    """
    if not interpreting() and not torch.cuda.is_available():
        return NO_GPU
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        from pretrain.ops import triton_launch

        if not interpreting():
            x = torch.ones(1, 1, 1, device="cuda")
            triton_launch.conv_forward(x, x[0], None, reverse=False, silu=False).item()
    except Exception as error:  # noqa: BLE001  no compiler, an old driver, an old GPU: each has an exception of its own
        return f"a trial run of Triton failed: {_first_line(error)}"
    return ""


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors; Triton looks at this when imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def load_mamba_ssm() -> str:
    """Import mamba-ssm's compiled scan; why that failed, or nothing."""
    if not torch.cuda.is_available():
        return NO_GPU
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba-ssm is not installed"
    try:
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except Exception as error:  # noqa: BLE001  a compiled package of another torch dies of anything
        return f"mamba-ssm does not import: {_first_line(error)}"
    return ""


@functools.cache
def warn_slow(reason: str) -> None:
    """Say, once for each reason, that the scan is slow and what would make it fast."""
    log.warning(
        "the scan runs in plain PyTorch, about 10 times slower than the C++ kernels: %s. Install g++ (Debian, Ubuntu:"
        " apt install g++) and start again; VIDEOMAMBA_OPS=reference keeps PyTorch and silences this.",
        reason,
    )


@functools.cache
def warn_slow_gpu(reasons: str) -> None:
    """The same for a GPU without kernels."""
    log.warning(
        "the scan runs in plain PyTorch on the GPU, many times slower than a kernel: %s. `videomamba doctor` says what"
        " mends it; VIDEOMAMBA_OPS=reference keeps PyTorch and silences this.",
        reasons,
    )


def _fastest(device: str, dtype: torch.dtype) -> str:
    """The first backend of AUTO that runs here. mamba-ssm's is no operator, so torch.compile gets another."""
    if device not in AUTO or dtype not in KERNEL_TYPES:
        return "reference"
    candidates = [name for name in AUTO[device] if name != "mamba_ssm" or not torch.compiler.is_compiling()]
    reasons: dict[str, str] = {}
    for name in candidates:
        if not (reason := why_missing(name)):
            return name
        reasons[name] = reason
    if device == "cpu":
        warn_slow(reasons["cpu"])
    else:
        warn_slow_gpu("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    return "reference"


def scan_device(backend: str) -> str:
    """The device that the backend is for; "reference" is for any, and takes the CPU here."""
    return next(iter(_devices(backend)), "cpu")


def _devices(backend: str) -> tuple[str, ...]:
    if backend == "triton" and interpreting():
        return ("cpu",)
    return tuple(device for device, names in AUTO.items() if backend in names)


def _check_name(backend: str, where: str = "") -> None:
    if backend not in ("auto", *BACKENDS):
        raise UserError(f"There is no scan backend {backend!r}{where}.", f"Use one of auto, {', '.join(BACKENDS)}.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:160]
