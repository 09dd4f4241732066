"""What a pipeline's steps become as jobs: their command, their folder, and no more of the cluster than they need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from configs.errors import ConfigError
from slurm.cluster import load_cluster
from slurm.pipeline.chain import resolve
from slurm.pipeline.config import Pipeline
from slurm.pipeline.submit import Site, asked, make_job
from slurm.render import render
from videomamba.cli import app

ROOT = Path(__file__).parents[3]
STEPS = {
    "shards": {"command": "data build clips {out} --part {part}/{parts}", "array": 4, "at_once": 2},
    "merge": {"command": "data merge {out}", "continues": "shards", "done": "{out}/dataset.json"},
    "stage1": {
        "command": "pretrain demo/stage1 out={out} data.train.0.path={merge} teacher.source=ViT-B-16",
        "done": "{out}/done.json",
        "resources": {"nodes": 2, "time": "12:00:00"},
    },
    "export": {"command": "export {stage1} {out}", "done": "{out}/export.json"},
    "look": {"command": ["data verify {merge}", "data info {merge}"], "needs": ["merge"]},
}


@pytest.fixture
def tree():
    return typer.main.get_command(app)


@pytest.fixture
def job_of(tmp_path, tree):
    """The job of a step of STEPS, on a cluster of eight GPUs a node, and its script."""
    chain = resolve(Pipeline.model_validate({"folder": str(tmp_path), "steps": STEPS}))

    def make(name, count=None, site="plain"):
        task, cluster = chain.tasks[name], load_cluster(site)
        job = make_job(task, task.parts[:count], Site(cluster, tree, tmp_path), ("17",))
        return job, render(job, cluster)

    return make


def test_data_asks_for_no_gpu(job_of):
    for name in ("shards", "merge", "look"):
        _, script = job_of(name)
        assert "gpus" not in script
        assert "#SBATCH --ntasks-per-node=1\n" in script


def test_one_process_asks_for_one_gpu_and_ranks_for_all(job_of):
    _, export = job_of("export")
    assert "#SBATCH --gpus-per-node=1\n" in export
    _, stage1 = job_of("stage1")
    assert "#SBATCH --gpus-per-node=8\n" in stage1
    assert "#SBATCH --nodes=2\n" in stage1
    assert "#SBATCH --time=12:00:00\n" in stage1
    assert "#SBATCH --dependency=afterok:17\n" in stage1
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in stage1


def test_a_training_step_has_its_own_run_folder_and_its_resolved_config(job_of, tmp_path):
    job, _ = job_of("stage1")
    assert job.run == tmp_path / "stage1"
    assert job.command[-2:] == ("pretrain", str(tmp_path / "stage1" / "slurm" / "config.yaml"))
    assert job.done == tmp_path / "stage1" / "done.json"
    merge, _ = job_of("merge")
    assert merge.run == tmp_path / "jobs" / "merge"  # not in the corpus, which holds nothing but a corpus
    assert (job.code, merge.code) == (tmp_path / "code", tmp_path / "code")


def test_an_array_has_the_parts_that_are_left(job_of, tmp_path):
    job, script = job_of("shards")
    assert (job.array, job.command[-3:]) == (
        4,
        ("slurm.pipeline.in_turn", str(tmp_path / "jobs" / "shards" / "slurm" / "commands.json"), "%a"),
    )
    assert "#SBATCH --array=0-3%2\n" in script
    job, _ = job_of("shards", 1)
    assert (job.array, job.command[-1]) == (None, "0")


def test_a_proof_that_is_there_already_does_not_end_a_job_that_has_to_run(job_of, tmp_path):
    assert job_of("export")[0].done == tmp_path / "export" / "export.json"
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "export.json").touch()
    assert job_of("export")[0].done is None


def test_a_container_sees_the_folder_of_the_pipeline(job_of, tmp_path):
    _, pyxis = job_of("stage1", site="pyxis")
    assert f"{tmp_path}:{tmp_path}," in pyxis.partition("--container-mounts=")[2]
    _, apptainer = job_of("stage1", site="apptainer")
    assert f",{tmp_path}," in apptainer.partition("--bind ")[2]


def test_several_nodes_for_one_process_are_refused(tmp_path, tree):
    steps = {"export": {"command": "export a {out}", "resources": {"nodes": 2}}}
    task = resolve(Pipeline.model_validate({"folder": str(tmp_path), "steps": steps})).tasks["export"]
    with pytest.raises(ConfigError, match=r"steps.export.resources asks for several tasks, but its command is one"):
        asked(task, tree)


def test_ranks_that_do_not_fit_are_refused_before_anything_is_submitted(videomamba, tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump({"folder": str(tmp_path / "run"), "steps": {"stage1": STEPS["stage1"] | {
        "command": "pretrain demo/stage1 out={out}", "resources": {"nodes": 3}}}}))  # fmt: skip
    done = videomamba("submit", str(file), "--cluster", "plain")
    assert done.returncode == 2
    assert "steps.stage1: data.batch: 64 samples do not divide by 24 ranks." in done.stderr
    assert not (tmp_path / "run").exists()
    done = videomamba("submit", str(file), "--cluster", "plain", "--nodes", "2")
    assert "Write them into the steps' resources" in done.stderr


def test_command_lines_in_turn_end_with_the_first_that_fails(tmp_path):
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([[["--help"]], [["--version"], ["data", "info", "/not/there"], ["--help"]]]))

    def part(number: int) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-P", "-m", "slurm.pipeline.in_turn", str(file), str(number)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip

    assert part(0).returncode == 0
    second = part(1)
    assert second.returncode == 2
    assert second.stdout.startswith("videomamba ")
    assert "Usage" not in second.stdout
