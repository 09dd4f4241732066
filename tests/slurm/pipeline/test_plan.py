"""What is to run now: nothing that is done, everything that needs what runs again, and nothing that lacks its input."""

import pytest

from configs.errors import ConfigError, UserError
from slurm.pipeline.chain import resolve
from slurm.pipeline.config import Pipeline
from slurm.pipeline.folder import PipelineFolder, Record, as_lists
from slurm.pipeline.plan import Selection, make_plan


class World:
    """A chain of an array, its merge, and three steps behind it, in a folder where any of them may be done."""

    def __init__(self, path):
        self.path = path
        self.pipeline = {
            "folder": str(path),
            "steps": {
                "shards": {"command": "data build x {out} --part {part}/{parts}", "array": 3, "done": "{out}/{part}"},
                "merge": {"command": "data merge {out}", "continues": "shards", "done": "{out}/whole"},
                "first": {"command": "pretrain a", "done": "{out}/done.json", "inputs": ["{merge}/whole"]},
                "side": {"command": "data info {merge}", "needs": ["merge"]},
                "last": {"command": "export {first} {out}", "needs": ["first"], "done": "{out}/export.json"},
            },
        }
        self.folder = PipelineFolder(path)

    @property
    def chain(self):
        return resolve(Pipeline.model_validate(self.pipeline))

    def finish(self, *names):
        """Leave what a step's run leaves."""
        for name in names:
            for part in self.chain.tasks[name].parts:
                self.folder.write(part, Record(as_lists(part.commands), "done"))
                if part.done is not None:
                    part.done.parent.mkdir(parents=True, exist_ok=True)
                    part.done.touch()

    def plan(self, **selection):
        plan = make_plan(self.chain, self.folder, Selection(**selection))
        return {name: [part.index for part in parts] for name, parts in plan.parts.items()}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_at_first_everything_runs(world):
    assert world.plan() == {"shards": [1, 2, 3], "merge": [1], "first": [1], "side": [1], "last": [1]}


def test_what_is_done_is_left_out_part_by_part(world):
    world.finish("shards")
    (world.path / "shards" / "2").unlink()
    assert world.plan()["shards"] == [2]


def test_a_merge_stands_for_the_parts_that_it_removed(world):
    world.finish("shards", "merge")
    for part in (1, 2, 3):
        (world.path / "shards" / str(part)).unlink()
    assert world.plan() == {"first": [1], "side": [1], "last": [1]}


def test_everything_done_is_nothing_to_do(world):
    world.finish("shards", "merge", "first", "side", "last")
    assert world.plan() == {}


def test_what_needs_a_step_that_runs_again_runs_again(world):
    world.finish("shards", "merge", "first", "side", "last")
    (world.path / "first" / "done.json").unlink()
    assert world.plan() == {"first": [1], "last": [1]}


def test_a_changed_command_line_is_not_done(world):
    world.finish("shards", "merge", "first", "side", "last")
    world.pipeline["steps"]["side"]["command"] = "data verify {merge}"
    assert world.plan() == {"side": [1]}
    world.pipeline["steps"]["first"]["command"] = "pretrain b"
    assert world.plan() == {"first": [1], "side": [1], "last": [1]}


def test_a_proof_without_a_record_counts_a_record_without_its_proof_does_not(world):
    world.finish("shards", "merge", "first")
    (world.path / "steps" / "first.json").unlink()
    assert "first" not in world.plan()
    world.finish("first")
    (world.path / "first" / "done.json").unlink()
    assert "first" in world.plan()


@pytest.mark.parametrize("state", ["failed", "running", "stopped", "unfinished", "submitted"])
def test_a_step_without_a_proof_is_done_by_its_record_alone(world, state):
    world.finish("shards", "merge", "side")
    assert "side" not in world.plan()
    (part,) = world.chain.tasks["side"].parts
    world.folder.write(part, Record(as_lists(part.commands), state))
    assert "side" in world.plan()


def test_selections(world):
    assert list(world.plan(until="merge")) == ["shards", "merge"]
    assert list(world.plan(only="shards")) == ["shards"]
    world.finish("shards", "merge")
    assert list(world.plan(start="first")) == ["first", "last"]
    assert list(world.plan(start="merge", until="first")) == ["first"]
    with pytest.raises(ConfigError, match=r"no step 'frist'. Did you mean 'first'"):
        world.plan(start="frist")
    with pytest.raises(ConfigError, match="No step lies from 'side' to 'last'"):
        world.plan(start="side", until="last")


def test_a_step_whose_need_has_not_run_is_refused(world):
    with pytest.raises(ConfigError, match=r"'side' needs 'merge', which has not run.*--until merge"):
        world.plan(only="side")


def test_an_input_that_no_step_makes_is_missed_beforehand(world):
    world.pipeline["steps"]["first"]["inputs"] = [str(world.path / "weights.pth")]
    with pytest.raises(ConfigError, match=r"'first' reads .*weights.pth, which is not there"):
        world.plan()
    (world.path / "weights.pth").touch()
    assert "first" in world.plan()


def test_a_damaged_record_is_named(world):
    world.finish("side")
    (world.path / "steps" / "side.json").write_text("{")
    with pytest.raises(UserError, match=r"side.json is no record of a step"):
        world.plan()


def test_one_at_a_time_in_a_folder(world):
    with world.folder, pytest.raises(UserError, match="Another `videomamba run` or `submit` is at work"):
        PipelineFolder(world.path).__enter__()
    with PipelineFolder(world.path):
        pass
