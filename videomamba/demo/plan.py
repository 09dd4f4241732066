"""What a demo of so many minutes consists of: sizes and seconds, as pure functions; the steps are configs/demo/'s."""

import json
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError

FIXED_SECONDS = 80  # process starts, imports and checks, which do not shrink with --minutes
FULL_MINUTES = 10.0
FULL_WORLD = {"train": 6000, "val": 400, "test": 400, "images": 1500}
SMALLEST_WORLD = {"train": 600, "val": 60, "test": 100, "images": 200}
FULL_STEPS = {"teacher": 300, "stage1": 300, "stage2": 700, "stage2_unmasked": 400}
FEWEST_STEPS = 60  # above the warm-up of every demo config
BUDGETS = {
    "world": 60,
    "shards": 50,
    "teacher": 60,
    "stage1": 70,
    "stage2": 190,
    "stage2_unmasked": 100,
    "retrieval": 40,
    "export": 20,
}
"""Seconds that each step of the full demo may take on two quiet CPU cores."""


@dataclass(frozen=True)
class Plan:
    """How large a demo is, where it goes, and its seed."""

    out: Path
    minutes: float
    seed: int
    ranks: int
    world: dict[str, int]
    steps: dict[str, int]

    @property
    def name(self) -> dict[str, object]:
        """What makes two demos in one folder the same one."""
        return {"minutes": self.minutes, "seed": self.seed, "ranks": self.ranks}

    def budget(self, step: str) -> float:
        """Seconds that a step may take in a demo of these minutes."""
        return BUDGETS[step] * self.minutes / FULL_MINUTES


def make_plan(out: Path, minutes: float, seed: int = 0, ranks: int = 1) -> Plan:
    """The sizes for a budget: clips and steps shrink and grow with the time that the fixed costs leave.

    Raises UserError if the budget does not even hold the fixed costs.
    """
    share = (minutes * 60 - FIXED_SECONDS) / (FULL_MINUTES * 60 - FIXED_SECONDS)
    if share < 0.05:
        raise UserError(f"--minutes {minutes:g} leaves no time to train.", "Give 2 or more; 10 is the full demo.")
    world = {part: max(SMALLEST_WORLD[part], round(count * min(1.0, share))) for part, count in FULL_WORLD.items()}
    steps = {name: max(FEWEST_STEPS, round(count * share)) for name, count in FULL_STEPS.items()}
    return Plan(out, minutes, seed, ranks, world, steps)


def assignments(plan: Plan) -> list[str]:
    """The variables of demo/pipeline for these sizes."""
    clips = [f"{part}_clips={count}" for part, count in plan.world.items() if part != "images"]
    steps = [f"{name}_steps={count}" for name, count in plan.steps.items()]
    return [_path("folder", plan.out), *_shared(plan), *clips, f"images={plan.world['images']}", *steps]


def beside(plan: Plan, name: str, more: int = 0) -> list[str]:
    """The variables of demo/NAME, a pipeline that runs beside the demo, with `more` steps of stage 2."""
    steps = [f"stage2_steps={plan.steps['stage2'] + more}", f"stage2_unmasked_steps={plan.steps['stage2_unmasked']}"]
    return [_path("folder", plan.out / name), _path("demo", plan.out), *_shared(plan), *steps]


def _shared(plan: Plan) -> list[str]:
    return [f"seed={plan.seed}", f"ranks={plan.ranks}"]


def _path(name: str, path: Path) -> str:
    return f"{name}={json.dumps(str(path))}"  # quoted: a folder may be called 2026, which YAML reads as a number
