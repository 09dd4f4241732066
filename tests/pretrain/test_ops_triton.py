"""The Triton backend without a GPU: its kernels in the interpreter, and compiled for one that is not here."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from pretrain.ops import operators
from tests.pretrain.scan_cases import draw

HERE = Path(__file__).parent

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install -c constraints.txt triton", allow_module_level=True)


def interpret(python, marks):
    quietly = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    program = str(HERE / "interpreted_triton.py")
    done = python("-m", "pytest", *quietly, "-m", marks, program, timeout=800, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@pytest.mark.timeout(400)
def test_the_kernels_in_the_interpreter(python):
    assert interpret(python, "not slow") > 30


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_kernels_in_the_interpreter_at_length(python):
    assert interpret(python, "slow") == 12


class Recorder:
    """Stands where a kernel is called, and keeps what it is called with."""

    def __getitem__(self, grid):
        self.programs = grid[0]
        return self

    def __call__(self, *arguments, num_warps=4, **constants):
        self.arguments, self.constants, self.num_warps = arguments, constants, num_warps


def recorded(monkeypatch, name, call):
    """What the launcher gives the kernel of that name."""
    from pretrain.ops import triton_launch

    recorder = Recorder()
    monkeypatch.setattr(triton_launch, name, recorder)
    call(triton_launch)
    return recorder


def compiled_for_hopper(kernel, call):
    """The kernel compiled for sm_90 with the types, strides and constants of that call."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    given = dict(zip(kernel.arg_names, call.arguments, strict=False)) | call.constants
    signature, constants = {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name] = types[value.dtype]
        elif value is None or name in call.constants:
            signature[name], constants[(index,)] = "constexpr", value
        else:
            signature[name] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": call.num_warps})


def scan_arguments(dtype):
    u, delta, A, B, C, D, z, bias = (x.float() for x in draw(2, 19, 40, 16, True, True, True, True))
    return u.to(dtype), delta.to(dtype), A, B, C, D, z.to(dtype), bias


def forward_scan(launch):
    launch.scan_forward(*scan_arguments(torch.bfloat16), True, False, True, True)


def forward_scan_bare(launch):
    u, delta, A, B, C, *_ = scan_arguments(torch.float32)
    launch.scan_forward(u, delta, A, B, C, None, None, None, False, True, False, False)


def backward_scan(launch):
    states, last = torch.zeros(2, 1, 16, 40), torch.zeros(2, 40, 16)
    inputs = scan_arguments(torch.bfloat16)
    launch.scan_backward(inputs[0], last, states, *inputs, True, True)


def forward_conv(launch):
    launch.conv_forward(torch.zeros(2, 19, 40).half(), torch.zeros(40, 4), torch.zeros(40), False, True)


def backward_conv(launch):
    x = torch.zeros(2, 19, 40).bfloat16()
    launch.conv_backward(x, x, torch.zeros(40, 4), torch.zeros(40), True, True)


@pytest.mark.parametrize(
    "name, call",
    [
        ("scan_forward_kernel", forward_scan),
        ("scan_forward_kernel", forward_scan_bare),
        ("scan_backward_kernel", backward_scan),
        ("conv_forward_kernel", forward_conv),
        ("conv_backward_kernel", backward_conv),
    ],
)
def test_what_the_launcher_starts_compiles_for_hopper(name, call, monkeypatch):
    from pretrain.ops import triton_launch

    kernel = getattr(triton_launch, name)
    binary = compiled_for_hopper(kernel, recorded(monkeypatch, name, call))
    assert binary.asm["cubin"][:4] == b"\x7fELF"
    assert ".target sm_90" in binary.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", binary.asm["ptx"]), "sums must not depend on who comes first"


def test_cuda_tensors_would_reach_the_kernels():
    """The operators have an implementation for CUDA, and it is the launcher."""
    for name in ("scan_forward", "scan_backward", "conv_forward", "conv_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{operators.NAMESPACE}::{name}", "CUDA")


def test_every_program_writes_its_own_place(monkeypatch):
    """One program for each sample and block of channels; blocks shrink as states grow, for registers to suffice."""
    for states, block in ((1, 128), (5, 64), (16, 32), (64, 8), (1024, 1)):
        inputs = [x.float() for x in draw(3, 2, 130, states, False, False, False, True)[:5]]

        def call(launch, inputs=inputs):
            launch.scan_forward(*inputs, None, None, None, True, False, True, True)

        started = recorded(monkeypatch, "scan_forward_kernel", call)
        assert started.constants["BLOCK"] == block
        assert started.programs == 3 * -(-130 // block)
