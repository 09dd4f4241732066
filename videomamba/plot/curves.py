"""From the log.jsonl of one or several runs to panels: one quantity each, one curve a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from configs.errors import UserError
from configs.loader import read_tree
from pretrain.metrics_log import flatten, read_log

Unit = Literal["steps", "samples"]

TITLES = {
    "loss": "Loss, all terms",
    "grad_norm": "Gradient norm",
    "clips_per_s": "Clips a second",
    "step_s": "Seconds a step",
    "data_wait": "Share of time waiting for data",
    "mfu": "Model FLOPs utilisation",
    "memory_mb": "Peak memory (MiB)",
}
GROUPS = {"losses": "Loss: ", "lr": "Learning rate: ", "metrics": ""}
"""What panels are called, by the name in the log or its part before the slash. Others go by their name."""

NOISY = ("loss", "grad_norm", "clips_per_s", "step_s", "data_wait", "mfu")
"""What differs from step to step by chance, and is smoothed; anything else is drawn as it was logged."""

FIRST = ("loss", "losses/", "metrics/", "eval", "lr", "grad_norm", "clips_per_s", "data_wait", "mfu")
"""The order of panels: by the first of these that a name begins with, all others last and in the log's order."""

LEFT_OUT = ("time", "eta_s", "start", "clips_per_s_device", "samples", "seconds")
LR_GROUPS = 4  # more groups than these are drawn as the highest and the lowest rate


@dataclass(frozen=True)
class Curve:
    """One run's course of one quantity: `xs` and as many `ys`; `restarts` are the x at which the run went on."""

    run: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    restarts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One quantity of all runs that logged it."""

    name: str
    curves: tuple[Curve, ...]

    @property
    def title(self) -> str:
        """What stands over it."""
        group, slash, rest = self.name.partition("/")
        if slash and group in GROUPS:
            return (GROUPS[group] + rest.replace("_", " ")).capitalize()
        return TITLES.get(self.name, self.name.replace("/", ": ", 1).replace("_", " ").capitalize())

    def weight(self, smooth: float) -> float:
        """How much of `smooth` this quantity gets: all or nothing."""
        return smooth if self.name.startswith(NOISY) else 0.0


def read_panels(runs: Sequence[Path], unit: Unit = "steps") -> list[Panel]:
    """The panels of some run folders, in a reader's order. UserError for a folder in which nothing was logged."""
    names = _names(runs)
    found: dict[str, list[Curve]] = {}
    for folder, run in zip(runs, names, strict=True):
        for name, curve in _curves(folder, run, unit).items():
            found.setdefault(name, []).append(curve)
    place = {name: number for number, name in enumerate(found)}
    return [Panel(name, tuple(found[name])) for name in sorted(found, key=lambda name: (_rank(name), place[name]))]


def run_numbers(panels: Sequence[Panel]) -> dict[str, int]:
    """The runs' places, which give a run one colour in every panel, also where another logged less."""
    runs = dict.fromkeys(curve.run for panel in panels for curve in panel.curves)
    return {run: number for number, run in enumerate(runs)}


def smoothed(ys: Sequence[float], weight: float) -> list[float]:
    """The exponential moving average that gives the past `weight` (0 to below 1), free of the start's pull to zero.

    A value that is not finite is passed over and stays as it is: the gap remains to be seen.
    """
    out, mean, mass = [], 0.0, 0.0
    for y in ys:
        if math.isfinite(y):
            mean, mass = weight * mean + (1 - weight) * y, weight * mass + 1 - weight
            out.append(mean / mass)
        else:
            out.append(y)
    return out


def _rank(name: str) -> int:
    return next((number for number, start in enumerate(FIRST) if name.startswith(start)), len(FIRST))


def _names(runs: Sequence[Path]) -> list[str]:
    """What runs are called beside one another: the shortest ends of their paths that differ."""
    paths = [run.resolve() for run in runs]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError("The same run was given twice.", "Name each run folder once.")


def _curves(folder: Path, run: str, unit: Unit) -> dict[str, Curve]:
    """Every quantity that the run logged."""
    records = read_log(folder)
    if not records:
        raise UserError(
            f"{folder} has no log.jsonl with a line in it.", "Give the folder of a run that has trained (its out=)."
        )
    scale = _batch(folder) if unit == "samples" else 1
    starts = [record.get("start") for record in records]
    restarts = tuple(float(now * scale) for before, now in pairwise(starts) if now is not None and now != before)
    points: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for name, value in _quantities(record).items():
            xs, ys = points.setdefault(name, ([], []))
            xs.append(record["step"] * scale)
            ys.append(value)
    return {name: Curve(run, tuple(xs), tuple(ys), restarts) for name, (xs, ys) in points.items()}


def _quantities(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by name; many learning rates become the highest and the lowest."""
    kept = {name: value for name, value in flatten(record).items() if name not in LEFT_OUT}
    rates = [name for name in kept if name.startswith("lr/")]
    if len(rates) > LR_GROUPS:
        values = [kept.pop(name) for name in rates]
        kept |= {"lr/highest": max(values), "lr/lowest": min(values)}
    return kept


def _batch(folder: Path) -> int:
    """Samples a step, from the run's own config."""
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder} has no config.yaml that says its batch.", "Leave --x samples out.")
    return int(read_tree(config)["data"]["batch"])
