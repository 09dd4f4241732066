"""What every bench is made of: rows of medians taken in turns, shown as a table and written as JSON.

`{"bench", "device", "versions", "command", "rows": [{"name", "ours", "baseline", "baseline_name", "unit", "ratio"}]}`
where `ratio` says how many times better ours is: above 1 is better, whatever the unit.
"""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.files import write_whole


@dataclass(frozen=True)
class Row:
    """One line of the table: medians of ours and of the baseline."""

    name: str
    ours: float
    baseline: float
    baseline_name: str
    unit: str
    ratio: float


def interleave(
    ours: Callable[[], object], baseline: Callable[[], object], repeats: int, least: float = 0.0
) -> tuple[float, float]:
    """Median milliseconds of both, run in turns after one warm-up each; waits for the GPU where one is used.

    In a turn each runs once, and again until it has run for `least` seconds: what takes milliseconds is then measured
    as it is in use, call after call, and not as the other left the memory.
    """
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for run, kept in zip((ours, baseline), times, strict=True):
            times_of_turn: list[float] = []
            while not times_of_turn or (turn and sum(times_of_turn) < least):
                wait()
                began = time.perf_counter()
                run()
                wait()
                times_of_turn.append(time.perf_counter() - began)
            if turn:
                kept += [seconds * 1000 for seconds in times_of_turn]
    return statistics.median(times[0]), statistics.median(times[1])


def row(name: str, ours: float, baseline: float, baseline_name: str, unit: str = "ms") -> Row:
    """A row whose smaller value is the better one: milliseconds, mebibytes."""
    return Row(name, round(ours, 4), round(baseline, 4), baseline_name, unit, round(baseline / ours, 3))


def report(bench: str, rows: list[Row], json_file: Path | None) -> None:
    """Show the table, and write the JSON form where it is asked for."""
    _show(bench, rows)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(json_file, (json.dumps(_result(bench, rows), indent=2) + "\n").encode())


def describe_device() -> str:
    """The device that is measured, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _result(bench: str, rows: list[Row]) -> dict[str, object]:
    import torch

    from videomamba import __version__

    versions = {"videomamba": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    command = shlex.join(["videomamba", *sys.argv[1:]])
    device = describe_device()
    return {"bench": bench, "device": device, "versions": versions, "command": command, "rows": [*map(asdict, rows)]}


def _show(bench: str, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{bench} on {describe_device()}: medians, run in turns", title_justify="left")
    for heading in ("what", "ours", rows[0].baseline_name, "times better"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for line in rows:
        other = f" ({line.baseline_name})" if line.baseline_name != rows[0].baseline_name else ""
        table.add_row(
            line.name, f"{line.ours:.2f} {line.unit}", f"{line.baseline:.2f} {line.unit}{other}", f"{line.ratio:.2f}"
        )
    Console().print(table)
