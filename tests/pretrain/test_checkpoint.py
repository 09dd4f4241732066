import copy
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from pretrain import checkpoint, trainer
from pretrain.config import PretrainConfig
from pretrain.tasks import build_task

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stage1_tree, process_group) -> PretrainConfig:
    """A stage-1 run of 6 steps with checkpoints at 2, 4 and 6, of which two were kept."""
    from configs.loader import validate

    with pytest.MonkeyPatch.context() as patch:
        for name, value in process_group.items():
            patch.setenv(name, value)
        tree = stage1_tree | {"steps": 6, "checkpoint": {"every_steps": 2, "keep": 2}}
        config = validate(tree | {"out": str(tmp_path_factory.mktemp("run") / "one")}, PretrainConfig, "one")
        assert trainer.train(config) == 0
    return config


@pytest.fixture
def run(finished: PretrainConfig, tmp_path: Path) -> Path:
    """A copy of that run's folder."""
    return Path(shutil.copytree(finished.out, tmp_path / "run"))


def again(finished: PretrainConfig, run: Path, **changes) -> PretrainConfig:
    return finished.model_copy(update={"out": str(run), **changes})


def test_what_a_checkpoint_holds(run):
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step-0000004", "step-0000006"]
    assert (run / "checkpoints" / "latest").read_text() == "step-0000006\n"
    assert not list((run / "checkpoints").glob(".*"))
    folder = checkpoint.resolve(run)
    assert folder.name == "step-0000006" == checkpoint.resolve(folder).name
    meta = checkpoint.verify(folder)
    assert (meta.step, meta.task, meta.ranks, meta.zero_stage) == (6, "stage1", 1, 0)
    assert meta.counters == {"seen": 24, "lost": {}, "bad": []}
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written == {*meta.files, "meta.json"}
    assert {"model.safetensors", "config.yaml", "preprocess.json"} < written
    names = checkpoint.load_weights(folder)
    assert "layers.0.mixer.A_log" in names  # plain names, not DeepSpeed's
    assert "clip_decoder.0.head.weight" in names


def test_a_model_comes_back_as_it_was(run, finished):
    model, config, preprocess = checkpoint.load_model(run)
    assert config == finished
    assert preprocess.visual == finished.data.visual()
    assert not model.training
    saved = checkpoint.load_weights(checkpoint.resolve(run))
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    video = torch.rand(1, 3, 4, 32, 32)
    assert model(video).tokens_BLD.shape == (1, 1 + 2 * 16, 32)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "meta"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(run, harm, caplog):
    newest = checkpoint.resolve(run)
    state = newest / "optimizer-0000.safetensors"
    if harm == "flip":
        data = bytearray(state.read_bytes())
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif harm == "cut":
        os.truncate(state, state.stat().st_size // 2)
    elif harm == "remove":
        state.unlink()
    else:
        (newest / "meta.json").write_text("{")
    with pytest.raises(UserError, match="is damaged") as error:
        checkpoint.verify(newest)
    assert error.value.exit_code == 1
    assert checkpoint.newest_whole(run).name == "step-0000004"
    assert "Going back to the one before it" in caplog.text


def test_with_no_whole_checkpoint_nothing_starts_over_by_itself(run, finished):
    for folder in checkpoint.checkpoints(run):
        (folder / "model.safetensors").unlink()
    (run / "done.json").unlink()
    with pytest.raises(UserError, match="None of the 2 checkpoints"):
        trainer.train(again(finished, run))


def test_leftovers_of_a_killed_save_are_cleared_and_harmless(run, finished):
    before = (run / "log.jsonl").read_text()
    root = run / "checkpoints"
    shutil.rmtree(root / "step-0000006")  # as if killed before the rename; `latest` still names it
    (root / ".step-0000006.part" / "state").mkdir(parents=True)
    (root / ".step-0000006.part" / "state" / "half.pt").write_bytes(b"x" * 100)
    (root / ".step-0000002.old").mkdir()
    (run / "done.json").unlink()
    assert trainer.train(again(finished, run)) == 0
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-0000004", "step-0000006"]
    lines = [[json.loads(line)[key] for key in ("step", "loss", "grad_norm")] for line in before.splitlines()]
    resumed = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [[line[key] for key in ("step", "loss", "grad_norm")] for line in resumed] == lines


def test_a_full_disk_is_said_and_leaves_nothing(run, finished):
    root = run / "checkpoints"
    shutil.rmtree(root / "step-0000006")
    (run / "done.json").unlink()
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError) as error:
            trainer.train(again(finished, run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert "step-0000006" in error.value.cause
    assert error.value.exit_code == 1
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-0000004"]
    assert trainer.train(again(finished, run)) == 0  # with room again, it goes on


def test_stage_2_starts_from_stage_1(run, finished, stage2_tree, runs, caplog, tmp_path):
    from pretrain.tokenizer import train_tokenizer

    words = train_tokenizer(["a red square moves left"], tmp_path / "words", 200)
    config = runs.config(stage2_tree | {"init": str(run), "tokenizer": str(words)}, "two")
    with caplog.at_level("INFO"):
        task = build_task(config, torch.device("cpu"), words)
    assert "new here, 0 unused there" in caplog.text
    saved = checkpoint.load_weights(checkpoint.resolve(run))
    own = task.model.state_dict()
    assert all(torch.equal(own[f"vision_encoder.{name}"], value) for name, value in saved.items())

    tree = copy.deepcopy(stage2_tree)
    tree["vision"]["width"] = 48
    with pytest.raises(UserError, match=r"checkpoint of another model: .* there and .* here"):
        build_task(runs.config(tree | {"init": str(run)}, "other"), torch.device("cpu"), words)
    with pytest.raises(UserError, match="holds no checkpoint"):
        build_task(runs.config(stage2_tree | {"init": str(tmp_path)}, "none"), torch.device("cpu"), words)


def test_what_an_older_version_wrote_is_read_for_its_weights_and_refused_as_a_state(run, finished):
    folder = checkpoint.resolve(run)
    tree = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(tree | {"format": 1}))
    (run / "done.json").unlink()
    with pytest.raises(UserError, match="has format 1, whose optimizer state only the version that wrote it can read"):
        trainer.train(again(finished, run))
    assert checkpoint.load_model(run)[1] == finished
