"""Run the demo's pipeline, then leave `summary.json` and `report.html`; run again, it skips what is done."""

import json
import shutil
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from configs.errors import UserError
from configs.files import write_json
from slurm.pipeline.chain import resolve
from slurm.pipeline.config import Pipeline, load_pipeline
from slurm.pipeline.folder import PipelineFolder, took
from slurm.pipeline.plan import Selection
from slurm.pipeline.run import run_pipeline
from videomamba.demo.plan import Plan, assignments

PIPELINE = "demo/pipeline"


@dataclass(frozen=True)
class Took:
    """What a step took: wall-clock seconds, and the peak memory of its processes in bytes."""

    name: str
    title: str
    seconds: float
    peak_bytes: int


def run_demo(plan: Plan, extras: list[str], fresh: bool, tree: Any) -> None:
    """Run everything that is not finished, then write the summary and the page; extras come after the demo."""
    from videomamba.demo.page import finish

    console = Console(soft_wrap=True, highlight=False)
    pipeline = load_pipeline(PIPELINE, assignments(plan))
    claim(plan, fresh)
    total = sum(plan.budget(name) for name in pipeline.steps)
    console.print(
        f"The demo in {plan.out}: {len(pipeline.steps)} steps, {total / 60:.1f} minutes on two quiet CPU cores."
    )
    began = time.monotonic()
    run_pipeline(pipeline, tree, Selection(), console)
    times = step_times(pipeline)
    page = finish(plan, times, console)
    console.print(f"\nAll of it took {(time.monotonic() - began) / 60:.1f} minutes. Look at {page}")
    if extras:
        from videomamba.demo.extras import run_extras

        run_extras(plan, times, extras, console, tree)
        console.print(f"The page now holds them too: {finish(plan, times, console)}")


def claim(plan: Plan, fresh: bool) -> None:
    """Make the folder this demo's own. Raises UserError if it holds another demo, or something else."""
    marker = plan.out / "demo.json"
    if fresh and marker.is_file():
        shutil.rmtree(plan.out)
    if marker.is_file():
        found = json.loads(marker.read_text())
        if found != plan.name:
            said = ", ".join(f"{key} {value}" for key, value in found.items())
            raise UserError(f"{plan.out} holds a demo of other settings ({said}).", "Give another --out, or --fresh.")
        return
    if plan.out.exists() and (not plan.out.is_dir() or any(plan.out.iterdir())):
        raise UserError(f"{plan.out} is not empty and holds no demo.", "Give another --out, or empty it yourself.")
    write_json(marker, plan.name)


def step_times(pipeline: Pipeline) -> list[Took]:
    """What every step of a pipeline took."""
    chain = resolve(pipeline)
    folder = PipelineFolder(chain.folder)
    return [Took(task.name, task.title, *took(task, folder)) for task in chain.tasks.values()]
