"""`videomamba bench NAME`: ours against a named baseline, in the same run, interleaved, as a table of medians.

Both are first checked to give the same result. Rows, table and JSON: bench_table.py; baselines: baselines.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from videomamba.bench_decode import decode
from videomamba.bench_encoder import encoder
from videomamba.bench_loader import loader
from videomamba.bench_retrieval import retrieval
from videomamba.bench_table import Row, interleave, report, row
from videomamba.bench_teacher import teacher_cache

app = typer.Typer(no_args_is_help=True, add_completion=False)

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")]


@app.callback()
def _benches() -> None:
    """Measure ours and a named baseline in the same run, interleaved: a table of medians.

    Example: videomamba bench scan --length 785 --json scan.json
    """


@dataclass(frozen=True)
class Size:
    """How large the measured problem is, and how often it is measured."""

    batch: int
    length: int
    width: int
    state: int
    repeats: int


def measure_scan(size: Size) -> Iterator[Row]:
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
        yield row(f"forward ({shape})", *interleave(ours, baseline, size.repeats), "eager loop")
    times = interleave(with_backward(ours), with_backward(baseline), size.repeats)
    yield row(f"forward and backward ({shape})", *times, "eager loop")


@app.command("scan", epilog="Example: videomamba bench scan --length 785 --json scan.json")
def scan(
    json_file: JsonFile = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 393,
    width: Annotated[int, typer.Option(min=1, help="Channels.")] = 384,
    state: Annotated[int, typer.Option(min=1, help="State size of a channel.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 5,
) -> None:
    """The selective scan against the eager loop of Mamba's own reference."""
    report("scan", list(measure_scan(Size(batch, length, width, state, repeats))), json_file)


app.command("encoder", epilog="Example: videomamba bench encoder --json encoder.json --plot encoder.html")(encoder)
app.command("loader", epilog="Example: videomamba bench loader --json loader.json")(loader)
app.command("retrieval", epilog="Example: videomamba bench retrieval --json retrieval.json")(retrieval)
app.command("decode", epilog="Example: videomamba bench decode --clip a.mp4 --clip b.webm")(decode)
app.command(
    "teacher-cache",
    epilog="Example: videomamba bench teacher-cache stage1.yaml data.crop_scale=[1,1] data.frames.rule=middle",
)(teacher_cache)
