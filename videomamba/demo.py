"""`videomamba demo`: from raw clips to exported encoders and a page to look at, each step a public command.

The steps run as processes of their own, one after the other, in the folder `--out`; what is finished is skipped,
so an interrupted demo goes on where it was. Nothing is downloaded. The clips are a rendered world: they test
the software, and their numbers compare with nothing but the same version of the same world.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from configs.errors import UserError
from configs.loader import digest
from videomamba.memory import TreeMemory

FIXED_SECONDS = 80  # process starts, imports and checks, which do not shrink with --minutes
FULL_MINUTES = 10.0
FULL_WORLD = {"train": 6000, "val": 400, "test": 400, "images": 1500}
SMALLEST_WORLD = {"train": 600, "val": 60, "test": 100, "images": 200}
FULL_STEPS = {"teacher": 400, "stage1": 450, "stage2": 2000, "stage2_unmasked": 500}


@dataclass(frozen=True)
class Plan:
    """How large a demo of so many minutes is; a pure function of its arguments."""

    out: Path
    minutes: float
    seed: int
    ranks: int
    world: dict[str, int]
    steps: dict[str, int]


@dataclass(frozen=True)
class Step:
    """One public command, what it is for, and its share of the time in seconds."""

    name: str
    title: str
    commands: tuple[tuple[str, ...], ...]
    budget: float


@dataclass
class StepRecord:
    """What a step took: wall-clock seconds and the peak memory of its process tree in bytes."""

    name: str
    title: str
    budget: float
    seconds: float = 0.0
    peak_bytes: int = 0
    commands: list[str] = field(default_factory=list)


def make_plan(out: Path, minutes: float, seed: int, ranks: int) -> Plan:
    """The sizes for a budget: clips and steps shrink with the time that is left after the fixed costs.

    Raises UserError if the budget does not even hold the fixed costs.
    """
    share = (minutes * 60 - FIXED_SECONDS) / (FULL_MINUTES * 60 - FIXED_SECONDS)
    if share < 0.05:
        raise UserError(f"--minutes {minutes:g} leaves no time to train.", "Give 2 or more; 10 is the full demo.")
    world = {part: max(SMALLEST_WORLD[part], round(count * min(1.0, share))) for part, count in FULL_WORLD.items()}
    steps = {name: max(10, round(count * share)) for name, count in FULL_STEPS.items()}
    return Plan(out, minutes, seed, ranks, world, steps)


def make_steps(plan: Plan) -> list[Step]:
    """The demo as public commands; every path lies under `plan.out`."""
    out, minutes = plan.out, plan.minutes / FULL_MINUTES
    shards = out / "shards"
    parts = ("train", "val", "test", "images")
    corpora = (f"data.train.0.path={shards / 'train'}", f"data.cache={out / 'cache'}", f"seed={plan.seed}")
    images = f"data.train.1.path={shards / 'images'}"
    ranks = ("--ranks", str(plan.ranks)) if plan.ranks > 1 else ()
    tokenizer = f"tokenizer={out / 'teacher' / 'tokenizer'}"
    teacher = f"teacher.source={out / 'teacher'}"
    stage2 = out / "stage2_unmasked"
    return [
        Step("world", "Render captioned clips with ffmpeg", (_world_command(plan),), 60 * minutes),
        Step(
            "shards",
            "Build WebDataset shards and verify them",
            tuple(
                command
                for part in parts
                for command in (
                    ("data", "build", str(out / "media" / part), str(shards / part), "--csv", "captions.csv"),
                    ("data", "verify", str(shards / part)),
                )
            ),
            40 * minutes,
        ),
        Step(
            "teacher",
            "Train a tiny CLIP with open_clip, the teacher",
            (
                (
                    "teacher",
                    "demo/teacher",
                    f"out={out / 'teacher'}",
                    f"steps={plan.steps['teacher']}",
                    *corpora,
                    images,
                ),
            ),
            50 * minutes,
        ),
        Step(
            "stage1",
            "Stage 1: masked video modelling, aligned with the teacher",
            (_pretrain(plan, "stage1", corpora, ranks, teacher),),
            70 * minutes,
        ),
        Step(
            "stage2",
            "Stage 2: joint vision-text pretraining, masked",
            (_pretrain(plan, "stage2", (*corpora, images), ranks, teacher, tokenizer, f"init={out / 'stage1'}"),),
            220 * minutes,
        ),
        Step(
            "stage2_unmasked",
            "Stage 2, second phase: unmasked, without the teacher",
            (_pretrain(plan, "stage2_unmasked", (*corpora, images), ranks, tokenizer, f"init={out / 'stage2'}"),),
            80 * minutes,
        ),
        Step(
            "retrieval",
            "Zero-shot retrieval on clips never trained on",
            (
                (
                    "eval",
                    "demo/retrieval",
                    f"checkpoint={stage2}",
                    f"corpus={shards / 'test'}",
                    f"out={out / 'retrieval'}",
                ),
            ),
            40 * minutes,
        ),
        Step(
            "export",
            "Export the video and the text encoder, load them in a fresh process",
            (("export", str(stage2), str(out / "encoders")),),
            20 * minutes,
        ),
    ]


def _world_command(plan: Plan) -> tuple[str, ...]:
    sizes = [f"--{part}={count}" for part, count in plan.world.items()]
    return ("data", "synthetic", "--out", str(plan.out / "media"), "--seed", str(plan.seed), *sizes)


def _pretrain(plan: Plan, name: str, corpora: tuple[str, ...], ranks: tuple[str, ...], *more: str) -> tuple[str, ...]:
    steps = f"steps={plan.steps[name]}"
    return ("pretrain", f"demo/{name}", f"out={plan.out / name}", steps, *corpora, *more, *ranks)


def run_steps(plan: Plan, steps: list[Step], console: Console) -> list[StepRecord]:
    """Run what is not finished, in order, showing each step's budget and what it took; returns all records.

    Raises UserError (exit code 1) when a command fails, naming it; the next run goes on from there.
    """
    records: list[StepRecord] = []
    for number, step in enumerate(steps, start=1):
        marker = plan.out / "steps" / f"{step.name}.json"
        console.rule(f"[bold]{number}/{len(steps)} {step.title}[/] (budget {step.budget:.0f} s)", align="left")
        record = _finished(marker, step)
        if record is None:
            record = _run_step(step, plan.out, console)
            _write_whole(marker, json.dumps(asdict(record), indent=2))
        else:
            console.print(f"finished before, in {record.seconds:.0f} s; skipped")
        records.append(record)
    return records


def _finished(marker: Path, step: Step) -> StepRecord | None:
    if not marker.is_file():
        return None
    record = StepRecord(**json.loads(marker.read_text()))
    return record if record.commands == [" ".join(command) for command in step.commands] else None


def _run_step(step: Step, out: Path, console: Console) -> StepRecord:
    record = StepRecord(step.name, step.title, step.budget)
    began = time.monotonic()
    for command in step.commands:
        record.commands.append(" ".join(command))
        console.print(f"[dim]$ videomamba {' '.join(command)}[/]", soft_wrap=True, highlight=False)
        process = subprocess.Popen([sys.executable, "-P", "-m", "videomamba", *command])
        with TreeMemory(process.pid) as memory:
            code = _wait(process)
        record.peak_bytes = max(record.peak_bytes, memory.peak)
        if code != 0:
            raise UserError(
                f"The step '{step.name}' failed: `videomamba {command[0]} ...` ended with exit code {code}; "
                "its own message stands above.",
                f"Mend that and run the demo again with --out {out}: finished steps are skipped.",
                exit_code=1,
            )
    record.seconds = time.monotonic() - began
    console.print(f"took {record.seconds:.0f} s of {step.budget:.0f}, peak memory {record.peak_bytes / 2**30:.1f} GiB")
    return record


def _wait(process: "subprocess.Popen[bytes]") -> int:
    """The exit code; on Ctrl-C the child, which got the signal too, is given time to end cleanly first."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(timeout=60)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
        raise


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
