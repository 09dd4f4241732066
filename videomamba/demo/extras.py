"""Two measurements beside the demo, outside its time: what stage 1 adds, and what one frame alone can do.

`--ablate` gives the time of stage 1 to stage 2 instead, which then starts from nothing, with the same teacher:
equal time, with and without stage 1. `--single-frame` trains stage 2 on clips in which one frame is repeated, so
that no motion is ever seen. Both are pipelines in configs/demo/, evaluated as the demo is, on the same test clips. The
second is recorded once a world version in configs/demo/single_frame.json, which every report shows:
OUT/single_frame/record.json.
"""

import json
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from configs.files import write_json
from data_pipeline.world import WORLD_VERSION
from slurm.pipeline.config import load_pipeline
from slurm.pipeline.plan import Selection
from slurm.pipeline.run import run_pipeline
from videomamba.demo.plan import Plan, beside
from videomamba.demo.run import Took


def run_extras(plan: Plan, times: list[Took], names: list[str], console: Console, tree: Any) -> None:
    """Train and evaluate the named extras in OUT/NAME; finished ones are skipped."""
    for name in names:
        more = steps_of_stage1(plan, times) if name == "ablate" else 0
        pipeline = load_pipeline(f"demo/{name}", beside(plan, name, more))
        console.print(f"\n{pipeline.title}:")
        run_pipeline(pipeline, tree, Selection(), console)
        if name == "single_frame":
            write_json(plan.out / name / "record.json", record(plan))


def steps_of_stage1(plan: Plan, times: list[Took]) -> int:
    """How many steps of stage 2 fit into the seconds of stage 1."""
    seconds = {step.name: step.seconds for step in times}
    return round(plan.steps["stage2"] * seconds["stage1"] / seconds["stage2"])


def record(plan: Plan) -> dict[str, object]:
    """The single-frame control as it is kept: its results, the world they belong to, and how they were made."""
    results = json.loads((plan.out / "single_frame" / "retrieval" / "result.json").read_text())["results"]
    made = (
        f"videomamba demo --single-frame --minutes {plan.minutes:g} --seed {plan.seed}, {datetime.now(UTC):%Y-%m-%d}, "
        f"{plan.world['test']} test clips"
    )
    return {"world": WORLD_VERSION, "origin": made, "results": {name: results[name] for name in ("dual", "reranked")}}
