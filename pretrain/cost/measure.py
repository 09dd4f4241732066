"""What a step really takes, to hold the estimates against: FLOPs by torch's counter, memory by its allocator.

torch's counter does not know our operators (nor attention on a CPU); they are counted here from the shapes that they
are really called with.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import pretrain.ops  # noqa: F401  (registers the operators)
from pretrain.cost import arithmetic
from pretrain.models.teacher import ClipTeacher

Size = Sequence[int]


def _one_scan(u: Size, _delta: Size, A: Size, *_: Any, **__: Any) -> float:
    return arithmetic.scan(u[0] * u[1], u[2], A[1])


def _one_scan_back(
    _y: Size, _last: Size | None, _states: Size, u: Size, _delta: Size, A: Size, *_: Any, **__: Any
) -> float:
    return arithmetic.scan(u[0] * u[1], u[2], A[1], backward=True)


def _two_scans(u: Size, _delta: Size, A: Size, *_: Any, **__: Any) -> float:
    return 2 * arithmetic.scan(u[0] * u[1], u[2], A[1])


def _two_scans_back(
    _y: Size, _states: Size, _states_b: Size, u: Size, _delta: Size, A: Size, *_: Any, **__: Any
) -> float:
    return 2 * arithmetic.scan(u[0] * u[1], u[2], A[1], backward=True)


def _convolutions(times: int) -> Callable[..., float]:
    """Counts 2 K operations a value, `times` over; x and weight are the first two shapes of three and of two axes."""

    def count(*shapes: Any, **_: Any) -> float:
        sizes = [shape for shape in shapes if isinstance(shape, (tuple, torch.Size))]
        x = next(shape for shape in sizes if len(shape) == 3)
        weight = next(shape for shape in sizes if len(shape) == 2)
        return times * 2.0 * math.prod(x) * weight[1]

    return count


def _attention(query: Size, key: Size, value: Size, *_: Any, **__: Any) -> float:
    return float(sdpa_flop_count(query, key, value))


def _attention_back(_gradient: Size, query: Size, key: Size, value: Size, *_: Any, **__: Any) -> float:
    return 2 * _attention(query, key, value)  # without the scores that the kernel computes again


def _native_attention(query: Size, *_: Any, **__: Any) -> float:
    frames, tokens, width = query
    return frames * (4 * arithmetic.product(tokens, width, width) + 2 * arithmetic.product(tokens, width, tokens))


def _counts() -> dict[Any, Callable[..., float]]:
    ours, aten = torch.ops.videomamba, torch.ops.aten
    return {
        ours.scan_forward: _one_scan,
        ours.scan_backward: _one_scan_back,
        ours.bidirectional_scan_forward: _two_scans,
        ours.bidirectional_scan_backward: _two_scans_back,
        ours.conv_forward: _convolutions(1),
        ours.conv_backward: _convolutions(2),
        ours.bidirectional_conv_forward: _convolutions(2),
        ours.bidirectional_conv_backward: _convolutions(4),
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_back,
        aten._native_multi_head_attention: _native_attention,
    }


def counted_flops(run: Callable[[], object]) -> dict[str, float]:
    """FLOPs of what `run` computes, by operator; `sum` of the values is all of them."""
    with FlopCounterMode(display=False, custom_mapping=_counts()) as counter:
        run()
    return {str(name): float(count) for name, count in counter.get_flop_counts()["Global"].items()}


def frame_flops(teacher: ClipTeacher) -> float:
    """What a teacher computes for a frame, whatever its make: torch's count over the frames of one tubelet."""
    place = next(teacher.visual.parameters())
    frames = torch.zeros(1, teacher.tubelet, 3, *teacher.tower.size, device=place.device, dtype=place.dtype)
    return sum(counted_flops(lambda: teacher.features(frames)).values()) / teacher.tubelet


@dataclass(frozen=True)
class Allocated:
    """Bytes that torch's CPU allocator gave out while something ran: the most at a time, and what was kept."""

    peak: int
    kept: int


def allocated(run: Callable[[], object]) -> Allocated:
    """What `run` allocates through torch's CPU allocator above what there was before, kernels' own memory included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    now = peak = 0
    for event in _memory_events(found):
        now += event
        peak = max(peak, now)
    return Allocated(peak, now)


def _memory_events(found: Any) -> list[int]:
    """Bytes of every allocation (above 0) and release (below) in the order in which they happened."""
    events = found.profiler.kineto_results.events()
    memory = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return [size for _, size in sorted(memory, key=lambda pair: pair[0])]
