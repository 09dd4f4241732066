"""A pipeline file becomes a chain with everything filled in, and what is wrong in it is said before anything runs."""

import re
from pathlib import Path

import pytest
import yaml

from configs.errors import ConfigError
from slurm.pipeline.chain import Chain, resolve
from slurm.pipeline.config import load_pipeline

FIRST = """
folder: runs/first
variables: {clips: "???", quick: 500, corpus: "{folder}/corpus", rate: 3.0e-4}
steps:
  shards:
    command: data build {clips} {out} --part {part}/{parts}
    array: 2
    out: "{corpus}"
    done: "{out}/part-{part:05d}-of-{parts:05d}/dataset.json"
    resources: {gpus: false, time: "1:00:00"}
  merge: {command: "data merge {out}", continues: shards, done: "{out}/dataset.json"}
  stage1:
    command: pretrain demo/stage1
    overrides: {steps: "{quick}", out: "{out}", optim: {lr: "{rate}"}, data.train.0.path: "{merge}", mask: null}
    resources: {nodes: "{quick}"}
  look: {command: ["data info {merge}", "data verify '{merge}'"], needs: [merge]}
"""


@pytest.fixture
def chain_of(tmp_path):
    """The chain of a pipeline's text with overrides."""

    def make(*overrides: str, text: str = FIRST) -> Chain:
        path = tmp_path / "first.yaml"
        path.write_text(text)
        return resolve(load_pipeline(path, overrides))

    return make


def test_references_are_filled_in(chain_of):
    tasks = chain_of("clips=/my clips").tasks
    assert list(tasks) == ["shards", "merge", "stage1", "look"]
    assert [part.name for part in tasks["shards"].parts] == ["shards-1-of-2", "shards-2-of-2"]
    second = tasks["shards"].parts[1]
    assert second.commands == (("data", "build", "/my clips", "runs/first/corpus", "--part", "2/2"),)
    assert second.done == Path("runs/first/corpus/part-00002-of-00002/dataset.json")
    assert (tasks["merge"].out, tasks["merge"].needs) == (Path("runs/first/corpus"), ("shards",))
    assert tasks["look"].parts[0].commands == (
        ("data", "info", "runs/first/corpus"),
        ("data", "verify", "runs/first/corpus"),
    )
    assert tasks["stage1"].resources.nodes == 500
    assert (tasks["shards"].resources.gpus, tasks["stage1"].resources.gpus) == (False, True)


def test_overrides_become_arguments_that_the_loader_reads_as_they_were(chain_of):
    (command,) = chain_of("clips=c").tasks["stage1"].parts[0].commands
    assert command[2:] == (
        "steps=500", "out=runs/first/stage1", "optim.lr=0.0003", "data.train.0.path=runs/first/corpus", "mask=null"
    )  # fmt: skip
    assert yaml.safe_load(command[4].partition("=")[2]) == 0.0003


def test_a_step_needs_the_one_above_unless_it_says_otherwise(chain_of):
    tasks = chain_of("clips=c").tasks
    assert {name: task.needs for name, task in tasks.items()} == {
        "shards": (), "merge": ("shards",), "stage1": ("merge",), "look": ("merge",)
    }  # fmt: skip


def test_a_step_that_is_left_out_hands_its_needs_on(chain_of):
    tasks = chain_of("clips=c", "steps.merge.enabled=false", "steps.stage1.overrides.data.train.0.path=x",
                     "steps.look.command=data info x").tasks  # fmt: skip
    assert {name: task.needs for name, task in tasks.items()} == {
        "shards": (), "stage1": ("shards",), "look": ("shards",)
    }  # fmt: skip
    assert "data.train.0.path=x" in tasks["stage1"].parts[0].commands[0]


def test_a_step_may_stand_above_what_it_needs(chain_of):
    text = "folder: f\nsteps: {b: {command: data info, needs: [a]}, a: {command: data info, needs: []}}"
    assert list(chain_of(text=text).tasks) == ["a", "b"]


