"""Where a run's lines go: one protocol, a file for each place."""

from typing import Any, Protocol

Line = dict[str, Any]
"""A line of the log as metrics_log.py describes it: of steps, or of an evaluation."""


class Sink(Protocol):
    """A place for lines. Only rank 0 has any."""

    def advance(self, step: int) -> None:
        """A step was taken; cheap."""
        ...

    def write(self, line: Line) -> None:
        """Keep or show a line."""
        ...

    def close(self) -> None:
        """The run ends here, or fails."""
        ...


def flatten(line: Line) -> dict[str, float]:
    """The numbers of a line under one name each: `losses/alignment`, `lr/muon`, `evaluation/t2v_R@1`, `grad_norm`."""
    flat: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{inner}": number for inner, number in value.items()}
        elif isinstance(value, (int, float)) and name != "step":
            flat[name] = value
    return flat
