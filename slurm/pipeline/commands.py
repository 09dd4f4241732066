"""Are the command lines of a chain right? Asked of our own command tree, without starting anything.

The tree is the one that is being called (`ctx.find_root()`), so nothing of the rooms above is imported here: it loads
the module of a command by itself. A command that can print its config (`--print-config`) has it read and checked too.
"""

import io
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer

from configs.errors import ConfigError, UserError
from slurm.pipeline.chain import Chain, Part, Task

UsageError: Any = typer.BadParameter.__base__  # which package it is of depends on the version of typer


def check_commands(chain: Chain, tree: Any, ranks: Callable[[Task], Iterable[int]]) -> None:
    """Raise ConfigError, naming the step, for the first command line that its command would refuse.

    `tree` is the click group of all commands, `ranks` the numbers of ranks that a step may have. Missing inputs are
    not looked for: earlier steps may make them.
    """
    for task in chain.tasks.values():
        for arguments in task.parts[0].commands:
            try:
                for count in ranks(task) if takes(tree, arguments, "ranks") else (1,):
                    resolved(tree, arguments, count)
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


def check_alone(task: Task, part: Part, tree: Any, ranks: int) -> tuple[str, ...]:
    """What `--check` of a part's commands says, those that have it; raises UserError where one refuses."""
    said: list[str] = []
    for arguments in part.commands:
        if not takes(tree, arguments, "check"):
            continue
        command = [sys.executable, "-P", "-m", "videomamba", *_with_ranks(tree, arguments, ranks), "--check"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            cause, _, cure = done.stderr.strip().partition("\n  cure: ")
            raise UserError(f"steps.{task.name}: {cause.rpartition('error: ')[2]}", cure, done.returncode)
        said += done.stdout.splitlines()
    return tuple(said)


def resolved(tree: Any, arguments: Sequence[str], ranks: int = 1) -> str | None:
    """The config of a command line as its command prints it, None where it has none to print."""
    if not takes(tree, arguments, "print_config"):
        return None
    context = _context(tree, [*_with_ranks(tree, arguments, ranks), "--print-config"])
    said = io.StringIO()
    with redirect_stdout(said), context:
        context.command.invoke(context)
    return said.getvalue()


def with_config(tree: Any, arguments: Sequence[str], config: Path) -> tuple[str, ...]:
    """A command line with the file `config` in the place of its config and assignments; its options stay."""
    if not takes(tree, arguments, "print_config"):
        return tuple(arguments)
    given = _context(tree, arguments).params
    left = list(arguments)
    for assignment in given["overrides"] or ():
        left.remove(assignment)
    left[left.index(given["config"])] = str(config)
    return tuple(left)


def _with_ranks(tree: Any, arguments: Sequence[str], ranks: int) -> list[str]:
    return [*arguments, "--ranks", str(ranks)] if ranks > 1 and takes(tree, arguments, "ranks") else [*arguments]


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
