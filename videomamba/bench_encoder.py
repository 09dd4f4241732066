"""`videomamba bench encoder`: what one more frame costs, in time and memory, of VideoMamba-Ti and of a ViT-Ti.

Time is taken in turns in one process. Memory is the peak above what the process held before a forward pass, each
in a fresh process (Linux). `time/exponent` and `memory/exponent` are slopes of a line through the logarithms: 1 is
linear. `crossing` is where the two curves meet, interpolated in logarithms. `block/*` is one block's time by parts.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.files import write_whole
from videomamba.bench_table import Row, report, row
from videomamba.memory import alone, give_back_memory, peak_of

if TYPE_CHECKING:
    from torch import Tensor, nn

VIT = "ViT-Ti, joint attention"
BLOCK = "whole block"


@dataclass(frozen=True)
class Setting:
    """Which clips are measured, with which pass, and for how long: up to `turns` turns, or `seconds` of them.

    Growth is that from `fit_from` frames on: what is paid once for any clip weighs most on the shortest.
    """

    frames: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    fit_from: int = 4
    image_size: int = 224
    train: bool = False
    turns: int = 5
    seconds: float = 30.0


QUICK = Setting(frames=(2, 4), fit_from=2, image_size=64, turns=2, seconds=2.0)


def encoder(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw both curves on this HTML page.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few, small frames: to see that it works.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward, not forward alone.")] = False,
) -> None:
    """VideoMamba-Ti and a ViT-Ti with joint attention from 1 to 64 frames: time, memory, growth, a block's parts."""
    rows = list(measure(replace(QUICK if quick else Setting(), train=train)))
    report("encoder", rows, json_file)
    if plot is not None:
        write_plot(rows, plot)


def build(name: str, setting: Setting) -> "nn.Module":
    """`ours` or `baseline`, with weights at random, ready for every number of frames of the setting."""
    import torch

    from pretrain.models.config import VisionConfig
    from pretrain.models.videomamba import VideoMamba
    from videomamba.baselines import JointAttentionViT

    torch.manual_seed(0)
    most = max(setting.frames)
    if name == "baseline":
        return JointAttentionViT(most, setting.image_size).train(setting.train)
    config = VisionConfig.model_validate({"name": "tiny", "frames": most, "image_size": setting.image_size})
    return VideoMamba(config).train(setting.train)


def one_pass(model: "nn.Module", frames: int, setting: Setting) -> Callable[[], None]:
    """One clip forward under bf16 autocast, and backward where the setting trains."""
    import torch

    device = next(model.parameters()).device
    video = torch.randn(1, 3, frames, setting.image_size, setting.image_size, device=device)

    def run() -> None:
        with torch.set_grad_enabled(setting.train), torch.autocast(device.type, torch.bfloat16):
            out = model(video)
            tokens: Tensor = out if isinstance(out, torch.Tensor) else out.tokens_BLD
            if setting.train:
                tokens.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def measure(setting: Setting) -> Iterator[Row]:
    """Rows of time, of memory, of their growth, and of one block's parts."""
    yield from _curves("memory", "MiB", setting, memory(setting))
    yield from _curves("time", "ms", setting, times(setting))
    yield from block_parts(setting)


def times(setting: Setting) -> list[tuple[float, float]]:
    """Median milliseconds of ours and of the baseline for each number of frames, run in turns."""
    pair = [build(name, setting) for name in ("ours", "baseline")]
    for model in pair:
        one_pass(model, min(setting.frames), setting)()
    found = []
    for frames in setting.frames:
        passes = [one_pass(model, frames, setting) for model in pair]
        taken: tuple[list[float], list[float]] = ([], [])
        began = time.perf_counter()
        while len(taken[0]) < setting.turns and (not taken[0] or time.perf_counter() - began < setting.seconds):
            for run, kept in zip(passes, taken, strict=True):
                start = time.perf_counter()
                run()
                kept.append((time.perf_counter() - start) * 1000)
        found.append((median(taken[0]), median(taken[1])))
    return found


def memory(setting: Setting) -> list[tuple[float, float]]:
    """Mebibytes that a pass needs at its peak, of ours and of the baseline, each in a process of its own."""
    asked = [(name, frames, setting) for frames in setting.frames for name in ("ours", "baseline")]
    peaks = alone(peak_bytes, asked, ["pretrain.models.videomamba", "videomamba.baselines"])
    return [(ours / 2**20, baseline / 2**20) for ours, baseline in zip(peaks[::2], peaks[1::2], strict=True)]


