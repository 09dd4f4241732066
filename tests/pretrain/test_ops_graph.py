"""The encoder as torch.compile and torch.export see it: one graph, the same gradients, and nothing of ours inside."""

import json
import shutil
import site
import subprocess
import sys

import pytest
import torch
from torch import nn

from pretrain.models.config import VisionConfig
from pretrain.models.videomamba import VideoMamba
from pretrain.ops import causal_conv1d, selective_scan
from pretrain.ops.quick_reference import graph_scan
from pretrain.ops.reference import sequential_scan
from tests.pretrain.scan_cases import CASES, draw, run, worst_error


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def encoder(**options):
    torch.manual_seed(0)
    sizes = {"depth": 1, "width": 16, "patch_size": 8, "tubelet": 2, "frames": 4, "image_size": 32, "d_state": 4}
    return VideoMamba(VisionConfig(**sizes | options))


def clips(batch=2, frames=4, size=32):
    return torch.randn(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case, reverse", [(CASES[0], True), (CASES[3], False), (CASES[3], True), (CASES[4], True)])
def test_the_form_for_graphs_agrees(case, reverse):
    expected = run(sequential_scan, draw(*case), torch.float64, reverse, case[-1])
    name, error = worst_error(run(graph_scan, draw(*case), torch.float64, reverse, case[-1]), expected)
    assert error < 1e-12, name


def training_step(call, model):
    """The gradients of every parameter from a loss that is far from flat."""
    model.zero_grad()
    tokens = call(clips()).tokens_BLD
    (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def compile_and_compare(backend):
    model = encoder().train()
    expected = training_step(model, model)
    ours = training_step(torch.compile(model, fullgraph=True, backend=backend), model)
    errors = {name: ((ours[name] - g).norm() / g.norm()).item() for name, g in expected.items() if g.norm() > 0}
    assert len(errors) > 20
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)


@pytest.mark.parametrize("kernels", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
def test_a_training_step_in_one_graph(kernels, monkeypatch):
    monkeypatch.setenv("VIDEOMAMBA_OPS", kernels)
    compile_and_compare("aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor asks for a C++ compiler")
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_training_step_by_inductor(kernels, monkeypatch):
    monkeypatch.setenv("VIDEOMAMBA_OPS", kernels)
    compile_and_compare("inductor")


class Tokens(nn.Module):
    """The encoder with a tensor for its output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, clips):
        return self.model(clips).tokens_BLD


def exported(model, *inputs):
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(Tokens(model.eval()), inputs, dynamic_shapes=({0: batch},))


def graphs(program):
    """The program's graph and those of its loops' bodies."""
    return [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]


RUN_ALONE = """
import importlib.util, json, sys
sys.path += json.loads(sys.argv[1])
assert all(importlib.util.find_spec(name) is None for name in ("pretrain", "videomamba", "configs"))
import torch
program = torch.export.load(sys.argv[2])
for clips, tokens in torch.load(sys.argv[3]):
    torch.testing.assert_close(program.module()(clips), tokens, rtol=1e-4, atol=1e-5)
"""


class Scan(nn.Module):
    """What a mixer does, without the mixer."""

    def forward(self, x):
        u = causal_conv1d(x, torch.ones(6, 4))
        return selective_scan(u, x, -torch.ones(6, 2), x[..., :2], x[..., 2:4], None, x, None, True)


def test_an_exported_graph_holds_no_operator_of_ours():
    x = torch.randn(3, 19, 6)
    dimensions = ({0: torch.export.Dim("batch"), 1: torch.export.Dim.STATIC},)
    program = torch.export.export(Scan(), (x,), dynamic_shapes=dimensions)
    assert not any("videomamba" in str(node.target) for graph in graphs(program) for node in graph.nodes)
    for given in (x, x[:2].exp()):
        torch.testing.assert_close(program.module()(given), Scan()(given), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_exported_encoder_runs_where_we_are_not_installed(tmp_path):
    """Another process, without our packages (nor the .pth file that an editable installation leaves), other batches."""
    model = encoder()
    program = exported(model, clips(2))
    assert not any("videomamba" in str(node.target) for graph in graphs(program) for node in graph.nodes)
    torch.export.save(program, tmp_path / "encoder.pt2")
    with torch.no_grad():
        pairs = [(given, model(given).tokens_BLD) for given in (clips(1), clips(5))]
    torch.save(pairs, tmp_path / "pairs.pt")
    arguments = [json.dumps(site.getsitepackages()), str(tmp_path / "encoder.pt2"), str(tmp_path / "pairs.pt")]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN_ALONE, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def largest_value(program):
    """Elements of the largest tensor in the program's graphs, weights included."""
    values = (node.meta.get("val") for graph in graphs(program) for node in graph.nodes)
    return max(value.numel() for value in values if isinstance(value, torch.Tensor))


@pytest.mark.slow
def test_an_exported_graph_stays_small_for_longer_clips():
    """Eight times the tokens: the same graph, and in it no tensor with a state for every token."""
    sizes = {"image_size": 64, "d_state": 32, "tubelet": 1}
    few, many = (
        torch.export.export(Tokens(encoder(frames=frames, **sizes).eval()), (clips(2, frames, 64),))
        for frames in (2, 16)
    )
    counts = [sum(len(graph.nodes) for graph in graphs(program)) for program in (few, many)]
    assert counts[0] == counts[1]
    tokens, inner, states = 1 + 16 * 64, 2 * 16, 32
    assert largest_value(many) < 2 * tokens * inner * states / 4
