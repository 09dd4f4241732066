"""Real runs of pipelines, whose steps are a small command that does as it is told: it waits, fails, or leaves early."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]

PROBE = '''
    import os, pathlib, signal, time
    import typer
    app = typer.Typer()

    @app.command()
    def probe(
        out: pathlib.Path, say: str = "", code: int = 0, wait: pathlib.Path = None, early: bool = False,
        reads: pathlib.Path = None, check: bool = False,
    ):
        """Append a line to OUT; `wait` for a file; on TERM, or with `early`, leave with 0 before the work is done."""
        if check:
            print(f"would read {reads}: {reads.read_text().strip()}" if reads else "nothing to read")
            return

        def leave(*_):
            pathlib.Path(os.environ["VIDEOMAMBA_UNFINISHED_FILE"]).touch()
            raise typer.Exit(0)

        signal.signal(signal.SIGTERM, leave)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(f"{os.getpid()} {say}\\n")
        if say:
            print(say, flush=True)
        if reads is not None:
            reads.read_text()
        if early:
            leave()
        while wait is not None and not wait.exists():
            time.sleep(0.02)
        raise typer.Exit(code)
'''
HOOK = "from videomamba import cli, lazy\ncli.COMMANDS['probe'] = lazy.Entry('probe_command', 'For tests.')\n"


def _hear() -> None:
    """Let a child hear what a shell may have this process ignore: SIGHUP under nohup, SIGINT in the background."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class Runs:
    """`videomamba run` of pipelines of probes in a folder, in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "hook").mkdir()
        (folder / "hook" / "probe_command.py").write_text(textwrap.dedent(PROBE))
        (folder / "hook" / "sitecustomize.py").write_text(HOOK)

    def write(self, steps: dict[str, object], name: str = "pipeline.yaml", **more: object) -> Path:
        """A pipeline file whose folder is `run` beside it."""
        path = self.folder / name
        path.write_text(yaml.safe_dump({"folder": str(self.folder / "run"), **more, "steps": steps}, sort_keys=False))
        return path

    def start(self, *arguments: str | Path, command: str = "run") -> "subprocess.Popen[str]":
        """`videomamba COMMAND ARGUMENTS`, not waited for."""
        paths = os.pathsep.join((str(self.folder / "hook"), str(ROOT)))
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "videomamba", command, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "150"},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=_hear,
        )

    def __call__(self, *arguments: str | Path, command: str = "run", code: int = 0, timeout: float = 90) -> str:
        """What `videomamba COMMAND ARGUMENTS` says; it has to leave with `code`."""
        process = self.start(*arguments, command=command)
        said, _ = process.communicate(timeout=timeout)
        assert process.returncode == code, said
        return said

    def lines(self, name: str) -> list[str]:
        """What the probes of a step have said in their file, without their process ids."""
        path = self.folder / "run" / name
        return [line.partition(" ")[2] for line in path.read_text().splitlines()] if path.exists() else []

    def python(self) -> str:
        """An interpreter whose `videomamba` knows the probe, for the jobs of a cluster."""
        script = self.folder / "python"
        paths = f"{self.folder / 'hook'}:$PYTHONPATH"
        script.write_text(f'#!/bin/sh\nPYTHONPATH="{paths}" exec {sys.executable} "$@"\n')
        script.chmod(0o755)
        return str(script)

    def record(self, name: str) -> dict[str, object]:
        """The record of a part."""
        return dict(json.loads((self.folder / "run" / "steps" / f"{name}.json").read_text()))


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Pipelines in a folder of their own."""
    return Runs(tmp_path)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 40) -> None:
    """Wait for an event, not for a time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)
