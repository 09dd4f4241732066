"""docs/slurm.md: its commands run on a real cluster as they stand, and its tables leave nothing out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.cluster import ClusterProfile, Container
from slurm.history import read_history

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
TEN_LINES = re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL)[1]

WAIT = {  # what a person does between two lines, by how the line begins
    "cp": "cp real.yaml mysite.yaml",
    "videomamba status": "until grep -q . runs/mine/slurm/logs/latest/rank0.log 2>/dev/null; do sleep 0.2; done",
    "tail": "until grep -q . runs/mine/log.jsonl 2>/dev/null; do sleep 0.2; done",
    "videomamba cancel": 'while [ -n "$(squeue --noheader)" ]; do sleep 0.2; done',
}


def test_every_field_of_a_site_is_described():
    fields = set(re.findall(r"`([a-z_]+)`", "\n".join(line.split("|")[1] for line in PAGE.splitlines() if "|" in line)))
    assert set(ClusterProfile.model_fields) - fields == set()
    container = next(line for line in PAGE.splitlines() if line.startswith("| `container`"))
    assert set(Container.model_fields) - set(re.findall(r"`([a-z]+)`", container)) == set()


def test_defaults_are_as_described():
    for name in ("max_restarts", "signal_lead"):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}`"))
        assert row.split("|")[3].strip() == str(ClusterProfile.model_fields[name].default)


def test_it_is_ten_lines():
    assert len(TEN_LINES.splitlines()) <= 10


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_ten_lines_run(cluster, site, runs, stage2_tree, tmp_path):
    """As written, but for the site and the waiting; what was cancelled goes on from its checkpoint."""
    runs.write(stage2_tree | {"steps": 100_000, "out": "elsewhere"}, "mine")
    site("real", gpus_per_node=1, cpus_per_node=4)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    program = tmp_path / "bin" / "videomamba"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m videomamba "$@"\n')
    program.chmod(0o755)
    lines = ["set -e"]
    for line in TEN_LINES.splitlines():
        lines += [line, *(then for start, then in WAIT.items() if line.startswith(start))]
    path = f"{program.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=2" in done.stdout
    assert "runs/mine: " in done.stdout
    assert "saves and stops" in done.stdout
    run = tmp_path / "runs" / "mine"
    (first,) = read_history(run / "slurm.1").attempts
    assert (first.reason, first.step > 0) == ("stopped", True)
    cluster.wait_for(lambda: read_history(run / "slurm").attempts, "the second submission")
    assert read_history(run / "slurm").attempts[0].began == first.step
