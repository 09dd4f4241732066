"""`videomamba run`: a pipeline on this machine, from its file to the table at the end."""

import shlex
import signal
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.errors import UserError
from slurm.pipeline.chain import Chain, Task, resolve
from slurm.pipeline.commands import check_alone, check_commands, takes
from slurm.pipeline.config import Pipeline
from slurm.pipeline.folder import PipelineFolder, Record, finished, took
from slurm.pipeline.jobs import refuse_queued
from slurm.pipeline.plan import Plan, Selection, make_plan
from slurm.pipeline.runner import Outcome, Runner, tail


def run_pipeline(pipeline: Pipeline, tree: Any, selection: Selection, console: Console, jobs: int = 1) -> None:
    """Run what is not done yet; `tree` is the command tree that the steps' command lines are checked with.

    Raises UserError for a fault found beforehand (exit code 2), for a step that failed (its own exit code) or was left
    unfinished, and KeyboardInterrupt or UserError (143) after Ctrl-C or TERM.
    """
    chain = resolve(pipeline)
    check_commands(chain, tree, _ranks_here)
    folder = PipelineFolder(chain.folder)
    make_plan(chain, folder, selection)  # refuses before a folder is made
    with folder:
        refuse_queued(chain, folder)
        plan = make_plan(chain, folder, selection)
        folder.keep(pipeline)
        for name in plan.skipped:
            console.print(f"{name}: finished before, in {took(chain.tasks[name], folder)[0]:.0f} s; skipped")
        outcome = Runner(chain, folder, console, jobs).run(plan)
        console.print(table(chain, folder, plan))
    _leave(outcome, folder, console)


def show_plan(pipeline: Pipeline, tree: Any, selection: Selection, console: Console) -> None:
    """Print what `run_pipeline` would do: every command line, and what is done already."""
    chain = resolve(pipeline)
    check_commands(chain, tree, _ranks_here)
    folder = PipelineFolder(chain.folder)
    plan = make_plan(chain, folder, selection)
    for name, task in chain.tasks.items():
        if name in plan.parts:
            first = plan.parts[name][0]
            more = f" (part {first.index}; {len(plan.parts[name])} of {len(task.parts)} to do)" if task.array else ""
            needs = f" after {', '.join(task.needs)}" if task.needs else ""
            console.print(f"{name}{needs}{more}", style="bold", highlight=False)
            for command in first.commands:
                console.print(f"  videomamba {shlex.join(command)}", highlight=False, markup=False)
        else:
            console.print(f"{name}: {'done' if name in plan.skipped else 'not asked for'}", highlight=False)


def check_pipeline(pipeline: Pipeline, tree: Any, selection: Selection, console: Console) -> None:
    """Check every step as far as it goes now: its command line and config, and by `--check` where its inputs exist."""
    chain = resolve(pipeline)
    check_commands(chain, tree, _ranks_here)
    folder = PipelineFolder(chain.folder)
    plan, done = make_plan(chain, folder, selection), finished(chain, folder)
    shown = Table("step", "checked", "says")
    for name, parts in plan.parts.items():
        task = chain.tasks[name]
        if not done.issuperset(task.needs):
            waits = ", ".join(need for need in task.needs if need not in done)
            shown.add_row(name, "command and config", f"its inputs come from {waits}")
        elif any(takes(tree, command, "check") for command in parts[0].commands):
            said = "\n".join(check_alone(task, parts[0], tree, task.ranks))
            shown.add_row(name, "by --check", escape(said))
        else:
            shown.add_row(name, "command and config", "")
    for name in plan.skipped:
        shown.add_row(name, "", "done")
    console.print(shown)


def _ranks_here(task: Task) -> tuple[int, ...]:
    return (task.ranks,)


def table(chain: Chain, folder: PipelineFolder, plan: Plan) -> Table:
    """Step, state and seconds, those that were skipped and those that were not reached included."""
    shown = Table("step", "state", "seconds", "peak memory")
    for name, task in chain.tasks.items():
        records = [folder.read(part) for part in task.parts]
        ran = [record for record in records if record is not None]
        seconds, peak = took(task, folder)
        if name in plan.skipped:
            state = "done before"
        elif name not in plan.parts:
            state = "not asked for"
        else:
            state = _state(ran, len(task.parts))
        shown.add_row(name, state, f"{seconds:.1f}" if ran else "", f"{peak / 2**30:.2f} GiB" if peak else "")
    return shown


def _state(records: list[Record], parts: int) -> str:
    states = [record.state for record in records]
    for bad in ("failed", "unfinished", "stopped"):
        if bad in states:
            return bad
    if len(states) == parts and set(states) == {"done"}:
        return "done"
    return f"{states.count('done')} of {parts} parts done" if states else "not started"


def _leave(outcome: Outcome, folder: PipelineFolder, console: Console) -> None:
    """Say what went wrong, if something did, by raising it."""
    again = "Finished steps are skipped when the same command is given again."
    if outcome.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if outcome.signal is not None:
        name = signal.Signals(outcome.signal).name
        raise UserError(f"Stopped by {name}.", again, exit_code=128 + outcome.signal)
    if outcome.failed is None:
        return
    part, record = outcome.failed
    if record.state == "unfinished":
        raise UserError(f"The step '{part.name}' was asked to stop and left before its work was done.", again, 1)
    console.print(f"The last lines of {folder.log(part)}:", highlight=False)
    console.print(tail(folder.log(part)), highlight=False, markup=False)
    code = record.exit_code or 1
    by = f" (ended by {signal.Signals(code - 128).name})" if code - 128 in set(signal.Signals) else ""
    raise UserError(
        f"The step '{part.name}' failed with exit code {code}{by}.",
        f"Its log is {folder.log(part)}. Mend that; {again[0].lower()}{again[1:]}",
        exit_code=code,
    )
