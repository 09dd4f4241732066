"""The pipelines that are shipped are right as they are, but for what has to be given."""

import pytest
import typer

from configs.errors import ConfigError
from configs.loader import packaged_names, read_tree
from slurm.cluster import load_cluster
from slurm.pipeline.chain import resolve
from slurm.pipeline.commands import check_commands
from slurm.pipeline.config import is_pipeline, load_pipeline
from slurm.pipeline.submit import asked
from videomamba.cli import app

GIVEN = ["clips=clips", "captions=c.csv", "test_clips=test", "test_captions=t.csv", "bert=bert"]
PIPELINES = [name for name in packaged_names() if is_pipeline(read_tree(name))]


def test_they_are_found():
    assert PIPELINES == [
        "demo/ablate", "demo/pipeline", "demo/single_frame", "pipelines/own_teacher", "pipelines/pretrain"
    ]  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_every_command_and_config_of_theirs_is_a_valid_request(name):
    tree, cluster = typer.main.get_command(app), load_cluster("plain")
    given = [*GIVEN, "teacher_weights=clip.safetensors"] if name == "pipelines/pretrain" else GIVEN
    chain = resolve(load_pipeline(name, given if name.startswith("pipelines/") else []))
    for ranks in (lambda _: (1,), lambda task: (asked(task, tree).tasks_on(cluster),)):
        check_commands(chain, tree, ranks)


def test_a_teacher_is_trained_only_if_needed():
    chain = resolve(load_pipeline("pipelines/pretrain", [*GIVEN, "teacher_weights=clip.safetensors"]))
    assert "own_teacher" not in chain.tasks
    assert chain.tasks["stage1"].needs == ("corpus",)
    chain = resolve(load_pipeline("pipelines/own_teacher", GIVEN))
    assert chain.tasks["stage1"].needs == ("corpus", "own_teacher")
    assert "teacher.source=runs/pretrain/teacher" in chain.tasks["stage2"].parts[0].commands[0]


def test_what_has_to_be_given_is_named_all_at_once():
    with pytest.raises(ConfigError, match=r"given clips, captions, .*teacher_weights, bert"):
        resolve(load_pipeline("pipelines/pretrain"))
