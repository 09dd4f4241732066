"""The wheel carries what runs need, and pyproject.toml declares what the project stands on."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("configs", "data_pipeline", "pretrain", "retrieval_eval", "slurm", "videomamba")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements):
    return {re.match(r"[\w.-]+", line)[0].lower() for line in requirements}


@pytest.mark.parametrize(
    "name", ["torch", "open-clip-torch", "webdataset", "deepspeed", "transformers", "ffmpeg-python", "faiss-cpu"]
)
def test_the_base_declares(name):
    assert name in names(PROJECT["dependencies"])


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ("gpu", "mamba-ssm"),
        ("gpu", "causal-conv1d"),
        ("gpu", "triton"),
        ("gpu", "faiss-gpu-cu12"),
        ("wandb", "wandb"),
        ("onnx", "onnx"),
        ("s3", "s3fs"),
        ("gs", "gcsfs"),
    ],
)
def test_an_extra_declares(extra, name):
    assert name in names(PROJECT["optional-dependencies"][extra])


def test_mamba_ssm_is_never_needed():
    assert not {"mamba-ssm", "causal-conv1d", "triton"} & names(PROJECT["dependencies"])


def test_constraints_pin_every_direct_dependency():
    def plain(name):
        return name.lower().replace("_", "-")

    pinned = {plain(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    asked = names(PROJECT["dependencies"]) | names(PROJECT["optional-dependencies"]["dev"])
    assert {plain(name) for name in asked} - pinned == set()


def test_the_version_is_said_once_more_and_the_same():
    from videomamba import __version__

    assert __version__ == PROJECT["version"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built offline from a copy, so that no build folder of the work tree leaks into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*build, "-w", str(out), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("videomamba-*.whl"))


def test_the_wheel_carries_every_file_of_the_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert {"configs/loader.py", "configs/deepspeed/zero0.json"} < files
    assert any(name.startswith("pretrain/ops/") and name.endswith(".cpp") for name in files)
    assert files - carried == set()
    assert [name for name in carried if name.startswith("tests/")] == []


def test_the_wheel_runs_from_elsewhere(wheel, tmp_path, python):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "videomamba = videomamba.cli:main" in archive.read(entry_points).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    done = python("-m", "videomamba", "--version", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"videomamba {PROJECT['version']}\n"), done.stderr
    code = "import configs.loader as c; print(c.PACKAGED, *c.packaged_names())"
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    inside, *packaged = done.stdout.split()
    assert inside == str(tmp_path / "configs"), done.stderr
    assert packaged == sorted(
        path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").rglob("*.yaml")
    )