def test_braces_and_shells(chain_of):
    text = """
folder: f
steps: {a: {command: "data build x --columns 'file={{dir}}/{{id:06d}}.mp4' --name 'two words'"}}
"""
    assert chain_of(text=text).tasks["a"].parts[0].commands == (
        ("data", "build", "x", "--columns", "file={dir}/{id:06d}.mp4", "--name", "two words"),
    )


def test_a_packaged_base_can_be_changed(tmp_path, chain_of):
    chain = chain_of(text="base: demo/pipeline\nfolder: f\nsteps: {stage1: {ranks: 2}}\nvariables: {seed: 7}")
    assert chain.tasks["stage1"].ranks == 2
    assert "seed=7" in chain.tasks["stage1"].parts[0].commands[0]


FAULTS = [
    ((), "has to be given clips. Add clips=VALUE"),
    (("clip=3",), "no variable or key 'clip'. Did you mean 'clips'"),
    (("clips=c", "steps.merge.continues=shard"), "needs 'shard', and there is no such step. Did you mean 'shards'"),
    (("clips=c", "steps.shards.needs=[stage1]"), "in a circle: .*shards -> stage1 -> merge -> shards"),
    (("clips=c", "steps.shards.array=many"), "steps.shards.array is many. Give a whole number"),
    (("clips=c", "steps.shards.need=[]"), "unknown key 'steps.shards.need'. Did you mean 'needs'"),
    (("clips=c", "steps.shards.resources.nods=1"), "steps.shards.resources: unknown key 'nods'. Did you mean 'nodes'"),
    (("clips=c", "steps.shards.resources.time=soon"), "'soon' is no time limit"),
    (("clips=c", "steps.shards.command=data build x"), "does not say {part}: every part would do the same"),
    (("clips=c", "steps.shards.done=x/dataset.json"), "done is the same file for every part"),
    (("clips=c", "steps.merge.command='data merge {part}'"), "says {part}, but the step is no array"),
    (("clips=c", "steps.stage1.out='{corpus}'"), "steps.stage1 and steps.shards both write runs/first/corpus"),
    (("clips=c", "steps.stage1.out='{corpus}/../corpus'"), "both write runs/first/corpus"),
    (("clips=c", "steps.stage1.out='{folder}/logs'"), "a folder of the pipeline's own"),
    (("clips=c", "steps.stage1.needs=[]"), "reads {merge} without needing it. Add merge to steps.stage1.needs"),
    (("clips=c", "steps.merge.enabled=false"), "reads {merge}, a step that is left out"),
    (("clips=c", "steps.merge.enabled=perhaps"), "steps.merge.enabled is perhaps. Give true or false"),
    (("clips=c", "steps.merge.command='data merge {ot}'"), "no such variable or step. Did you mean 'out'"),
    (("clips=c", "steps.merge.command='data merge {out'"), "has a single {"),
    (("clips=c", "steps.merge.command='data merge {clips:05d}'"), "{clips:05d} does not suit c"),
    (("clips='{corpus}'", "corpus='{clips}'"), "corpus -> clips -> corpus stand for one another"),
    (("clips=c", "steps.merge.out=x"), "works in that one's folder"),
    (("clips=c", "steps.merge.command=''"), "the command is empty"),
    (("clips=c", "steps={}"), "there are no steps"),
    (("clips=c", "variables.folder=3"), "the name 'folder' means something else"),
    (("clips=c", "steps.9lives={command: data info}"), "'9lives' is no name"),
    (("clips=c", "steps.look.overrides={a: 1}"), "overrides go behind one command"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "says"), FAULTS, ids=[fault[1][:40] for fault in FAULTS])
def test_what_is_wrong_is_said(chain_of, overrides, says):
    with pytest.raises(ConfigError) as caught:
        chain_of(*overrides)
    assert re.search(says.replace("{", r"\{").replace("}", r"\}"), str(caught.value)), str(caught.value)
