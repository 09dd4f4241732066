"""What a device can do at the most: bf16 matrix products without sparsity, and memory, from its maker's data sheet.

A CPU has no such sheet that would fit a machine's clock, cores and threads: its peak is that of a short product.
"""

import difflib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """A kind of GPU: dense bf16 peak in FLOP/s, memory in bytes as its driver shows it, and who says so.

    `names` are parts of what torch.cuda.get_device_name gives; all of them have to be in it.
    """

    label: str
    names: tuple[str, ...]
    peak: float
    memory: int
    source: str


GB = 10**9
DEVICES: dict[str, Device] = {
    "b200": Device("NVIDIA B200", ("B200",), 2250e12, 180 * GB, "NVIDIA DGX B200 data sheet, per GPU"),
    "h200": Device("NVIDIA H200", ("H200",), 989.4e12, 141 * GB, "NVIDIA H200 data sheet, SXM"),
    "h100-pcie": Device("NVIDIA H100 PCIe", ("H100", "PCIe"), 756e12, 80 * GB, "NVIDIA H100 data sheet, PCIe"),
    "h100-nvl": Device("NVIDIA H100 NVL", ("H100", "NVL"), 835e12, 94 * GB, "NVIDIA H100 NVL data sheet"),
    "h100": Device("NVIDIA H100 SXM", ("H100",), 989.4e12, 80 * GB, "NVIDIA H100 data sheet, SXM"),
    "a100-40gb": Device("NVIDIA A100 40 GB", ("A100", "40GB"), 312e12, 40 * GB, "NVIDIA A100 data sheet"),
    "a100": Device("NVIDIA A100 80 GB", ("A100",), 312e12, 80 * GB, "NVIDIA A100 data sheet"),
    "l40s": Device("NVIDIA L40S", ("L40S",), 362e12, 48 * GB, "NVIDIA L40S data sheet"),
    "a10": Device("NVIDIA A10", ("A10",), 125e12, 24 * GB, "NVIDIA A10 data sheet"),
    "l4": Device("NVIDIA L4", ("L4",), 121e12, 24 * GB, "NVIDIA L4 data sheet, half of the figure with sparsity"),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", ("RTX 4090",), 165.2e12, 24 * GB, "NVIDIA Ada architecture paper"),
    "rtx3090": Device("NVIDIA GeForce RTX 3090", ("RTX 3090",), 71e12, 24 * GB, "NVIDIA Ampere GA102 paper"),
}
"""By the name that `--gpu` takes. More particular names stand before those that they contain (H100 PCIe, H100)."""


@dataclass(frozen=True)
class Peak:
    """FLOP/s that a device can reach (None: not known), and where the figure is from, or why there is none."""

    flops: float | None
    source: str


def device_of(name: str) -> Device:
    """The device that a user calls `name`; ConfigError naming the nearest one."""
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    near = difflib.get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.4)
    hint = f"Did you mean '{near[0]}'?" if near else f"Use one of: {', '.join(sorted(DEVICES))}."
    raise ConfigError(f"There is no GPU '{name}' in the table.", hint)


def by_full_name(name: str) -> Device | None:
    """The device whose parts of a name are all in what the driver calls it."""
    words = name.replace("-", " ").split()
    return next((one for one in DEVICES.values() if all(_has(words, name, part) for part in one.names)), None)


def _has(words: list[str], name: str, part: str) -> bool:
    return part in name if " " in part else any(word == part for word in words)


def find_peak(device: "torch.device", precision: str) -> Peak:
    """The peak of the device that a run is on: of its data sheet, or of a short product on a CPU (0.2 seconds)."""
    import torch

    if device.type == "cpu":
        return _measured(torch.bfloat16 if precision == "bf16" else torch.float32)
    name = torch.cuda.get_device_name(device)
    known = by_full_name(name)
    if known is None:
        return Peak(None, f"the peak of '{name}' is not in the table of pretrain/cost/devices.py")
    if precision == "fp32":
        return Peak(None, "a run in float32 does not use the bf16 units that data sheets count")
    return Peak(known.peak, known.source)


def _measured(dtype: "torch.dtype", side: int = 768, seconds: float = 0.1) -> Peak:
    """The quickest of float32 products (and of bf16 ones, where a run has them) on this CPU with torch's threads."""
    import torch

    best = 0.0
    for kind in {torch.float32, dtype}:
        left, right = torch.randn(2, side, side).to(kind)
        left @ right
        until = time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            left @ right
            best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return Peak(best, f"a product of {side}x{side} matrices on this CPU, {torch.get_num_threads()} thread(s)")
