import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import ConfigError, UserError
from configs.loader import PACKAGED, load_config, packaged_names, read_tree, to_yaml, validate
from pretrain.config import PretrainConfig
from pretrain.config_checks import check_inputs, check_world, micro_batch
from pretrain.run_folder import RunFolder, run_digest
from pretrain.setup import check_compiler

VISION = {"depth": 2, "width": 16, "patch_size": 8, "frames": 4, "image_size": 32}
DATA = {"train": [{"path": "v"}], "batch": 12, "image_size": 32, "frames": {"count": 4}}
TEXT = {"width": 16, "heads": 2, "layers": 1, "fusion_layers": 1, "vocab_size": 64}
STAGE1 = {
    "task": "stage1", "out": "x", "steps": 10, "vision": VISION, "data": DATA, "teacher": {"source": "ViT"}, "mask": {},
}  # fmt: skip
STAGE2 = STAGE1 | {"task": "stage2", "text": TEXT}


def make(tree, **changes) -> PretrainConfig:
    return validate(tree | changes, PretrainConfig, "test")


def test_the_two_stages_are_valid():
    make(STAGE1)
    make(STAGE2)
    make(STAGE2, teacher=None, mask=None, losses={"alignment": {"weight": 0}})
    make(STAGE2, teacher=None, mask={"kind": "tube"}, losses={"alignment": {"weight": 0}})


@pytest.mark.parametrize(
    "tree, changes, cause, cure",
    [
        (STAGE1, {"teacher": None}, "stage1 learns from a teacher", "Give teacher.source"),
        (
            STAGE2,
            {"teacher": None, "losses": {"alignment": {"weight": 0}}},
            "mask.kind is attention",
            "mask.kind=random",
        ),
        (STAGE2, {"teacher": None, "mask": None}, "there is no teacher to align to", "losses.alignment.weight=0"),
        (STAGE1, {"losses": {"alignment": {"weight": 0}}}, "stage1 has no other loss", "above 0"),
        (STAGE2, {"mask": None, "losses": {"alignment": {"weight": 0}}}, "used by no loss", "teacher=null"),
        (STAGE2, {"text": None}, "stage2 needs a text tower", "text.width"),
        (STAGE1, {"text": TEXT}, "stage1 reads no text", "task=stage2"),
        (STAGE2, {"text": TEXT | {"fusion_layers": 0}}, "fusion_layers is 0", "both weights to 0"),
        (STAGE1, {"vision": VISION | {"image_size": 40}}, "data.image_size is 32", "Make them equal"),
        (STAGE1, {"vision": VISION | {"frames": 8}}, "data.frames.count is 4", "Make them equal"),
        (
            STAGE1,
            {"vision": VISION | {"align_layers": 2}},
            "teacher.layers is 1 and vision.align_layers 2",
            "Make them",
        ),
        (STAGE1, {"vision": VISION | {"scan_order": "both"}}, "vision.scan_order: there is no scan order 'both'", ""),
        (STAGE1, {"vision": VISION | {"patch_size": 10}}, "does not divide by patch_size", ""),
        (STAGE1, {"vision": VISION | {"tubelet": 3}}, "do not divide by tubelet", ""),
        (STAGE1, {"deepspeed": "zero7"}, "no DeepSpeed config 'zero7'", "zero0, zero1, zero2, zero3"),
        (
            STAGE1,
            {"deepspeed": "zero3", "compile": True},
            "fetches weights in hooks",
            "deepspeed=zero2, or compile=false",
        ),
        (
            STAGE1,
            {"deepspeed": "zero1", "optim": {"method": "muon", "clip_norm": 1.0}},
            "DeepSpeed would clip the orthogonal update",
            "optim.clip_norm=null, deepspeed=zero0",
        ),
        (STAGE1, {"epochs": 2}, "steps and epochs both say how long", "Give one of steps, samples and epochs"),
        (STAGE1, {"steps": 0}, "nothing says how long", "Give one of steps, samples and epochs"),
        (STAGE1, {"optim": {"warmup_steps": 1, "warmup_epochs": 1}}, "both say how long the warm-up is", "Give one"),
        (STAGE1, {"optim": {"modules": {"norm": {"muon_lr": 1}}}}, "method is adamw", "method: muon, or give lr"),
        (STAGE1, {"optim": {"warmup_steps": 10}}, "the rate would only rise", "Use 1 or so"),
        (STAGE1, {"optim": {"lr": 1e-4, "min_lr": 1e-3}}, "min_lr 0.001 is above lr 0.0001", "Lower min_lr"),
        (STAGE1, {"optim": {"lrr": 1}}, "unknown key 'optim.lrr'", "Did you mean 'lr'?"),
        (STAGE1, {"task": "stage3"}, "task is 'stage3'", ""),
    ],
)
def test_a_wrong_config_is_refused_with_a_cure(tree, changes, cause, cure):
    with pytest.raises(ConfigError) as error:
        make(tree, **changes)
    assert cause in str(error.value)
    assert cure in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "changes, ranks, cause, cure",
    [
        ({}, 5, "data.batch: 12 samples do not divide by 5 ranks", "Use 10, or 4 ranks"),
        ({"task": "stage2", "text": TEXT}, 12, "needs a negative beside it", "24 or more"),
        ({"task": "stage2", "text": TEXT, "micro_batch": 1}, 2, "takes 1 video at once", "micro_batch=2 or more"),
        (
            {"data": DATA | {"train": [{"path": "i", "kind": "image"}], "image_batch": 7}},
            2,
            "data.image_batch: 7 samples do not divide by 2 ranks",
            "Use 8, or 1 rank.",
        ),
    ],
)
def test_what_only_the_number_of_ranks_shows(changes, ranks, cause, cure):
    config = make(STAGE1, **changes)
    with pytest.raises(ConfigError) as error:
        check_world(config, ranks)
    assert cause in str(error.value)
    assert cure in str(error.value)
    check_world(make(STAGE1, micro_batch=3), 2)
    check_world(make(STAGE1, task="stage2", text=TEXT, micro_batch=3), 2)
    alone = {"matching": {"negatives": "global"}}
    check_world(make(STAGE1, task="stage2", text=TEXT, micro_batch=1, losses=alone), 12)


