"""The doctor, on this machine as it is and on one whose FAISS and ffmpeg are broken."""

import json
from pathlib import Path

from videomamba.checks import Finding
from videomamba.doctor import healthy

ROOT = Path(__file__).parents[2]


def findings(done):
    return {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_this_machine_is_healthy(videomamba):
    done = videomamba("doctor", "--json")
    found = findings(done)
    assert {name: row["says"] for name, row in found.items() if row["needed"] and row["state"] != "works"} == {}
    assert done.returncode == 0
    assert {"python", "torch", "CPU", "GPU", "ffmpeg", "av", "deepspeed", "faiss-cpu", "disk"} <= found.keys()
    assert found["kernel reference"]["state"] == "works"
    for backend in ("cpu", "triton", "mamba_ssm"):
        row = found[f"kernel {backend}"]
        assert "times as fast as PyTorch" in row["says"] if row["state"] == "works" else row["says"], backend
    assert sum("the default here" in row["says"] for name, row in found.items() if name.startswith("kernel")) == 1
    assert "a bf16 product runs" in found["CPU"]["says"]


def test_what_is_broken_is_named_with_its_cure(python, tmp_path):
    (tmp_path / "faiss.py").write_text("raise ImportError('libcublas.so.12: cannot open shared object file')\n")
    (tmp_path / "imageio_ffmpeg.py").write_text("raise ImportError('no wheel')\n")
    code = (
        "from videomamba import checks, doctor\n"
        "doctor.CHECKS = (checks.python, checks.media, checks.retrieval, checks.room)\n"
        "import typer; typer.run(doctor.doctor)\n"
    )
    done = python("-c", code, PYTHONPATH=f"{tmp_path}:{ROOT}", PATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "broken" in lines["faiss-cpu"]
    assert "libcublas.so.12" in lines["faiss-cpu"]
    assert "pip install --force-reinstall faiss-cpu" in done.stdout
    assert "pip install imageio-ffmpeg" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("needs what is missing: ffmpeg, faiss-cpu.")


def test_only_what_is_needed_makes_a_machine_unfit():
    absent = Finding("GPU", "absent", "none")
    assert healthy([absent, Finding("torch", "works", "2.13", needed=True)])
    assert not healthy([absent, Finding("torch", "broken", "…", needed=True)])
