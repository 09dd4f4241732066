"""Tests whose bodies run on the CPU too, so that they stay right where no GPU is: only the GPU's turn is marked gpu."""

import pytest
import torch

from pretrain.ops import backends
from tests.pretrain.conftest import corpora, runs, stage1_tree, teacher_folder

__all__ = ["backend", "corpora", "device", "runs", "stage1_tree", "teacher_folder"]

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"))
BACKENDS = {"cpu": "cpu", "triton": "cuda", "mamba_ssm": "cuda"}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    """The CPU, and the GPU."""
    return request.param


@pytest.fixture(params=[pytest.param(name, marks=GPU if on == "cuda" else ()) for name, on in BACKENDS.items()])
def backend(request):
    """A backend of the scan that runs here, with the device that it is for."""
    status = next(status for status in backends() if status.name == request.param)
    if not status.available:
        pytest.skip(f"{status.name}: {status.reason}")
    return request.param, BACKENDS[request.param]