@pytest.mark.parametrize(
    ("limit", "share", "taken"), [(None, 12, 12), (4, 12, 4), (5, 12, 4), (7, 12, 6), (8, 4, 4), (4, 7, 1), (1, 3, 1)]
)
def test_a_rank_takes_as_many_at_once_as_it_may_that_divide_its_share(limit, share, taken):
    assert micro_batch(make(STAGE1, micro_batch=limit), share) == taken


def test_inputs_that_are_missing_are_named(tmp_path: Path):
    (tmp_path / "shards").mkdir()
    data = DATA | {"train": [{"path": str(tmp_path / "shards")}]}
    with pytest.raises(ConfigError, match="no folder of shards v"):
        check_inputs(make(STAGE1))
    check_inputs(make(STAGE1, data=data))
    with pytest.raises(ConfigError, match=r"no checkpoint .*gone"):
        check_inputs(make(STAGE1, data=data, init=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match="no tokenizer folder"):
        check_inputs(make(STAGE2, data=data, tokenizer=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match=r"no folder .*gone \(text\.init\)"):
        check_inputs(make(STAGE2, data=data, text={**STAGE2["text"], "init": str(tmp_path / "gone")}))
    with pytest.raises(ConfigError, match="no teacher folder"):
        check_inputs(make(STAGE1, data=data, teacher={"source": str(tmp_path / "gone")}))


def test_a_resolved_config_reads_back_equal(tmp_path: Path):
    config = make(STAGE2, optim={"method": "muon", "lr": 3e-3, "clip_norm": 1.0})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert validate(read_tree(tmp_path / "c.yaml"), PretrainConfig, "c") == config


def test_packaged_pretraining_configs_are_valid():
    names = [name for name in packaged_names() if read_tree(PACKAGED / f"{name}.yaml").get("task")]
    for name in names:
        load_config(name, PretrainConfig)


def test_reading_a_config_needs_no_torch():
    code = "import sys, pretrain.config, pretrain.cli; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_run_folder_belongs_to_one_config(tmp_path: Path):
    config = make(STAGE1, out=str(tmp_path / "run"))
    folder = RunFolder(config)
    folder.check()
    folder.claim()
    for attempt in (RunFolder(config).claim, RunFolder(config).clear):
        with pytest.raises(UserError, match="Another process is training"):
            attempt()
    folder.release()
    other = make(STAGE1, out=config.out, optim={"lr": 2e-4})
    with pytest.raises(UserError, match=r"optim\.lr is 0\.00015 there and 0\.0002 here") as error:
        RunFolder(other).check()
    assert "--fresh" in error.value.cure
    same = make(STAGE1, out=config.out, threads=3, micro_batch=6, log={"every_steps": 50})
    RunFolder(same).check()  # where and how fast may change
    assert run_digest(same) == run_digest(config) != run_digest(other)
    (tmp_path / "run" / "mine.txt").write_text("keep")
    folder.finish({"step": 10})
    assert folder.done == {"step": 10}
    folder.clear()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "mine.txt"]


@pytest.mark.parametrize(
    ("changes", "asked", "cure"),
    [
        ({"compile": True}, "compile=true", "leave compile out"),
        ({"optim": {"method": "muon"}, "deepspeed": "zero1"}, "muon with deepspeed=zero1", "deepspeed=zero0"),
        ({"optim": {"method": "muon"}}, None, None),
        ({}, None, None),
    ],
)
def test_what_compiles_needs_a_compiler(changes, asked, cure, monkeypatch, tmp_path):
    config = make(STAGE1, **changes)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if asked is None:
        check_compiler(config, "cpu")
        return
    with pytest.raises(UserError, match=r"there is no C\+\+ compiler") as error:
        check_compiler(config, "cpu")
    assert asked in error.value.cause
    assert cure in error.value.cure
