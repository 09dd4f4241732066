"""Which parts of a chain are to run now: what is done is left out, what needs something that runs again runs too."""

import os
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError
from slurm.pipeline.chain import Chain, Part, Task
from slurm.pipeline.config import nearest
from slurm.pipeline.folder import PipelineFolder, finished


@dataclass(frozen=True)
class Selection:
    """The steps that were asked for: those from `start` on, those up to `until`, or `only` one."""

    start: str | None = None
    until: str | None = None
    only: str | None = None

    def steps(self, chain: Chain) -> set[str]:
        """The names of the selected steps. Raises ConfigError, naming the nearest step."""
        for name in (self.start, self.until, self.only):
            if name is not None and name not in chain.tasks:
                raise ConfigError(f"The pipeline has no step '{name}'.", nearest(name, list(chain.tasks)))
        if self.only is not None:
            return {self.only}
        chosen = set(chain.tasks)
        if self.start is not None:
            chosen &= {self.start} | {name for name in chain.tasks if self.start in chain.needs(name)}
        if self.until is not None:
            chosen &= {self.until, *chain.needs(self.until)}
        return chosen


@dataclass(frozen=True)
class Plan:
    """What is to run: `parts` of every step in the chain's order, and the `skipped` steps, which are done."""

    parts: dict[str, tuple[Part, ...]]
    skipped: tuple[str, ...]


def make_plan(chain: Chain, folder: PipelineFolder, selection: Selection) -> Plan:
    """What a run or a submission has to do now.

    Raises ConfigError where nothing is selected, or where a step would miss what it reads.
    """
    selected, done = selection.steps(chain), finished(chain, folder)
    if not selected:
        raise ConfigError(f"No step lies from '{selection.start}' to '{selection.until}'.", "Give other steps.")
    parts: dict[str, tuple[Part, ...]] = {}
    for name, task in chain.tasks.items():
        if name not in selected:
            continue
        anew = any(need in parts for need in task.needs)
        if anew or name not in done:
            parts[name] = task.parts if anew else tuple(part for part in task.parts if not folder.is_done(part))
            _refuse_missing(chain, task, parts, done)
    return Plan(parts, tuple(name for name in chain.tasks if name in selected and name not in parts))


def _refuse_missing(chain: Chain, task: Task, running: dict[str, tuple[Part, ...]], done: set[str]) -> None:
    for need in task.needs:
        if need not in running and need not in done and not chain.tasks[need].out.exists():
            raise ConfigError(
                f"The step '{task.name}' needs '{need}', which has not run: there is no {chain.tasks[need].out}.",
                f"Run it first: --until {need}.",
            )
    coming = [chain.tasks[name].out for name in running if name != task.name]
    for path in task.inputs:
        if not path.exists() and not any(_inside(path, folder) for folder in coming):
            raise ConfigError(
                f"The step '{task.name}' reads {path}, which is not there.", "Mend the path, or put the file there."
            )


def _inside(path: Path, folder: Path) -> bool:
    inner, outer = (Path(os.path.abspath(place)) for place in (path, folder))  # noqa: PTH100 - links stay as they are
    return inner.is_relative_to(outer)
