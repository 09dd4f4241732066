"""References in a pipeline's texts: `{name}` is a variable, another step's folder, or a step's own part.

    {clips}  {stage1}  {folder}  {out}  {part:05d}        {{ and }} are braces

A variable's text may hold references itself. Every name that was asked for is remembered, so that a step that reads
another's folder without needing it can be refused.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from slurm.pipeline.config import MUST_BE_GIVEN, Pipeline, nearest

_REFERENCE = re.compile(r"\{\{|\}\}|\{(?P<name>[^{}:]*)(?::(?P<form>[^{}]*))?\}|[{}]")


class Names:
    """What the names of a pipeline stand for."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.missing: dict[str, None] = {}
        """Variables that were asked for and have not been given."""
        self._open: list[str] = []

    def fill(self, text: str, where: str, local: Mapping[str, Any], used: set[str] | None = None) -> str:
        """`text` with its references filled in; names of `local` come first, every name is added to `used`.

        Raises ConfigError that begins with `where`.
        """

        def one(found: re.Match[str]) -> str:
            if found[0] in ("{{", "}}"):
                return found[0][0]
            if found["name"] is None:
                raise ConfigError(f"{where}: '{text}' has a single {found[0]}.", "Write {{ and }} for braces.")
            value = self._value(found["name"], where, local, used)
            return _formatted(value, found["form"], found[0], where)

        return _REFERENCE.sub(one, text)

    def fill_value(self, value: Any, where: str, local: Mapping[str, Any], used: set[str] | None = None) -> Any:
        """`fill` for any value of YAML; a text that is one reference gives the value itself, with its type."""
        if isinstance(value, str):
            found = _REFERENCE.fullmatch(value)
            if found is not None and found["name"] is not None and found["form"] is None:
                return self._value(found["name"], where, local, used)
            return self.fill(value, where, local, used)
        if isinstance(value, Mapping):
            return {key: self.fill_value(inner, where, local, used) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.fill_value(inner, where, local, used) for inner in value]
        return value

    def number(self, value: Any, where: str, least: int = 1) -> int:
        """A whole number of at least `least`, or a reference to one."""
        given = self.fill_value(value, where, {})
        if given == MUST_BE_GIVEN:  # said together with all that are missing
            return least
        whole = int(given) if isinstance(given, str) and given.isdigit() else given
        if not isinstance(whole, int) or isinstance(whole, bool) or whole < least:
            raise ConfigError(f"{where} is {as_text(given)}.", f"Give a whole number of at least {least}.")
        return whole

    def folder_of(self, step: str) -> Path:
        """The folder that a step writes."""
        return Path(as_text(self._value(step, f"steps.{step}.out", {}, None)))

    def _value(self, name: str, where: str, local: Mapping[str, Any], used: set[str] | None) -> Any:
        if used is not None:
            used.add(name)
        if name in local:
            return local[name]
        if name in self._open:
            circle = " -> ".join((*self._open[self._open.index(name) :], name))
            raise ConfigError(f"{where}: the names {circle} stand for one another.", "Write one of them out.")
        self._open.append(name)
        try:
            return self._looked_up(name, where, local, used)
        finally:
            self._open.pop()

    def _looked_up(self, name: str, where: str, local: Mapping[str, Any], used: set[str] | None) -> Any:
        pipeline = self.pipeline
        if name == "folder":
            return self.fill(pipeline.folder, "folder", {}, used)
        if name in pipeline.variables:
            if pipeline.variables[name] == MUST_BE_GIVEN:
                self.missing[name] = None
                return MUST_BE_GIVEN
            return self.fill_value(pipeline.variables[name], f"variables.{name}", {}, used)
        if name in pipeline.steps:
            step = pipeline.steps[name]
            if step.continues is not None:
                return self._value(step.continues, f"steps.{name}.continues", {}, None)
            return self.fill(step.out if step.out is not None else f"{{folder}}/{name}", f"steps.{name}.out", {}, used)
        if name in ("part", "parts"):
            raise ConfigError(f"{where} says {{{name}}}, but the step is no array.", "Give it array: N.")
        valid = ["folder", *local, *pipeline.variables, *pipeline.steps]
        cause = f"{where} says {{{name}}}, and there is no such variable or step."
        raise ConfigError(cause, nearest(name, valid))


def _formatted(value: Any, form: str | None, reference: str, where: str) -> str:
    if form is None or value == MUST_BE_GIVEN:
        return as_text(value)
    try:
        return format(value, form)
    except (ValueError, TypeError) as error:
        cause = f"{where}: {reference} does not suit {as_text(value)}."
        raise ConfigError(cause, "Mend what is behind the colon.") from error


def as_text(value: Any) -> str:
    """A value as a command line holds it, so that the loader reads it as that value again."""
    return value if isinstance(value, str) else json.dumps(value)
