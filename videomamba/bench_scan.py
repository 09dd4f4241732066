"""`videomamba bench scan`: the scan and the convolution of the mixer against plain PyTorch, in time and memory.

Rows are `WHAT/BATCHxLENGTHxCHANNELS`; milliseconds are forward and backward together unless the name says `forward`.

    train, forward     selective_scan against the eager loop with autograd
    bf16               the same with bfloat16 u, delta and z, which the eager loop casts to float32
    train-unbound, train-chunked, train-doubling    against quicker forms of the scan in plain PyTorch (baselines.py)
    both               the fused scan of both directions against two single ones, gated and added
    conv               the fused convolution and SiLU of both directions against F.conv1d
    memory             what forward and backward hold at their peak above their inputs, each in a fresh process (Linux)

Before it is measured, everything is checked to give the same result, gradients too. Ours and the baseline take turns,
in each of which one runs for a tenth of a second, or once: a model calls its scans one after another too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import UserError
from videomamba.bench_table import Row, interleave, report, row
from videomamba.memory import alone, give_back_memory, peak_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MEGABYTE = 1e6
LEAST = 0.1  # seconds that each runs in a turn
DOUBLING_MOST = 8 * 257 * 384  # elements of u: beyond, doubling takes seconds and gigabytes


@dataclass(frozen=True)
class Shape:
    """The size of one problem."""

    batch: int
    length: int
    channels: int
    state: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.channels}"


SHAPES = ("8x257x384", "4x785x384", "1x1569x1152")


def scan(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
    shapes: Annotated[list[str] | None, typer.Option("--shape", help="BATCHxLENGTHxCHANNELS; may be repeated.")] = None,
    state: Annotated[int, typer.Option(min=1, help="State size of a channel.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="One small shape, once: does everything run?")] = False,
) -> None:
    """The selective scan and the convolution against plain PyTorch: an eager loop, quicker forms, F.conv1d; memory."""
    asked = shapes or (["2x257x128"] if quick else SHAPES)
    problems = [_parse(text, state) for text in asked]
    report("scan", list(measure(problems, 1 if quick else repeats)), json_file)


def _parse(text: str, state: int) -> Shape:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"{text!r} is no shape.", "Write BATCHxLENGTHxCHANNELS, such as --shape 4x785x384.")
    batch, length, channels = map(int, sizes)
    return Shape(batch, length, channels, state)


def measure(problems: list[Shape], repeats: int) -> Iterator[Row]:
    """All rows, those of the first kind for every problem first."""
    kinds = (_against_eager, _against_pytorch, _both_directions, _convolutions)
    for kind in kinds:
        for shape in problems:
            yield from kind(shape, repeats)
    yield from _memory(problems)


@dataclass(frozen=True)
class Inputs:
    """One scan's tensors, all of them leaves."""

    leaves: "list[Tensor]"  # u, delta, A, B, C, D, z, delta_bias

    @classmethod
    def draw(cls, shape: Shape, dtype: "torch.dtype | None" = None) -> "Inputs":
        """Normal values from a fixed seed, A as a new model has it; u, delta and z in `dtype`."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(0)
        b, n, d, s = shape.batch, shape.length, shape.channels, shape.state
        sizes = ((b, n, d), (b, n, d), (d, s), (b, n, s), (b, n, s), (d,), (b, n, d), (d,))
        tensors = [torch.randn(size, device=device, generator=generator) for size in sizes]
        tensors[2] = -torch.arange(1.0, s + 1, device=device).repeat(d, 1)
        if dtype is not None:
            tensors = [x.to(dtype) if x.shape == (b, n, d) else x for x in tensors]
        return cls([x.requires_grad_() for x in tensors])

    def ours(self) -> "Tensor":
        """By the backend that this machine gets."""
        from pretrain.ops import selective_scan

        u, delta, A, B, C, D, z, bias = self.leaves
        return selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True)

    def eager(self) -> "Tensor":
        """By the eager loop, in float32, with the result in u's type."""
        from videomamba.baselines import eager_scan

        return eager_scan(*(x.float() for x in self.leaves)).to(self.leaves[0].dtype)


def _training(forward: "Callable[[], Tensor]", leaves: "list[Tensor]") -> "Callable[[], tuple[Tensor, ...]]":
    """A forward and a backward pass, from a gradient of y that is the same for all: gives the gradients."""
    import torch

    with torch.no_grad():
        y = forward()
    grad = torch.sin(torch.arange(y.numel(), device=y.device)).view_as(y).to(y.dtype)
    return lambda: torch.autograd.grad(forward(), leaves, grad)


def _compared(
    name: str,
    ours: "Callable[[], tuple[Tensor, ...]]",
    baseline: "Callable[[], tuple[Tensor, ...]]",
    baseline_name: str,
    repeats: int,
) -> Row:
    """The row of two that give the same up to rounding, which is checked."""
    for a, b in zip(ours(), baseline(), strict=True):
        error = float((a - b).float().norm() / b.float().norm())
        if not error < (2e-2 if a.element_size() == 2 else 1e-3):
            raise ArithmeticError(f"{name}: ours and {baseline_name} differ by {error:.1e} of a gradient")
    return row(name, *interleave(ours, baseline, repeats, LEAST), baseline_name)


