"""`videomamba bench NAME`: ours against a named baseline, in the same run, interleaved, as a table of medians.

Both are first checked to give the same result. `--json FILE` writes
`{"bench", "device", "versions", "command", "rows": [{"name", "ours", "baseline", "baseline_name", "unit", "ratio"}]}`
where `ratio` says how many times better ours is: above 1 is better, whatever the unit.
"""

import difflib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import UserError
from data_pipeline.files import write_whole


@dataclass(frozen=True)
class Row:
    """One line of the table: medians of ours and of the baseline."""

    name: str
    ours: float
    baseline: float
    baseline_name: str
    unit: str
    ratio: float


@dataclass(frozen=True)
class Size:
    """How large the measured problem is, and how often it is measured."""

    batch: int
    length: int
    width: int
    state: int
    repeats: int


def interleave(ours: Callable[[], object], baseline: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median milliseconds of both, run in turns after one warm-up each; waits for the GPU where one is used."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for run, kept in zip((ours, baseline), times, strict=True):
            wait()
            began = time.perf_counter()
            run()
            wait()
            if turn:
                kept.append((time.perf_counter() - began) * 1000)
    return statistics.median(times[0]), statistics.median(times[1])


def scan(size: Size) -> Iterator[Row]:
    """The selective scan in float32, alone and with its backward pass, against the eager loop; rows (B, L, D, N)."""
    import torch

    from pretrain.ops import selective_scan
    from videomamba.baselines import eager_scan

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).requires_grad_()

    b, n, d, s = size.batch, size.length, size.width, size.state
    u, delta, B, C, z = draw(b, n, d), draw(b, n, d), draw(b, n, s), draw(b, n, s), draw(b, n, d)
    D, bias = draw(d), draw(d)
    A = -torch.arange(1.0, s + 1, device=device).repeat(d, 1)
    A.requires_grad_()
    leaves = [u, delta, A, B, C, D, z, bias]

    def ours() -> torch.Tensor:
        return selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True)

    def baseline() -> torch.Tensor:
        return eager_scan(u, delta, A, B, C, D, z, bias)

    def with_backward(forward: Callable[[], torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        return lambda: list(torch.autograd.grad(forward().square().sum(), leaves))

    both = with_backward(ours)(), with_backward(baseline)()
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))
    shape = f"{b}, {n}, {d}, {s}"
    with torch.no_grad():
        yield _row(f"forward ({shape})", *interleave(ours, baseline, size.repeats), "eager loop")
    times = interleave(with_backward(ours), with_backward(baseline), size.repeats)
    yield _row(f"forward and backward ({shape})", *times, "eager loop")


def _row(name: str, ours: float, baseline: float, baseline_name: str) -> Row:
    return Row(name, round(ours, 4), round(baseline, 4), baseline_name, "ms", round(baseline / ours, 3))


BENCHES: dict[str, Callable[[Size], Iterator[Row]]] = {"scan": scan}


def describe_device() -> str:
    """The device that is measured, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(BENCHES)}.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 393,
    width: Annotated[int, typer.Option(min=1, help="Channels.")] = 384,
    state: Annotated[int, typer.Option(min=1, help="State size of a channel.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 5,
) -> None:
    """Measure ours and a named baseline in the same run, interleaved: a table of medians.

    Example: videomamba bench scan --length 785 --json scan.json
    """
    if name not in BENCHES:
        near = difflib.get_close_matches(name, BENCHES, n=1, cutoff=0.3)
        hint = f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(BENCHES)}."
        raise UserError(f"There is no bench '{name}'.", hint)
    rows = list(BENCHES[name](Size(batch, length, width, state, repeats)))
    _show(name, rows)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(json_file, (json.dumps(_result(name, rows), indent=2) + "\n").encode())


def _result(name: str, rows: list[Row]) -> dict[str, object]:
    import torch

    from videomamba import __version__

    versions = {"videomamba": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    command = shlex.join(["videomamba", *sys.argv[1:]])
    device = describe_device()
    return {"bench": name, "device": device, "versions": versions, "command": command, "rows": [*map(asdict, rows)]}


def _show(name: str, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name} on {describe_device()}: medians, run in turns", title_justify="left")
    for heading in ("what", "ours", rows[0].baseline_name, "times better"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        table.add_row(row.name, f"{row.ours:.2f} {row.unit}", f"{row.baseline:.2f} {row.unit}", f"{row.ratio:.2f}")
    Console().print(table)
