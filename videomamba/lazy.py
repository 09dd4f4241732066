"""A command group that knows its sub-commands' names and one-line helps, and imports one only when it is called."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from videomamba.errors import report


@dataclass(frozen=True)
class Entry:
    """Where a sub-command lives: `module` holds a typer app or a function called `attribute`.

    An app that holds a command or a group called like the entry gives that one; any other app is the command itself.
    """

    module: str
    help: str
    attribute: str = "app"


class LazyGroup(TyperGroup):
    """Sub-commands from `entries`, imported when called; errors a user can mend are reported without a traceback."""

    entries: Mapping[str, Entry] = {}

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, entry in self.entries.items():
            self.add_command(TyperCommand(name, callback=None, help=entry.help), name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Name, command and remaining arguments, the command being imported here."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and name in self.entries:
            command = load(name, self.entries[name])
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the sub-command; what a user can mend becomes two lines on stderr and an exit code."""
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            exit_code = report(error, debug=bool(ctx.params.get("_debug")))
            if exit_code is None:
                raise
            raise typer.Exit(exit_code) from error


def load(name: str, entry: Entry) -> Any:
    """The command behind an entry, imported now."""
    target = getattr(import_module(entry.module), entry.attribute)
    if not isinstance(target, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command(name)(target)
        target = app
    command = typer.main.get_command(target)
    inner = getattr(command, "commands", {}).get(name)
    return inner if inner is not None else command
