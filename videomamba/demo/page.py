"""What the demo leaves to read: `summary.json` for programs, `report.html` for people."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.files import write_json
from configs.loader import PACKAGED
from data_pipeline.card import read_card
from data_pipeline.shards import Corpus
from data_pipeline.world import DISCLAIMER, WORLD_VERSION
from retrieval_eval.report.data import (
    Departure,
    LossCurve,
    LostClip,
    ReportData,
    SingleFrameModel,
    StepTime,
)
from retrieval_eval.report.evaluation import evaluation_parts
from retrieval_eval.report.page import write_report
from videomamba.demo.plan import Plan
from videomamba.demo.run import Took

RUNS = {
    "stage1": "Stage 1: alignment with the teacher",
    "stage2": "Stage 2: masked",
    "stage2_unmasked": "Stage 2: unmasked",
}
RECORDED = PACKAGED / "demo" / "single_frame.json"  # once a world version, by `videomamba demo --single-frame`

DEPARTURES = (
    Departure(
        what="Size",
        released="32 layers of width 576, 8 frames of 224 x 224",
        here="4 layers of width 128, 8 frames of 64 x 64",
        why="two CPU cores, ten minutes",
    ),
    Departure(
        what="Patch embedding",
        released="one linear map of 16 x 16 pixels",
        here="4 x 4 squares, GELU, then a linear map (stem: conv)",
        why="the largest single gain at this scale",
    ),
    Departure(
        what="Tubelet",
        released="1 frame a token",
        here="4 frames a token",
        why="motion is seen inside a token, and there are a quarter of the tokens",
    ),
    Departure(
        what="Optimizer",
        released="AdamW",
        here="Muon on the matrices of the blocks, AdamW on the rest",
        why="fewer steps to the same loss",
    ),
    Departure(
        what="Batches",
        released="clips drawn evenly",
        here="groups of four clips that share shape and colour, and differ in size or motion",
        why="motion has to decide",
    ),
    Departure(
        what="Matching",
        released="one negative by the softmax of the scores",
        here="by a quarter of the scores (hardness: 0.25)",
        why="in such groups the hardest alone teach nothing of shape and colour, and re-ranking falls behind",
    ),
    Departure(
        what="Masked words",
        released="every caption, half of its words",
        here="one caption in four, three words in ten",
        why="words for all captions took a third of a step's time",
    ),
    Departure(
        what="Teacher",
        released="CLIP ViT-B/16, every frame",
        here="a tiny CLIP trained on the demo's own frames, one frame a tubelet",
        why="nothing is downloaded",
    ),
)


def finish(plan: Plan, records: list[Took], console: Console) -> Path:
    """Write the summary and the page, say that it is a rendered world; returns the page's path."""
    result = json.loads((plan.out / "retrieval" / "result.json").read_text())
    summary = summarise(plan, records, result)
    write_json(plan.out / "summary.json", summary)
    console.print(f"[italic]{DISCLAIMER}[/]")
    return write_report(report_data(plan, records, result), plan.out / "report.html")


def summarise(plan: Plan, records: list[Took], result: dict[str, Any]) -> dict[str, Any]:
    """Seconds a step, peak memory, and every retrieval column with its controls."""
    extras = sorted(plan.out.glob("*/retrieval/result.json"))
    return {
        "world": {"version": WORLD_VERSION, "seed": plan.seed, "clips": plan.world, "note": DISCLAIMER},
        "minutes": plan.minutes,
        "ranks": plan.ranks,
        "training_steps": plan.steps,
        "seconds": {record.name: round(record.seconds, 1) for record in records},
        "total_seconds": round(sum(record.seconds for record in records), 1),
        "peak_memory_bytes": max(record.peak_bytes for record in records),
        "retrieval": result["results"],
        "columns": result["columns"],
        "chance": result["chance"],
        "extras": {found.parent.parent.name: json.loads(found.read_text())["results"] for found in extras},
    }


def report_data(plan: Plan, records: list[Took], result: dict[str, Any]) -> ReportData:
    """Everything on the page, gathered from what the steps left."""
    cards = {part: read_card(plan.out / "shards" / part) for part in plan.world}
    return ReportData(
        title="VideoMamba pretraining, the demo",
        result=result,
        world=f"{DISCLAIMER} World version {WORLD_VERSION}, seed {plan.seed}.",
        facts=_facts(plan, cards),
        steps=tuple(
            StepTime(
                name=record.title,
                seconds=record.seconds,
                budget_seconds=plan.budget(record.name),
                peak_gb=record.peak_bytes / 1e9,
            )
            for record in records
        ),
        peak_gb=max(record.peak_bytes for record in records) / 1e9,
        lost=tuple(_lost(cards["train"])),
        curves=tuple(curve for name, title in RUNS.items() if (curve := _curve(plan.out / name, title))),
        **evaluation_parts(plan.out / "retrieval", Corpus.open(plan.out / "shards" / "test"), result),
        single_frame=_single_frame(plan),
        departures=DEPARTURES,
        export_checks=_export_checks(plan),
    )


def _facts(plan: Plan, cards: dict[str, dict[str, Any]]) -> dict[str, str]:
    facts = {
        f"Shards: {part}": f"{card['samples']:,} samples, {card['captions']:,} captions, {card['bytes'] / 1e6:.1f} MB"
        for part, card in cards.items()
    }
    facts |= {f"Training steps: {name}": f"{count:,}" for name, count in plan.steps.items()}
    return facts


def _lost(card: dict[str, Any]) -> list[LostClip]:
    return [
        LostClip(name=clip["file"], reason=reason, detail=clip["detail"])
        for reason, group in card["lost"].items()
        for clip in group["files"]
    ]


def _curve(run: Path, title: str) -> LossCurve | None:
    """The losses of a run's log.jsonl, None where it has no line."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    if not lines:
        return None
    names = sorted({name for line in lines for name in line["losses"]})
    series = {name: tuple(line["losses"].get(name) for line in lines) for name in names}
    return LossCurve(title=title, steps=tuple(line["step"] for line in lines), series=series, note="weighted losses")


def _single_frame(plan: Plan) -> SingleFrameModel | None:
    """The control that only ever saw one frame: trained beside this demo, else the one recorded for this world."""
    own = plan.out / "single_frame" / "retrieval" / "result.json"
    if own.is_file():
        return SingleFrameModel(results=json.loads(own.read_text())["results"], origin="trained beside this demo")
    if RECORDED.is_file():
        record = json.loads(RECORDED.read_text())
        if record["world"] == WORLD_VERSION:
            return SingleFrameModel(results=record["results"], origin=record["origin"])
    return None


def _export_checks(plan: Plan) -> dict[str, str]:
    """What the export found when a fresh process loaded both encoders again."""
    summary = json.loads((plan.out / "encoders" / "export.json").read_text())
    return {
        f"Exported {name} encoder, loaded again": f"{summary[f'{name}_parameters']:,} parameters, "
        f"largest difference of an embedding {summary[f'{name}_difference']:.1e}"
        for name in ("video", "text")
    }
