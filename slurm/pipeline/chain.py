"""A pipeline with everything filled in: what is to run, in which order; faults are said before anything does.

Found here: a step that is not there, a circle, two steps that write one folder, a step that reads a folder of another
without needing it, an array whose parts would all do the same, a variable that was not given. What the command lines
themselves get wrong, commands.py finds.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from os.path import normpath
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.loader import validate
from slurm.job import Resources
from slurm.pipeline.config import Pipeline, Step, nearest
from slurm.pipeline.names import Names, as_text

OWN = ("logs", "steps", "jobs", "code")
"""Folders that the pipeline keeps for itself in its folder."""


@dataclass(frozen=True)
class Part:
    """One of the pieces that a step consists of, mostly the only one: its command lines, and what proves its end."""

    step: str
    index: int
    count: int
    commands: tuple[tuple[str, ...], ...]
    done: Path | None

    @property
    def name(self) -> str:
        """`build` or, as a part of an array, `build-3-of-16`."""
        return self.step if self.count == 1 else f"{self.step}-{self.index}-of-{self.count}"


@dataclass(frozen=True)
class Task:
    """A step, filled in. `needs` are the enabled steps before it."""

    name: str
    title: str
    needs: tuple[str, ...]
    continues: str | None
    out: Path
    inputs: tuple[Path, ...]
    ranks: int
    at_once: int | None
    resources: Resources
    parts: tuple[Part, ...]

    @property
    def array(self) -> bool:
        """Whether it has several parts, which share nothing."""
        return len(self.parts) > 1


@dataclass(frozen=True)
class Chain:
    """The enabled steps of a pipeline, each after what it needs."""

    folder: Path
    title: str
    tasks: dict[str, Task]

    def needs(self, name: str) -> Iterator[str]:
        """Every step that `name` needs, those that they need included."""
        for need in self.tasks[name].needs:
            yield need
            yield from self.needs(need)


def resolve(pipeline: Pipeline) -> Chain:
    """The chain of a pipeline. Raises ConfigError for the first fault."""
    names = Names(pipeline)
    folder = Path(names.fill("{folder}", "folder", {}))
    wanted = {name: _enabled(names, name, step) for name, step in pipeline.steps.items()}
    needs = {name: _needs(pipeline, name) for name in pipeline.steps}
    order = _ordered(needs)
    tasks: dict[str, Task] = {}
    reads: dict[str, set[str]] = {}
    for name in (name for name in order if wanted[name]):
        reads[name] = set()
        before = tuple(dict.fromkeys(_enabled_needs(name, needs, wanted)))
        tasks[name] = _task(names, name, pipeline.steps[name], before, reads[name])
    if names.missing:
        given = " ".join(f"{name}=VALUE" for name in names.missing)
        raise ConfigError(f"The pipeline has to be given {', '.join(names.missing)}.", f"Add {given}.")
    chain = Chain(folder, pipeline.title, tasks)
    for name, read in reads.items():
        _refuse_unneeded(chain, pipeline, name, read)
    _refuse_shared_folders(chain)
    return chain


def _enabled(names: Names, name: str, step: Step) -> bool:
    value = names.fill_value(step.enabled, f"steps.{name}.enabled", {})
    if not isinstance(value, bool):
        raise ConfigError(f"steps.{name}.enabled is {as_text(value)}.", "Give true or false.")
    return value


def _needs(pipeline: Pipeline, name: str) -> tuple[str, ...]:
    """What a step needs as the file says it, the step above included where it says nothing."""
    step, steps = pipeline.steps[name], list(pipeline.steps)
    above = steps[: steps.index(name)][-1:]
    asked = [*(step.needs if step.needs is not None else [] if step.continues else above)]
    if step.continues is not None:
        asked.append(step.continues)
    for need in asked:
        if need not in pipeline.steps:
            raise ConfigError(f"steps.{name} needs '{need}', and there is no such step.", nearest(need, steps))
    return tuple(dict.fromkeys(asked))


def _ordered(needs: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The steps in the order of the file, each moved behind what it needs."""
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ConfigError(f"The steps need one another in a circle: {circle}.", "Remove one of these needs.") from error
    order: dict[str, None] = {}

    def put(name: str) -> None:
        for need in needs[name]:
            put(need)
        order.setdefault(name)

    for name in needs:
        put(name)
    return list(order)


