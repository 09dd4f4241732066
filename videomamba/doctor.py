"""`videomamba doctor`: what this machine can run, what it cannot, and the command that mends it."""

import contextlib
import io
import json
from dataclasses import asdict
from typing import Annotated

import typer

from videomamba.checks import CHECKS, Finding


def healthy(findings: list[Finding]) -> bool:
    """Whether everything that a run on a CPU needs works."""
    return all(finding.state == "works" for finding in findings if finding.needed)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON instead of a table.")] = False,
) -> None:
    """Say what works here, what does not, and what mends it; exit code 0 if a run on this machine's CPU would work.

    Example: videomamba doctor
    """
    from rich.console import Console

    findings: list[Finding] = []
    quiet = contextlib.redirect_stdout(io.StringIO())  # libraries greet on stdout when imported
    with Console(stderr=True).status("Looking") as status, quiet:
        for check in CHECKS:
            status.update(f"Looking at {(check.__doc__ or '').split('.')[0]}")
            findings += check()
    if as_json:
        typer.echo(json.dumps({"healthy": healthy(findings), "findings": [*map(asdict, findings)]}, indent=2))
    else:
        _show(findings)
    raise typer.Exit(0 if healthy(findings) else 1)


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        bad = finding.needed and finding.state != "works"
        colour = "red" if bad else {"works": "green", "absent": "yellow", "broken": "red"}[finding.state]
        line = Text(f"{finding.what:{width}}  ")
        console.print(line.append(f"{finding.state:6}", style=colour).append(f"  {finding.says}"))
        if finding.cure and finding.state != "works":
            console.print(Text(f"{'':{width}}  mend:   {finding.cure}", style="bold"))
    if healthy(findings):
        console.print("Everything that a run on this machine's CPU needs works. Next: videomamba demo --minutes 3")
    else:
        missing = ", ".join(finding.what for finding in findings if finding.needed and finding.state != "works")
        console.print(f"A run on this machine's CPU needs what is missing: {missing}.")
