"""`videomamba import-released` and everything that takes what it writes: loading, init, evaluation, export."""

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from configs.errors import UserError
from configs.loader import load_config, validate
from pretrain import checkpoint
from pretrain.cli import app
from pretrain.config import PretrainConfig
from pretrain.encoder import load_encoder
from pretrain.export import export
from pretrain.models.joint import JointModel
from pretrain.released.config import ImportConfig
from pretrain.released.fit import fit
from pretrain.released.folder import import_released
from pretrain.tasks import build_task
from retrieval_eval.config import RetrievalConfig
from retrieval_eval.encoders import Encoders
from retrieval_eval.evaluate import evaluate

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
COLOURS = ["a", "red", "green", "blue", "white", "square", "moves", "right", "left", "take"]
WORDS = [*SPECIAL, *COLOURS, *(f"##{n}" for n in range(25))]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{word}\n" for word in WORDS))
    return path


@pytest.fixture
def joint_folder(published, vocabulary, tmp_path):
    import_released(published.file("joint"), tmp_path / "joint", ImportConfig(target="stage2", heads=4), vocabulary)
    return tmp_path / "joint"


def test_the_command_says_what_it_did(published, vocabulary, tmp_path, videomamba):
    path = published.file("joint", beside={"epoch": 10})
    done = videomamba(
        "import-released", str(path), "--as", "stage2", str(tmp_path / "out"), "--heads", "4", "--frames", "6",
        "--tokenizer", str(vocabulary), "--max-tokens", "12",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for said in (
        f"joint.pth (sha256 {checkpoint.sha256(path)}) as stage2",
        "layout: stage 2, joint",
        "dropped: the frozen teacher (2 tensors)",
        "reshaped: temp, a scalar, to (1,)",
        "resized (linear): vision_encoder.temporal_pos_embedding 1x4x48 -> 1x6x48",
        "not read: epoch beside the weights",
        "model: depth 3, width 48, 6 frames of 32, patch 8, tubelet 1, state 16, alignment decoder 24 wide "
        "(align_source released)",
        "2 text and 1 fusion layers",
        f"init={tmp_path}/out tokenizer={tmp_path}/out/tokenizer",
        f"written: {tmp_path}/out",
    ):
        assert said in done.stdout, said
    meta = checkpoint.verify(tmp_path / "out")
    assert meta.imported.sha256 == checkpoint.sha256(path)
    assert meta.imported.layout == "joint"
    assert any("resized" in note for note in meta.imported.notes)
    shown = CliRunner().invoke(app, ["checkpoint", "inspect", str(tmp_path / "out")])
    assert f"joint.pth, sha256 {checkpoint.sha256(path)}" in shown.stdout
    back = CliRunner().invoke(app, ["checkpoint", "convert", str(tmp_path / "out"), str(tmp_path / "back.safetensors")])
    assert back.exit_code == 0, back.output
    assert "layout: stage 2, joint" in back.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["page.pth", "--as", "stage2", "out"], "a web page"),
        (["page.pth", "--as", "stage3", "out"], "stage3"),
        (["page.pth", "--as", "stage1", "out", "--classes", "3"], "--as classifier"),
        (["page.pth", "--as", "stage2", "out", "--tokenizer", "no.txt"], "There is no tokenizer no.txt"),
    ],
)
def test_wrong_requests(tmp_path, videomamba, arguments, said):
    (tmp_path / "page.pth").write_text("<html>Sign in</html>")
    done = videomamba("import-released", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_loading_it_gives_the_published_model(published, joint_folder):
    model, config, preprocess = checkpoint.load_model(joint_folder)
    direct = fit(published.state("joint"), ImportConfig(target="stage2", heads=4)).model
    assert isinstance(model, JointModel)
    assert config is None
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert model.vision_encoder(clip).tokens_BLD.equal(direct.vision_encoder(clip).tokens_BLD)
    assert (preprocess.visual.frames, preprocess.visual.resize, preprocess.text.clean) == (4, "stretch", "released")


def test_classifiers_are_fed_as_they_were_tested(published, tmp_path):
    for layout, interpolation in (("image", "bicubic"), ("video", "bilinear")):
        import_released(published.file(layout), tmp_path / layout, ImportConfig(target="classifier"))
        visual = checkpoint.load_model(tmp_path / layout)[2].visual
        assert (visual.resize, visual.interpolation) == ("crop", interpolation)


def test_a_folder_is_replaced_only_if_it_is_an_import(published, tmp_path):
    wanted = ImportConfig(target="stage1")
    for layout in ("masked", "video"):
        import_released(published.file(layout), tmp_path / "out", wanted)
    assert checkpoint.verify(tmp_path / "out").imported.layout == "video"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for name, content in (("mine", "is not empty"), ("thesis", "is not empty")):
        (tmp_path / "thesis").write_text("a file")
        with pytest.raises(UserError, match=content):
            import_released(published.file("masked"), tmp_path / name, wanted)
    broken = published.state("masked")
    del broken["cls_token"]
    before = checkpoint.sha256(tmp_path / "out" / "model.safetensors")
    with pytest.raises(UserError, match="cls_token"):
        import_released(published.file("masked", broken), tmp_path / "out", wanted)
    assert checkpoint.sha256(tmp_path / "out" / "model.safetensors") == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_tokenizers_that_do_not_belong(published, tmp_path, vocabulary):
    path, wanted = published.file("joint"), ImportConfig(target="stage2", heads=4)
    short = tmp_path / "short.txt"
    short.write_text("".join(f"{word}\n" for word in WORDS[:-1]))
    with pytest.raises(UserError, match="has 39 pieces and the model 40 word vectors") as error:
        import_released(path, tmp_path / "out", wanted, short)
    assert "bert-base-uncased" in error.value.cure
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no tokenizer"):
        import_released(path, tmp_path / "out", wanted, tmp_path / "empty")
    with pytest.raises(UserError, match="no text tower"):
        import_released(published.file("masked"), tmp_path / "out", ImportConfig(target="stage1"), vocabulary)


def test_without_a_tokenizer_it_says_so_where_text_is_read(published, tmp_path):
    import_released(published.file("joint"), tmp_path / "mute", ImportConfig(target="stage2", heads=4))
    assert checkpoint.load_model(tmp_path / "mute")[0] is not None
    for use in (lambda: export(tmp_path / "mute", tmp_path / "enc"), lambda: Encoders.load(tmp_path / "mute", "cpu")):
        with pytest.raises(UserError, match="has no tokenizer, so it cannot read text") as error:
            use()
        assert "--tokenizer" in error.value.cure
    assert not (tmp_path / "enc").exists()


def test_evaluation_and_export_take_it(joint_folder, corpora, tmp_path):
    tree = {
        "checkpoint": str(joint_folder), "data": {"path": corpora["video"], "workers": 0}, "out": str(tmp_path / "r"),
        "rerank": {"top": 4}, "device": "cpu",
    }  # fmt: skip
    result = evaluate(validate(tree, RetrievalConfig, "test"))
    assert result["protocol"]["clips"] == 24
    export(joint_folder, tmp_path / "enc")
    assert "imported from `joint.pth`" in (tmp_path / "enc" / "video" / "README.md").read_text()

    encoder = load_encoder(tmp_path / "enc")
    model, _, preprocess = checkpoint.load_model(joint_folder)
    frames = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        seen = model.vision_encoder(preprocess.visual.normalise(torch.from_numpy(frames).permute(3, 0, 1, 2)[None]))
        frame_vectors = model.embed_video(model.vision_encoder.pooled(seen.tokens_BLD, seen.frames, per_frame=True))
    np.testing.assert_allclose(encoder.encode_video([frames]), frame_vectors.mean(1).numpy(), atol=1e-6)


@pytest.mark.parametrize("layout", ["image", "masked"])
def test_a_run_starts_from_it_by_its_own_config(published, tmp_path, stage1_tree, layout):
    """`base: FOLDER/config.yaml` gives a run the model's sizes, `init: FOLDER` its weights."""
    made = import_released(published.file(layout), tmp_path / "from", ImportConfig(target="stage1", frames=4))
    tree = {key: value for key, value in stage1_tree.items() if key != "vision"}
    tree |= {"base": str(made.out / "config.yaml"), "init": str(made.out), "out": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "run.yaml", PretrainConfig)
    assert config.vision.align_source == ("released" if layout == "masked" else "output")
    started = build_task(config, torch.device("cpu"), None).model.state_dict()
    given = checkpoint.load_weights(made.out)
    fresh = {name for name in started if name not in given}
    assert fresh == (set() if layout == "masked" else {name for name in started if "clip_decoder" in name})
    assert all(started[name].equal(given[name]) for name in started.keys() - fresh)


def test_a_joint_run_starts_from_it(joint_folder, tmp_path, stage2_tree, runs):
    tree = {key: value for key, value in stage2_tree.items() if key not in ("vision", "text", "embed")}
    tree |= {"base": str(joint_folder / "config.yaml"), "init": str(joint_folder), "steps": 1, "optim": {"lr": 1e-4},
             "tokenizer": str(joint_folder / "tokenizer"), "out": str(tmp_path / "run"), "checkpoint": {}}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    done = runs.run(tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    assert "0 new here" in done.stderr