def _against_eager(shape: Shape, repeats: int) -> Iterator[Row]:
    import torch

    inputs, half = Inputs.draw(shape), Inputs.draw(shape, torch.bfloat16)
    for name, given in (("train", inputs), ("bf16", half)):
        ours, eager = (_training(forward, given.leaves) for forward in (given.ours, given.eager))
        yield _compared(f"{name}/{shape}", ours, eager, "eager", repeats)
    with torch.no_grad():
        yield row(f"forward/{shape}", *interleave(inputs.ours, inputs.eager, repeats, LEAST), "eager")


def _against_pytorch(shape: Shape, repeats: int) -> Iterator[Row]:
    from pretrain.ops.quick_reference import chunked_scan
    from videomamba.baselines import doubling_scan, unbound_scan

    inputs = Inputs.draw(shape)
    ours = _training(inputs.ours, inputs.leaves)
    forms: dict[str, Callable[[], Tensor]] = {
        "unbound": partial(unbound_scan, *inputs.leaves),
        "chunked": partial(_first, chunked_scan, inputs.leaves),
    }
    if shape.batch * shape.length * shape.channels <= DOUBLING_MOST:
        forms["doubling"] = partial(doubling_scan, *inputs.leaves)
    for name, forward in forms.items():
        yield _compared(f"train-{name}/{shape}", ours, _training(forward, inputs.leaves), name, repeats)


def _first(form: "Callable[..., tuple[Tensor, Tensor]]", leaves: "list[Tensor]") -> "Tensor":
    """y of a form that gives the last state as well."""
    return form(*leaves, delta_softplus=True)[0]


def _both_directions(shape: Shape, repeats: int) -> Iterator[Row]:
    import torch
    from torch.nn.functional import silu

    from pretrain.ops import Direction, bidirectional_scan, selective_scan

    *_, z, _ = inputs = Inputs.draw(shape).leaves
    again = [x.detach().clone().requires_grad_() for x in inputs]
    ahead, back = (Direction(u, delta, A, B, C, D, bias) for u, delta, A, B, C, D, _, bias in (inputs, again))
    leaves = [x for x in (*ahead, *back, z) if x is not None]

    def single(direction: Direction, reverse: bool) -> torch.Tensor:
        u, delta, A, B, C, D, bias = direction
        return selective_scan(u, delta, A, B, C, D, None, bias, delta_softplus=True, reverse=reverse)

    fused = _training(lambda: bidirectional_scan(ahead, back, z), leaves)
    singles = _training(lambda: (single(ahead, False) + single(back, True)) * silu(z), leaves)
    yield _compared(f"both/{shape}", fused, singles, "two scans", repeats)


def _convolutions(shape: Shape, repeats: int) -> Iterator[Row]:
    """x is half of a projection, as in the mixer: (B, L, 2 D) for ours, (B, 2 D, L) for the baseline."""
    import torch

    from pretrain.ops import bidirectional_conv1d
    from videomamba.baselines import conv1d_both

    b, n, d = shape.batch, shape.length, shape.channels
    wide_BLE = Inputs.draw(Shape(b, n, 2 * d, 1)).leaves[0]
    wide_BEL = wide_BLE.detach().transpose(1, 2).contiguous().requires_grad_()
    device = wide_BLE.device
    weight, weight_b = (torch.randn(d, 4, device=device, requires_grad=True) for _ in range(2))
    bias, bias_b = (torch.randn(d, device=device, requires_grad=True) for _ in range(2))
    filters = [weight, bias, weight_b, bias_b]

    def ours() -> torch.Tensor:
        return torch.stack(bidirectional_conv1d(wide_BLE[..., :d], weight, bias, weight_b, bias_b))

    def baseline() -> torch.Tensor:
        ahead, flipped = conv1d_both(wide_BEL[:, :d], weight, bias, weight_b, bias_b)
        return torch.stack([ahead, flipped])

    with torch.no_grad():
        mine, theirs = ours(), baseline().transpose(2, 3)
        torch.testing.assert_close(mine, torch.stack([theirs[0], theirs[1].flip(1)]), rtol=1e-3, atol=1e-3)
    times = interleave(_training(ours, [wide_BLE, *filters]), _training(baseline, [wide_BEL, *filters]), repeats, LEAST)
    yield row(f"conv/{shape}", *times, "conv1d")


def _memory(problems: list[Shape]) -> Iterator[Row]:
    asked = [(name, shape) for shape in problems for name in ("ours", "eager")]
    peaks = alone(peak_bytes, asked, ["pretrain.ops", "videomamba.baselines"])
    for shape, ours, eager in zip(problems, peaks[::2], peaks[1::2], strict=True):
        yield row(f"memory/{shape}", ours / MEGABYTE, eager / MEGABYTE, "eager", "MB")


def peak_bytes(name: str, shape: Shape) -> int:
    """What forward and backward hold at their peak above their inputs. For a process that does nothing else."""
    give_back_memory()
    for measured in (Shape(1, 2, shape.channels, shape.state), shape):  # the first run loads what it needs
        inputs = Inputs.draw(measured)
        peak = peak_of(_training(inputs.ours if name == "ours" else inputs.eager, inputs.leaves))
    return peak
