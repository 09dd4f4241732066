"""What `videomamba doctor` looks at: each check is a function that gives findings and raises nothing."""

import importlib
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["works", "absent", "broken"]
GB = 1e9
INSTALL = "pip install -c constraints.txt --no-build-isolation -e ."


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table; `needed` means that a run on a CPU cannot do without it."""

    what: str
    state: State
    says: str
    cure: str = ""
    needed: bool = False


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:160]


def _imported(module: str, package: str, needed: bool = True, note: str = "") -> Finding:
    """Whether `module` imports, and the version of the distribution `package`."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        importlib.import_module(module)
        return Finding(package, "works", version(package) + note, needed=needed)
    except (ModuleNotFoundError, PackageNotFoundError):
        return Finding(package, "absent", "not installed", INSTALL, needed)
    except Exception as error:  # noqa: BLE001  whatever an import dies of is the finding
        return Finding(package, "broken", _first_line(error), f"pip install --force-reinstall {package}", needed)


def python() -> Iterator[Finding]:
    """The interpreter."""
    ok = sys.version_info >= (3, 11)
    says = f"{platform.python_version()} at {sys.executable}"
    yield Finding(
        "python", "works" if ok else "broken", says, "" if ok else "make clean install PYTHON=python3.12", True
    )


def torch_and_devices() -> Iterator[Finding]:
    """torch, the GPUs it sees, and how fast the CPU's matrix units are."""
    found = _imported("torch", "torch")
    yield found
    if found.state != "works":
        return
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            says = f"{card.name}, {card.total_memory / GB:.0f} GB, compute capability {card.major}.{card.minor}"
            yield Finding(f"GPU {index}", "works", says)
    elif shutil.which("nvidia-smi") is None:
        yield Finding("GPU", "absent", "no NVIDIA driver here; everything runs on the CPU")
    else:
        says = f"there is a driver, but torch was built for {torch.version.cuda or 'CPUs only'}"
        yield Finding("GPU", "broken", says, f"pip install --force-reinstall torch=={torch.__version__.split('+')[0]}")
    yield _processor()


def _processor() -> Finding:
    import torch

    gain = _bf16_gain()
    units = [name for name in ("amx_bf16", "avx512_bf16") if name in _cpu_flags()]
    advice = "" if gain > 1 else "; precision=fp32 is the faster choice"
    says = (
        f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, bf16 units: {', '.join(units) or 'none'}; "
        f"a bf16 product runs {gain:.1f} times as fast as float32{advice}"
    )
    return Finding("CPU", "works", says, needed=True)


def _bf16_gain(size: int = 512, limit: float = 0.6) -> float:
    """How many times faster a bf16 matrix product is than a float32 one: medians, in turns, `limit` seconds in all."""
    import torch

    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    factors = {dtype: torch.randn(size, size).to(dtype) for dtype in times}
    ends = time.perf_counter() + limit
    while len(times[torch.bfloat16]) < 4 or (time.perf_counter() < ends and len(times[torch.bfloat16]) < 16):
        for dtype, factor in factors.items():
            began = time.perf_counter()
            factor @ factor
            times[dtype].append(time.perf_counter() - began)
    plain, short = (statistics.median(times[dtype][1:]) for dtype in (torch.float32, torch.bfloat16))  # without warm-up
    return plain / short


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return set()
    return {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}


def kernels() -> Iterator[Finding]:
    """The backends of the selective scan, and how fast each one is."""
    yield _compiler()
    try:
        from pretrain.ops import backends

        found = backends()
        for backend in found:
            state: State = "works" if backend.available else "absent"
            says = _speed(backend.name) if backend.available else backend.reason
            says += ", the default here" if backend.default else ""
            yield Finding(f"kernel {backend.name}", state, says, backend.cure, needed=backend.name == "reference")
    except Exception as error:  # noqa: BLE001  the kernels' own trouble is a finding, not ours
        yield Finding("kernels", "broken", _first_line(error), INSTALL, needed=True)


def _speed(backend: str) -> str:
    """A scan forward and backward, in milliseconds and beside plain PyTorch on the same device; two seconds at most."""
    from pretrain.ops import scan_device, speed_check

    device = scan_device(backend)
    seconds = speed_check(backend, 1.0, device)
    says = f"{1e3 * seconds:.1f} ms a scan, forward and backward, on the {'GPU' if device == 'cuda' else 'CPU'}"
    if backend == "reference":
        return says
    return f"{says}, {speed_check('reference', 1.0, device) / seconds:.0f} times as fast as PyTorch"


def _compiler() -> Finding:
    compiler = shutil.which("g++") or shutil.which("clang++")
    return Finding(
        "C++ compiler",
        "works" if compiler else "absent",
        compiler or "none: the scan falls back to plain PyTorch, which is much slower",
        "" if compiler else "apt-get install g++",
    )


def media() -> Iterator[Finding]:
    """ffmpeg, which writes clips, and PyAV, which reads them."""
    from configs.errors import UserError

    try:
        from data_pipeline.ffmpeg import ffmpeg_program

        yield Finding("ffmpeg", "works", ffmpeg_program(), needed=True)
    except UserError as error:
        yield Finding("ffmpeg", "broken", error.cause, error.cure, needed=True)
    yield _imported("ffmpeg", "ffmpeg-python")
    yield _imported("av", "av")


def training() -> Iterator[Finding]:
    """The libraries that training stands on."""
    from data_pipeline.torchvision_shim import ensure_torchvision

    try:
        ensure_torchvision()
        yield _imported("torchvision", "torchvision")
    except Exception as error:  # noqa: BLE001  whatever an import dies of is the finding
        yield Finding("torchvision", "broken", _first_line(error), INSTALL, needed=True)
    for module, package in (
        ("open_clip", "open-clip-torch"),
        ("transformers", "transformers"),
        ("webdataset", "webdataset"),
        ("deepspeed", "deepspeed"),
    ):
        yield _imported(module, package)


def retrieval() -> Iterator[Finding]:
    """FAISS, by whichever of its packages brings it."""
    from importlib.metadata import packages_distributions

    yield _imported("faiss", packages_distributions().get("faiss", ["faiss-cpu"])[0])


def room() -> Iterator[Finding]:
    """Disk space in the working directory, and the shared memory that loader processes pass batches through."""
    usage = shutil.disk_usage(Path.cwd())
    tight = usage.free < 2 * GB
    says = f"{usage.free / GB:.0f} GB free of {usage.total / GB:.0f} in {Path.cwd()}"
    yield Finding(
        "disk", "broken" if tight else "works", says, "Free some space, or give --out." if tight else "", True
    )
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Finding("shared memory", "absent", "no /dev/shm on this system")
        return
    free = shutil.disk_usage(shared).free
    small = free < 0.5 * GB
    cure = "docker run --shm-size=8g, or data.workers=0" if small else ""
    yield Finding("shared memory", "broken" if small else "works", f"{free / GB:.1f} GB free in /dev/shm", cure)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python,
    torch_and_devices,
    kernels,
    media,
    training,
    retrieval,
    room,
)
