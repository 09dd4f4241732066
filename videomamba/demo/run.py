"""Run the demo's steps, one process after the other, and leave `summary.json` and `report.html`.

OUT/steps/NAME.json marks a finished step with the command it ran, so that an interrupted demo goes on where it
was and a changed one begins again.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from configs.errors import UserError
from configs.files import write_whole
from videomamba.demo.plan import Plan, Step, make_steps
from videomamba.memory import TreeMemory


@dataclass
class StepRecord:
    """What a step took: wall-clock seconds, and the peak memory of its process tree in bytes."""

    name: str
    title: str
    budget: float
    seconds: float = 0.0
    peak_bytes: int = 0
    commands: list[str] = field(default_factory=list)


def run_demo(plan: Plan, extras: list[str], fresh: bool) -> None:
    """Run everything that is not finished, then write the summary and the page; extras come after the demo."""
    from videomamba.demo.page import finish

    console = Console(soft_wrap=True, highlight=False)
    claim(plan, fresh)
    steps = make_steps(plan)
    total = sum(step.budget for step in steps)
    console.print(f"The demo in {plan.out}: {len(steps)} steps, {total / 60:.1f} minutes on two quiet CPU cores.")
    began = time.monotonic()
    records = run_steps(plan, steps, console)
    page = finish(plan, records, console)
    console.print(f"\nAll of it took {(time.monotonic() - began) / 60:.1f} minutes. Look at {page}")
    if extras:
        from videomamba.demo.extras import run_extras

        run_extras(plan, records, extras, console)
        console.print(f"The page now holds them too: {finish(plan, records, console)}")


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
            write_json(marker, asdict(record))
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
        console.print(f"[dim]$ videomamba {' '.join(command)}[/]")
        unfinished = out / "steps" / f".{step.name}.unfinished"
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "videomamba", *command],
            env={**os.environ, "VIDEOMAMBA_UNFINISHED_FILE": str(unfinished)},
        )
        with TreeMemory(process.pid) as memory:
            code = _wait(process)
        record.peak_bytes = max(record.peak_bytes, memory.peak)
        if code != 0:
            raise UserError(
                f"The step '{step.name}' failed: `videomamba {' '.join(command[:2])} ...` ended with exit code {code}; "
                "its own message stands above.",
                f"Mend that and run the demo again with --out {out}: finished steps are skipped.",
                exit_code=1,
            )
        if unfinished.exists():
            unfinished.unlink()
            raise UserError(
                f"The step '{step.name}' was asked to stop before its end, and saved.",
                f"Run the demo again with --out {out}: it goes on from there.",
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
            process.wait()
        raise


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())
