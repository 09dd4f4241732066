"""Two measurements beside the demo, outside its time: what stage 1 adds, and what one frame alone can do.

`--ablate` gives the time of stage 1 to stage 2 instead, which then starts from nothing, with the same teacher:
equal time, with and without stage 1. `--single-frame` trains stage 2 on clips in which one frame is repeated, so
that no motion is ever seen. Both are evaluated as the demo is, on the same test clips. The second is recorded
once a world version in configs/demo/single_frame.json, which every report shows: OUT/single_frame/record.json.
"""

import json
from datetime import UTC, datetime

from rich.console import Console

from data_pipeline.world import WORLD_VERSION
from videomamba.demo.plan import Plan, Step, pretrain, retrieval
from videomamba.demo.run import StepRecord, run_steps, write_json

ONE_FRAME = ("data.frames.rule=single",)
FROM_NOTHING = ("init=null",)


def run_extras(plan: Plan, records: list[StepRecord], names: list[str], console: Console) -> None:
    """Train and evaluate the named extras in OUT/NAME; finished ones are skipped."""
    for name in names:
        steps = ablate(plan, records) if name == "ablate" else single_frame(plan)
        run_steps(plan, steps, console)
        if name == "single_frame":
            write_json(plan.out / name / "record.json", record(plan))


def ablate(plan: Plan, records: list[StepRecord]) -> list[Step]:
    """Stage 2 without stage 1 before it, longer by as many steps as fit into the seconds of stage 1."""
    seconds = {record.name: record.seconds for record in records}
    more = round(plan.steps["stage2"] * seconds["stage1"] / seconds["stage2"])
    masked = pretrain(plan, "stage2", under="ablate", steps=plan.steps["stage2"] + more, more=FROM_NOTHING)
    return _steps(plan, "ablate", "Without stage 1, equal time", masked, ())


def single_frame(plan: Plan) -> list[Step]:
    """Stage 2 on one frame repeated, for the same steps, from nothing: stage 1 has seen motion."""
    masked = pretrain(plan, "stage2", under="single_frame", more=(*FROM_NOTHING, *ONE_FRAME))
    return _steps(plan, "single_frame", "A model that only ever sees one frame", masked, ONE_FRAME)


def record(plan: Plan) -> dict[str, object]:
    """The single-frame control as it is kept: its results, the world they belong to, and how they were made."""
    results = json.loads((plan.out / "single_frame" / "retrieval" / "result.json").read_text())["results"]
    made = (
        f"videomamba demo --single-frame --minutes {plan.minutes:g} --seed {plan.seed}, {datetime.now(UTC):%Y-%m-%d}, "
        f"{plan.world['test']} test clips"
    )
    return {"world": WORLD_VERSION, "origin": made, "results": {name: results[name] for name in ("dual", "reranked")}}


def _steps(plan: Plan, name: str, title: str, masked: tuple[str, ...], unmasked_more: tuple[str, ...]) -> list[Step]:
    unmasked = pretrain(plan, "stage2_unmasked", under=name, more=unmasked_more)
    share = plan.minutes / 10
    return [
        Step(f"{name}_stage2", f"{title}: stage 2, masked", (masked,), 250 * share),
        Step(f"{name}_stage2_unmasked", f"{title}: stage 2, unmasked", (unmasked,), 100 * share),
        Step(f"{name}_retrieval", f"{title}: retrieval", (retrieval(plan, under=name),), 40 * share),
    ]
