"""The demo as a value: its sizes, its commands and its folder. Nothing is trained here."""

import json
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.loader import load_config
from data_pipeline.world import WORLD_VERSION
from pretrain.clip_config import ClipTinyConfig
from pretrain.config import PretrainConfig
from pretrain.config_checks import check_world
from retrieval_eval.config import RetrievalConfig
from slurm.pipeline.chain import Chain, resolve
from slurm.pipeline.config import load_pipeline
from videomamba.demo.extras import steps_of_stage1
from videomamba.demo.page import RECORDED
from videomamba.demo.plan import BUDGETS, FULL_STEPS, FULL_WORLD, assignments, beside, make_plan
from videomamba.demo.run import PIPELINE, Took, claim

SCHEMAS = {"teacher": ClipTinyConfig, "pretrain": PretrainConfig, "eval": RetrievalConfig}


def configs_of(chain: Chain) -> dict[str, object]:
    """Every config that the steps name, loaded with the step's own assignments."""
    loaded = {}
    for task in chain.tasks.values():
        for command in task.parts[0].commands:
            if command[0] in SCHEMAS:
                loaded[task.name] = load_config(command[1], SCHEMAS[command[0]], command[2:])
    return loaded


def test_ten_minutes_is_the_full_demo(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, 10)
    assert plan.world == FULL_WORLD
    assert plan.steps == FULL_STEPS


def test_the_packaged_pipeline_and_configs_are_the_full_demo(tmp_path: Path) -> None:
    variables = load_pipeline(PIPELINE).variables
    assert load_pipeline(PIPELINE, assignments(make_plan(tmp_path, 10))).variables == variables
    assert list(load_pipeline(PIPELINE).steps) == list(BUDGETS)
    assert load_config("demo/teacher", ClipTinyConfig).steps == FULL_STEPS["teacher"]
    for name in ("stage1", "stage2", "stage2_unmasked"):
        assert load_config(f"demo/{name}", PretrainConfig).steps == FULL_STEPS[name]


def test_a_shorter_demo_is_smaller_in_every_part_and_never_empty(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, 3)
    assert all(0 < plan.world[part] <= FULL_WORLD[part] for part in FULL_WORLD)
    assert all(50 < plan.steps[name] < FULL_STEPS[name] for name in FULL_STEPS)


def test_too_short_a_demo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves no time"):
        make_plan(tmp_path, 1)


@pytest.mark.parametrize("minutes", [2, 10])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_command_of_the_demo_is_a_valid_request(tmp_path: Path, minutes: float, ranks: int) -> None:
    plan = make_plan(tmp_path, minutes, seed=3, ranks=ranks)
    chain = resolve(load_pipeline(PIPELINE, assignments(plan)))
    loaded = configs_of(chain)
    assert all(task.ranks == (ranks if "stage" in name else 1) for name, task in chain.tasks.items())
    assert set(loaded) == {"teacher", "stage1", "stage2", "stage2_unmasked", "retrieval"}
    for name in ("stage1", "stage2", "stage2_unmasked"):
        run = loaded[name]
        assert isinstance(run, PretrainConfig)
        check_world(run, ranks)
        assert (run.seed, run.steps, run.out) == (3, plan.steps[name], str(tmp_path / name))
    stage2 = loaded["stage2"]
    assert isinstance(stage2, PretrainConfig)
    assert all(part.weight > 0 for part in (stage2.losses.alignment, stage2.losses.contrastive))
    assert all(part.weight > 0 for part in (stage2.losses.matching, stage2.losses.mlm))
    assert stage2.mask is not None
    assert {corpus.kind for corpus in stage2.data.train} == {"video", "image"}


def test_the_extras_start_from_nothing_and_one_of_them_sees_one_frame(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, 10)
    times = [Took("stage1", "", 50.0, 0), Took("stage2", "", 100.0, 0)]
    without, still = (
        configs_of(resolve(load_pipeline(f"demo/{name}", beside(plan, name, more))))
        for name, more in (("ablate", steps_of_stage1(plan, times)), ("single_frame", 0))
    )
    assert without["stage2"].init is None  # type: ignore[attr-defined]
    assert without["stage2"].out == str(tmp_path / "ablate" / "stage2")  # type: ignore[attr-defined]
    assert without["stage2"].steps == round(1.5 * plan.steps["stage2"])  # type: ignore[attr-defined]
    assert without["stage2"].data.frames.rule == "uniform"  # type: ignore[attr-defined]
    for name in ("stage2", "stage2_unmasked"):
        assert still[name].data.frames.rule == "single"  # type: ignore[attr-defined]


def test_a_folder_belongs_to_one_demo(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "demo", 3)
    claim(plan, fresh=False)
    claim(plan, fresh=False)
    with pytest.raises(UserError, match="other settings"):
        claim(make_plan(tmp_path / "demo", 4), fresh=False)
    claim(make_plan(tmp_path / "demo", 4), fresh=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(UserError, match="holds no demo"):
            claim(make_plan(other, 3), fresh)
    assert (other / "thesis.tex").read_text() == "precious"


def test_the_recorded_control_belongs_to_this_world() -> None:
    """A report leaves out a control of another world: whoever raises WORLD_VERSION has to train it again."""
    record = json.loads(RECORDED.read_text())
    assert record["world"] == WORLD_VERSION
    assert "--single-frame" in record["origin"]
    assert 0 < record["results"]["dual"]["t2v"]["R@1"] < 100
