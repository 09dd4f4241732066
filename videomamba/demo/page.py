"""What the demo leaves to read: `summary.json` for programs, `report.html` for people."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.loader import load_config
from data_pipeline.card import read_card
from data_pipeline.world import DISCLAIMER, WORLD_VERSION
from retrieval_eval.report import write_report
from retrieval_eval.report_data import Departure, LossCurve, LostClip, QueryStrips, ReportData, SingleFrameModel, StepTime
from videomamba.demo.plan import Plan
from videomamba.demo.run import StepRecord, write_whole

RUNS = {
    "stage1": "Stage 1: alignment with the teacher",
    "stage2": "Stage 2: masked",
    "stage2_unmasked": "Stage 2: unmasked",
}
CONTROL = "demo/single_frame.json"  # trained once a world version by `videomamba demo --single-frame`

DEPARTURES = (
    Departure(what="Size", released="32 layers of width 576, 8 frames of 224 x 224", here="4 layers of width 128, 8 frames of 64 x 64", why="two CPU cores, ten minutes"),
    Departure(what="Patch embedding", released="one linear map of 16 x 16 pixels", here="4 x 4 squares, GELU, then a linear map (`stem: conv`)", why="the largest single gain at this scale"),
    Departure(what="Tubelet", released="1 frame a token", here="4 frames a token", why="motion is seen inside a token, and there are a quarter of the tokens"),
    Departure(what="Optimizer", released="AdamW", here="Muon on the matrices of the blocks, AdamW on the rest", why="fewer steps to the same loss"),
    Departure(what="Batches", released="clips drawn evenly", here="groups of four clips that share shape and colour", why="motion has to decide"),
    Departure(what="Teacher", released="CLIP ViT-B/16", here="a tiny CLIP trained on the demo's own frames and captions", why="nothing is downloaded"),
)  # fmt: skip


def finish(plan: Plan, records: list[StepRecord], console: Console) -> Path:
    """Write the summary and the page, print the table of results; returns the page's path."""
    result = json.loads((plan.out / "retrieval" / "result.json").read_text())
    summary = summarise(plan, records, result)
    write_whole(plan.out / "summary.json", json.dumps(summary, indent=2))
    console.print(_table(result))
    console.print(f"[italic]{DISCLAIMER}[/]")
    return write_report(report_data(plan, records, result), plan.out / "report.html")


def summarise(plan: Plan, records: list[StepRecord], result: dict[str, Any]) -> dict[str, Any]:
    """Seconds a step, peak memory, and every retrieval column with its controls."""
    extras = {path.parent.parent.name: json.loads(path.read_text()) for path in plan.out.glob("*/retrieval/result.json")}
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
        "extras": {name: extra["results"] for name, extra in extras.items()},
    }


def report_data(plan: Plan, records: list[StepRecord], result: dict[str, Any]) -> ReportData:
    """Everything on the page, gathered from what the steps left."""
    cards = {part: read_card(plan.out / "shards" / part) for part in plan.world}
    return ReportData(
        title="VideoMamba pretraining, the demo",
        result=result,
        world=f"{DISCLAIMER} World version {WORLD_VERSION}, seed {plan.seed}.",
        facts=_facts(plan, cards),
        steps=tuple(
            StepTime(name=record.title, seconds=record.seconds, budget_seconds=record.budget, peak_gb=record.peak_bytes / 1e9)
            for record in records
        ),
        peak_gb=max(record.peak_bytes for record in records) / 1e9,
        lost=tuple(_lost(cards["train"])),
        curves=tuple(curve for name, title in RUNS.items() if (curve := _curve(plan.out / name, title))),
        queries=_queries(result),
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


def _table(result: dict[str, Any]) -> Table:
    """The retrieval table of the terminal: a row a direction and control, a column a measure and scoring."""
    table = Table(title="Zero-shot retrieval on clips never trained on", title_justify="left")
    table.add_column("")
    measures = ("R@1", "R@5", "R@10", "MedR")
    for name in result["columns"].values():
        for measure in measures:
            table.add_column(f"{measure}\n({name})", justify="right")
    rows = [("text to video", result["results"], "t2v"), ("video to text", result["results"], "v2t")]
    rows += [(f"text to video, {name}", scored, "t2v") for name, scored in result["results"].get("controls", {}).items()]
    for title, scored, direction in rows:
        cells = [
            f"{scored[scoring][direction][measure]:.1f}" if direction in scored.get(scoring, {}) else "-"
            for scoring in result["columns"]
            for measure in measures
        ]
        table.add_row(title, *cells)
    return table