def peak_bytes(name: str, frames: int, setting: Setting) -> int:
    """What a pass needs at its peak, in bytes; after a short pass to warm up. For a process that does nothing else."""
    give_back_memory()
    model = build(name, setting)
    one_pass(model, 1, setting)()
    return peak_of(one_pass(model, frames, setting))


def _curves(what: str, unit: str, setting: Setting, values: Sequence[tuple[float, float]]) -> Iterator[Row]:
    """A row for each number of frames, the exponents, and the crossing where there is one."""
    ours, baseline = zip(*values, strict=True)
    for frames, (a, b) in zip(setting.frames, values, strict=True):
        yield row(f"{what}/{frames}", a, b, VIT, unit)
    first = setting.frames.index(setting.fit_from)
    slopes = [exponent(setting.frames[first:], curve[first:]) for curve in (ours, baseline)]
    yield row(f"{what}/exponent", slopes[0], slopes[1], VIT, "")
    crossing = crossings(setting.frames, ours, baseline)
    if crossing is not None:
        yield row(f"{what}/crossing", crossing, crossing, VIT, "frames")


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the least-squares line through (log size, log value): how a cost grows."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - middle_x) ** 2 for a in x)


def crossings(sizes: Sequence[float], ours: Sequence[float], baseline: Sequence[float]) -> float | None:
    """The size from which on ours is the smaller, interpolated in logarithms; None where the curves do not cross so."""
    lead = [math.log(b / a) for a, b in zip(ours, baseline, strict=True)]
    behind = [i for i, value in enumerate(lead) if value < 0]
    if not behind or behind[-1] == len(lead) - 1:
        return None
    i = behind[-1] + 1
    share = lead[i - 1] / (lead[i - 1] - lead[i])
    return math.exp(math.log(sizes[i - 1]) + share * math.log(sizes[i] / sizes[i - 1]))


def block_parts(setting: Setting) -> list[Row]:
    """One block of VideoMamba-Ti at 8 frames, forward and backward under bf16 autocast, by parts: milliseconds.

    The parts are sums of the profiler's own times of operators; what a part calls counts as that part. The last row
    is everything but scan and matrix products.
    """
    import torch
    from torch.autograd.profiler import profile

    from pretrain.models.config import VisionConfig
    from pretrain.models.videomamba import Block

    torch.manual_seed(0)
    size = {"name": "tiny", "frames": 8, "image_size": setting.image_size}
    config = VisionConfig.model_validate(size)
    block = Block(config)
    tokens = 1 + math.prod(config.grid)
    residual_BLD = torch.randn(1, tokens, config.width, requires_grad=True)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out_BLD = residual_BLD + block(residual_BLD)
        out_BLD.backward(torch.ones_like(out_BLD))

    run()
    with profile(use_kineto=False) as seen:
        for _ in range(setting.turns):
            run()
    parts: Counter[str] = Counter()
    for event in seen.function_events or []:
        parts[_part(event)] += event.self_cpu_time_total / 1000 / setting.turns
    whole = sum(parts.values())
    beside = whole - parts["scan"] - parts["matrix products"]
    return [
        *(row(f"block/{name}", value, whole, BLOCK) for name, value in parts.most_common()),
        row("block/all but scan and products", beside, whole, BLOCK),
    ]


def _part(event: Any) -> str:
    """Which part of the block an operator belongs to: by its own name, or that of the nearest caller that tells."""
    while event is not None:
        name = event.name.lower()
        if "videomamba" in name:
            return "scan" if "scan" in name else "causal convolution"
        if "rms_norm" in name or "rmsnorm" in name:
            return "norm"
        if name in ("aten::mm", "aten::addmm", "aten::bmm"):
            return "matrix products"
        if "silu" in name:
            return "gate"
        event = event.cpu_parent
    return "permutes, casts, sums"


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Both curves, of time and of memory over frames, as a page of two charts that needs nothing else."""
    from retrieval_eval.report.charts import Line, line_chart
    from retrieval_eval.report.shell import whole_page

    charts = []
    for what, unit in (("time", "ms"), ("memory", "MiB")):
        points = [r for r in rows if r.name.removeprefix(f"{what}/").isdigit()]
        frames = [int(r.name.rpartition("/")[2]) for r in points]
        lines = [
            Line("VideoMamba-Ti", frames, [r.ours for r in points]),
            Line(VIT, frames, [r.baseline for r in points]),
        ]
        chart = line_chart(what, lines, "frames", unit)
        charts.append(f'<div class="card"><h2>{what.capitalize()}</h2>{chart}</div>')
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, whole_page("What one more frame costs", f'<div class="charts">{"".join(charts)}</div>').encode())