def _enabled_needs(name: str, needs: Mapping[str, tuple[str, ...]], wanted: Mapping[str, bool]) -> Iterator[str]:
    for need in needs[name]:
        if wanted[need]:
            yield need
        else:
            yield from _enabled_needs(need, needs, wanted)


def _task(names: Names, name: str, step: Step, needs: tuple[str, ...], reads: set[str]) -> Task:
    where, out = f"steps.{name}", names.folder_of(name)
    count = 1 if step.array is None else names.number(step.array, f"{where}.array")
    if count > 1:
        _refuse_equal_parts(name, step)
    parts = []
    for index in range(1, count + 1):
        local: dict[str, Any] = {"out": str(out)}
        local |= {} if step.array is None else {"part": index, "parts": count}
        commands = tuple(_command(names, name, step, line, local, reads) for line in step.command)
        done = None if step.done is None else Path(names.fill(step.done, f"{where}.done", local, reads))
        parts.append(Part(name, index, count, commands, done))
    return Task(
        name=name,
        title=step.title or name.replace("_", " "),
        needs=needs,
        continues=step.continues,
        out=out,
        inputs=tuple(Path(names.fill(path, f"{where}.inputs", {"out": str(out)}, reads)) for path in step.inputs),
        ranks=names.number(step.ranks, f"{where}.ranks"),
        at_once=None if step.at_once is None else names.number(step.at_once, f"{where}.at_once"),
        resources=validate(names.fill_value(step.resources, f"{where}.resources", {}), Resources, f"{where}.resources"),
        parts=tuple(parts),
    )


def _command(
    names: Names, name: str, step: Step, line: str, local: Mapping[str, Any], reads: set[str]
) -> tuple[str, ...]:
    """A command line as its arguments: cut as a shell cuts it, then filled in, so that a value may hold spaces."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"steps.{name}.command has a quote that does not end: {line}", "Close it.") from error
    words = words[1:] if words[:1] == ["videomamba"] else words
    where = f"steps.{name}.command"
    arguments = [names.fill(word, where, local, reads) for word in words]
    for key, value in dict(_flat(step.overrides)).items():  # a.b: 1 and a: {b: 2} are one key, the later counts
        filled = names.fill_value(value, f"steps.{name}.overrides.{key}", local, reads)
        arguments.append(f"{key}={as_text(filled)}")
    return tuple(arguments)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _refuse_equal_parts(name: str, step: Step) -> None:
    if not any("{part" in line for line in step.command) and "{part" not in str(step.overrides):
        raise ConfigError(
            f"steps.{name} is an array, but its command does not say {{part}}: every part would do the same.",
            "Give the command its share, such as --part {part}/{parts}.",
        )
    if step.done is not None and "{part" not in step.done:
        raise ConfigError(
            f"steps.{name}.done is the same file for every part.", "Write {part} into it, or leave `done` out."
        )


def _refuse_unneeded(chain: Chain, pipeline: Pipeline, name: str, read: set[str]) -> None:
    for other in sorted(read & pipeline.steps.keys() - {name}):
        if other not in chain.tasks:
            raise ConfigError(
                f"steps.{name} reads {{{other}}}, a step that is left out (enabled: false).",
                f"Enable {other}, or give its folder as a variable.",
            )
        if other not in chain.needs(name):
            raise ConfigError(
                f"steps.{name} reads {{{other}}} without needing it.", f"Add {other} to steps.{name}.needs."
            )


def _refuse_shared_folders(chain: Chain) -> None:
    writers: dict[str, str] = {}
    for name, task in chain.tasks.items():
        if task.continues is not None:
            continue
        if normpath(task.out) in [normpath(chain.folder / own) for own in OWN]:
            raise ConfigError(
                f"steps.{name} writes {task.out}, a folder of the pipeline's own.", "Give it another `out`."
            )
        other = writers.setdefault(normpath(task.out), name)
        if other != name:
            raise ConfigError(
                f"steps.{name} and steps.{other} both write {task.out}.",
                f"Give it an `out` of its own, or `continues: {other}` if it goes on there.",
            )
