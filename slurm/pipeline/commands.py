"""Are the command lines of a chain right? Asked of our own command tree, without starting anything.

The tree is the one that is being called (`ctx.find_root()`), so nothing of the rooms above is imported here: it loads
the module of a command by itself. A command that can print its config (`--print-config`) has it read and checked too.
"""

import io
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import typer

from configs.errors import ConfigError, UserError
from slurm.pipeline.chain import Chain, Part, Task

UsageError: Any = typer.BadParameter.__base__  # which package it is of depends on the version of typer


def check_commands(chain: Chain, tree: Any) -> None:
    """Raise ConfigError, naming the step, for the first command line that its command would refuse.

    `tree` is the click group of all commands. Missing inputs are not looked for: earlier steps may make them.
    """
    for task in chain.tasks.values():
        for arguments in task.parts[0].commands:
            try:
                _read(tree, arguments)
            except UsageError as error:
                raise ConfigError(
                    f"steps.{task.name}: `videomamba {shlex.join(arguments)}` is no request: {error.format_message()}",
                    f"See videomamba {arguments[0] if arguments else ''} --help.",
                ) from error
            except UserError as error:
                raise ConfigError(f"steps.{task.name}: {error.cause}", error.cure) from error


def takes(tree: Any, arguments: Sequence[str], option: str) -> bool:
    """Whether the command of a command line has this option (`check`)."""
    return option in _context(tree, arguments).params


def check_alone(task: Task, part: Part, tree: Any) -> tuple[str, ...]:
    """What `--check` of a part's commands says, those that have it; raises UserError where one refuses."""
    said: list[str] = []
    for arguments in part.commands:
        if not takes(tree, arguments, "check"):
            continue
        ranks = ["--ranks", str(task.ranks)] if task.ranks > 1 else []
        command = [sys.executable, "-P", "-m", "videomamba", *arguments, *ranks, "--check"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            cause, _, cure = done.stderr.strip().partition("\n  cure: ")
            raise UserError(f"steps.{task.name}: {cause.rpartition('error: ')[2]}", cure, done.returncode)
        said += done.stdout.splitlines()
    return tuple(said)


def _read(tree: Any, arguments: Sequence[str]) -> None:
    """Have a command line parsed and, where the command can show its config, that too."""
    if takes(tree, arguments, "print_config"):
        context = _context(tree, [*arguments, "--print-config"])
        with redirect_stdout(io.StringIO()), context:
            context.command.invoke(context)


def _context(tree: Any, arguments: Sequence[str]) -> Any:
    """The innermost context of a command line: the command that is meant, its arguments parsed."""
    if not arguments or arguments[0].startswith("-"):
        raise UsageError("It does not begin with a command.")
    context = tree.make_context("videomamba", list(arguments))
    while hasattr(context.command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context
