"""A pipeline file as a value: named steps, each a `videomamba` command line, and what they need of one another.

    folder: runs/first                    # {folder}: logs, records and, where nothing else is said, what steps write
    variables: {clips: "???", short: 500} # "???" has to be given: videomamba run first.yaml clips=/data/clips
    steps:
      shards: {command: "data build {clips} {out} --part {part}/{parts}", array: 8}
      merge: {command: "data merge {out}", continues: shards, done: "{out}/dataset.json"}
      stage1: {command: pretrain demo/stage1, overrides: {steps: "{short}", out: "{out}"}, done: "{out}/done.json"}

Read by the house's loader, with `base:` and `key=value`; chain.py fills in the references. See docs/pipelines.md.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from configs.errors import ConfigError
from configs.loader import Frozen, apply_overrides, read_tree, validate

MUST_BE_GIVEN = "???"
RESERVED = ("folder", "out", "part", "parts")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")

Number = int | str
"""A number, or a reference to a variable that holds one."""


class Step(Frozen):
    """One step. In its texts, {name} is a variable or another step's folder, {{ and }} are braces.

    `command` is a command line without `videomamba`, or several that run in turn; `overrides` become key=value behind
    it. `out` is the folder that it writes (default: FOLDER/NAME); `continues` names a step in whose folder it goes on
    instead. `needs` names the steps before it (default: the one above). `done` is a file that proves that its work is
    finished (default: that it has left with 0 here once). `inputs` are paths that have to be there. `array` cuts it
    into so many parts that share nothing: {part} (from 1) of {parts}; `at_once` limits how many a cluster runs
    together. `ranks` are started when it runs here, and `resources` are asked of a cluster (job.py has their keys).
    `enabled: false` leaves it out, and what needs it needs what it needed.
    """

    command: tuple[str, ...] = Field(min_length=1)
    overrides: dict[str, Any] = Field(default_factory=dict)
    title: str = ""
    needs: tuple[str, ...] | None = None
    continues: str | None = None
    out: str | None = None
    done: str | None = None
    inputs: tuple[str, ...] = ()
    array: Number | None = None
    at_once: Number | None = None
    ranks: Number = 1
    enabled: bool | str = True
    resources: dict[str, Any] = Field(default_factory=dict)

    @field_validator("command", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if not all(line.strip() for line in self.command):
            raise ValueError("the command is empty. Give the arguments of a `videomamba` command.")
        if self.overrides and len(self.command) > 1:
            raise ValueError("overrides go behind one command, and there are several. Write them into the commands.")
        if self.continues is not None and self.out is not None:
            raise ValueError("a step that continues another works in that one's folder. Remove `out` or `continues`.")
        return self


class Pipeline(Frozen):
    """A pipeline file: the folder of its logs and records, its variables, its steps in order."""

    folder: str
    title: str = ""
    variables: dict[str, Any] = Field(default_factory=dict)
    steps: dict[str, Step]

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        if not self.steps:
            raise ValueError("there are no steps. Give at least one.")
        for name in (*self.variables, *self.steps):
            if not _NAME.fullmatch(name):
                raise ValueError(f"'{name}' is no name. Use letters, digits and _, a letter first.")
            if name in RESERVED or (name in self.variables and (name in self.steps or name in Pipeline.model_fields)):
                raise ValueError(f"the name '{name}' means something else already. Use another.")
        return self


def load_pipeline(name: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline of a file (a path, or a packaged name) with overrides laid over it.

    `key=value` without a dot sets a variable of that name. Raises ConfigError, naming the nearest key.
    """
    tree = read_tree(name)
    if not is_pipeline(tree):
        cure = "Give a pipeline; a single run goes to `videomamba pretrain`, `eval` and so on."
        raise ConfigError(f"{name} is no pipeline: it has no `steps` that are named.", cure)
    variables = tree.get("variables")
    known = variables if isinstance(variables, Mapping) else {}
    changed = apply_overrides(tree, [_addressed(override, known) for override in overrides])
    return validate(changed, Pipeline, str(name))


def is_pipeline(tree: Mapping[str, Any]) -> bool:
    """Whether the tree of a config is that of a pipeline, whose `steps` are no number."""
    return isinstance(tree.get("steps"), Mapping)


def _addressed(override: str, variables: Mapping[str, Any]) -> str:
    head = override.partition("=")[0].partition(".")[0]
    if head in variables:
        return f"variables.{override}"
    if head in Pipeline.model_fields or "=" not in override:
        return override
    valid = [*variables, *Pipeline.model_fields]
    raise ConfigError(f"'{override}': the pipeline has no variable or key '{head}'.", nearest(head, valid))


def nearest(name: str, valid: Sequence[str]) -> str:
    """The cure for a name that is none: the nearest valid one, or all of them."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(valid)}."
