"""Which backend a tensor gets, what is said where one is missing, and how fast each is."""

import pytest
import torch

from configs.errors import UserError
from pretrain.ops import backends, causal_conv1d, selection, selective_scan, speed_check


def pretend(monkeypatch, **reasons):
    """As if the named backends were missing for these reasons ("" for present)."""
    found = {"cpu": "", "triton": selection.NO_GPU, "mamba_ssm": selection.NO_GPU, "reference": ""} | reasons
    monkeypatch.setattr(selection, "why_missing", found.get)


def scan_something(**options):
    x, A = torch.ones(1, 5, 4, dtype=options.pop("dtype", torch.float32)), -torch.ones(4, 2)
    return selective_scan(x, x, A, x[..., :2], x[..., 2:], **options)


def test_the_order_of_auto(monkeypatch):
    def chosen(device, dtype=torch.float32):
        return selection.choose_backend("auto", device, dtype)

    pretend(monkeypatch, triton="", mamba_ssm="")
    assert chosen("cpu") == "cpu"
    assert chosen("cuda") == "triton"
    assert chosen("mps") == "reference"
    assert chosen("cuda", torch.float64) == "reference"
    assert [s.name for s in backends() if s.default] == ["cpu"]
    pretend(monkeypatch, triton="broken", mamba_ssm="")
    assert chosen("cuda") == "mamba_ssm"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen("cuda") == "reference", "mamba-ssm's function is no operator"


def test_a_gpu_without_kernels_is_told_what_mends_it(monkeypatch, caplog):
    selection.warn_slow_gpu.cache_clear()
    pretend(monkeypatch, triton="triton is not installed", mamba_ssm="mamba-ssm is not installed")
    for _ in range(2):
        assert selection.choose_backend("auto", "cuda", torch.float32) == "reference"
    assert len(caplog.records) == 1
    assert "triton: triton is not installed; mamba_ssm: mamba-ssm is not installed" in caplog.text


def test_the_environment_takes_the_place_of_auto_alone(monkeypatch):
    pretend(monkeypatch, cpu="no C++ compiler")
    monkeypatch.setenv("VIDEOMAMBA_OPS", "cpu")
    with pytest.raises(UserError, match="backend cpu does not run here: no C\\+\\+ compiler") as refused:
        scan_something()
    assert refused.value.cure == "apt-get install g++, or use backend=auto."
    assert scan_something(backend="reference").isfinite().all()
    monkeypatch.setenv("VIDEOMAMBA_OPS", "reference")
    assert scan_something().isfinite().all()
    assert [s.name for s in backends() if s.default] == ["reference"]
    monkeypatch.setenv("VIDEOMAMBA_OPS", "cuda")
    for call in (scan_something, backends):
        with pytest.raises(UserError, match="no scan backend 'cuda', which VIDEOMAMBA_OPS names"):
            call()


@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_a_backend_for_gpus_is_refused_without_one(backend, monkeypatch):
    pretend(monkeypatch)
    for call in (scan_something, lambda backend: causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 4), backend=backend)):
        with pytest.raises(UserError, match=f"{backend} does not run here: there is no NVIDIA GPU"):
            call(backend=backend)
    pretend(monkeypatch, **{backend: ""})
    with pytest.raises(ValueError, match=r"takes float32, bfloat16 and float16 on cuda, not torch.float32 on cpu"):
        scan_something(backend=backend)


def test_a_type_that_kernels_do_not_take(monkeypatch):
    pretend(monkeypatch)
    with pytest.raises(ValueError, match=r"not torch\.float64 on cpu"):
        scan_something(backend="cpu", dtype=torch.float64)
    assert scan_something(dtype=torch.float64).dtype == torch.float64


def test_what_would_mend_a_missing_backend(monkeypatch):
    pretend(monkeypatch, cpu="no C++ compiler", mamba_ssm="mamba-ssm is not installed")
    cures = {s.name: s.cure for s in backends()}
    assert cures["cpu"] == "apt-get install g++"
    assert "pip install --no-build-isolation mamba-ssm" in cures["mamba_ssm"]
    assert cures["triton"] == "", "no command puts a GPU into a machine"
    assert cures["reference"] == ""


def test_speed_is_measured(monkeypatch):
    ran = [status.name for status in backends() if status.available]
    assert "reference" in ran
    for backend in ran:
        assert 0 < speed_check(backend, 0.01) < 20
    pretend(monkeypatch, cpu="no C++ compiler")
    with pytest.raises(UserError, match="does not run here"):
        speed_check("cpu")
