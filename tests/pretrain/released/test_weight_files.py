"""What others published is read without being run, and what is no checkpoint is said to be none."""

import argparse
import io
import os
import pickle
import shutil
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from configs.errors import UserError
from pretrain.weight_files import read


def test_a_training_file_gives_its_weights_and_names_the_rest(published):
    state = published.state("masked")
    path = published.file("masked", state)
    source = read(path)
    assert source.tensors.keys() == state.keys()
    assert all(source.tensors[name].equal(tensor) for name, tensor in state.items())
    assert source.beside == ("optimizer", "epoch", "scaler", "args")
    assert source.unread == ("argparse.Namespace",)


@pytest.mark.parametrize(
    "form", ["plain", "state_dict", "module", "wrapped", "safetensors", "safetensors, odd name", "legacy"]
)
def test_every_form_of_file(published, tmp_path, form):
    state = published.state("video")
    path = tmp_path / ("file.safetensors" if form == "safetensors" else "file.pth")
    if form.startswith("safetensors"):
        save_file(state, path)
    elif form == "plain":
        torch.save(state, path)
    elif form == "wrapped":
        torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    elif form == "legacy":
        torch.save({"model": state, "args": argparse.Namespace(lr=1)}, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({form: state, "epoch": 3}, path)
    found = read(path).tensors
    assert found.keys() == state.keys()
    assert all(found[name].equal(tensor) for name, tensor in state.items())


def test_classes_of_programs_that_are_not_here_do_not_matter(published, tmp_path, monkeypatch):
    """Stage 2 keeps its config as a mapping of its own class; others keep paths, enumerations, numpy's numbers."""
    module = types.ModuleType("their_utils")
    exec(
        "class EasyDict(dict):\n"
        "    def __init__(self, **k):\n"
        "        super().__init__(**k); self.__dict__.update(k)\n"
        "class Scale:\n"
        "    def __reduce__(self):\n"
        "        return (Scale, (1, 2), {'grown': 3})\n"
        "    def __init__(self, *a): pass\n",
        module.__dict__,
    )
    for name in ("EasyDict", "Scale"):
        getattr(module, name).__module__ = "their_utils"
    monkeypatch.setitem(sys.modules, "their_utils", module)
    config = module.EasyDict(lr=1e-4, inner=module.EasyDict(a=1))
    beside = {"config": config, "scale": module.Scale(), "best": np.float64(3), "out": tmp_path}
    path = published.file("video", beside=beside)
    monkeypatch.delitem(sys.modules, "their_utils")
    source = read(path)
    assert {"their_utils.EasyDict", "their_utils.Scale"} <= set(source.unread)
    assert len(source.tensors) == len(published.names["video"])
    assert "their_utils" not in sys.modules


class _Runs:
    def __init__(self, function, *arguments):
        self.what = (function, arguments)

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("where", ["beside the weights", "among the weights"])
@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, subprocess.call])
def test_a_file_that_would_run_something_is_refused(published, tmp_path, function, where):
    mark = tmp_path / "it-ran"
    path = published.file("video", *_trapped(published, function, f"open({str(mark)!r}, 'w')", where))
    with pytest.raises(UserError, match="that is no checkpoint but a program"):
        read(path)
    assert not mark.exists()


@pytest.mark.parametrize("where", ["beside the weights", "among the weights"])
def test_a_function_that_is_not_known_to_be_bad_is_not_run_either(published, tmp_path, where):
    kept = tmp_path / "precious"
    kept.mkdir()
    path = published.file("video", *_trapped(published, shutil.rmtree, str(kept), where))
    if where == "beside the weights":
        assert read(path).unread == ("shutil.rmtree",)
    else:
        with pytest.raises(UserError, match="no tensor among its weights: cls_token"):
            read(path)
    assert kept.is_dir()
    with zipfile.ZipFile(path) as archive:  # the trap is real: Python's own unpickler calls it
        held = archive.read(f"{path.stem}/data.pkl")
    with pytest.raises(pickle.UnpicklingError, match="persistent"):
        pickle.loads(held)
    if where == "among the weights":
        assert not kept.is_dir()


def _trapped(published, function, argument, where):
    """A state dict and what stands beside it, one of them with a call in it."""
    state, trap = published.state("video"), _Runs(function, argument)
    if where == "beside the weights":
        return state, {"args": trap}
    return {"cls_token": trap} | {name: tensor for name, tensor in state.items() if name != "cls_token"}, {}


def _zip_without_weights(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><title>Sign in</title>", "a web page"),
        (b"\n  <html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
        (b'{"error": "not found"}', "JSON text"),
        (b"\x1f\x8b\x08\x00rest", "gzip"),
        (b"RIFF\x00\x00\x00\x00WAVE", "neither a torch file nor safetensors"),
        (b"\x80\x02}q\x00.", "damaged or was not fetched whole"),
        (pickle.dumps(["a", "list"]), "damaged or was not fetched whole"),
        (b"PK\x03\x04and then nothing", "damaged or was not fetched whole"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint(tmp_path, content, said):
    path = tmp_path / "videomamba_m16.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read(path)
    assert str(path) in error.value.cause
    assert error.value.cure


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_a_file_is_said_to_be_half(published, tmp_path, share, suffix):
    path = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save({"model": published.state("video")}, path)
    else:
        save_file(published.state("video"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match="not fetched whole") as error:
        read(path)
    assert error.value.exit_code == 1


def test_files_without_weights_by_name(tmp_path):
    for tree, said in (
        ({"epoch": 3, "lr": 0.1}, "keys epoch, lr"),
        (torch.zeros(3), "a Tensor"),
        ({"model": {"depth": 3}}, "keys depth"),
        ({"model": {"a": torch.zeros(1), "b": "text"}}, r"no tensor among its weights: b \(str\)"),
    ):
        torch.save(tree, tmp_path / "odd.pth")
        with pytest.raises(UserError, match=said):
            read(tmp_path / "odd.pth")
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), program)
    (tmp_path / "script.pt").write_bytes(program.getvalue())
    _zip_without_weights(tmp_path / "other.zip")
    for name in ("script.pt", "other.zip"):
        with pytest.raises(UserError, match="damaged"):
            read(tmp_path / name)


def test_folders_and_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="There is no file"):
        read(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder") as error:
        read(tmp_path)
    assert "file inside" in error.value.cure
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="is a folder") as error:
        read(tmp_path)
    assert "one of ours" in error.value.cure
