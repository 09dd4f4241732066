"""Compiling the kernels: once for all processes, never half, and the reference where it cannot be done."""

import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from pretrain.ops import backends, build, causal_conv1d, selection, selective_scan

ROOT = Path(__file__).parents[2]
# A child only runs a compiler, so it need not import torch a second time.
fork = multiprocessing.get_context("fork")

# A stand-in for the compiler, as slow as one wants: it answers the probe, and "compiles" by writing a file slowly.
SLOW_COMPILER = """#!/bin/sh
case "$*" in
  *-dM*) echo '#define __VERSION__ "1"' ;;
  *) echo $$ >> "{calls}"; for last; do :; done; printf half > "$last"; sleep {seconds}; printf whole > "$last" ;;
esac
"""
FAILING_COMPILER = """#!/bin/sh
case "$*" in *-dM*) exit 0 ;; esac
echo "x.h:1: fatal error: no room" >&2
echo "compilation terminated." >&2
exit 1
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDEOMAMBA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ops"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """`compiler(script)` puts a program of that text in the compiler's place."""

    def install(script):
        program = tmp_path / "c++"
        program.write_text(script)
        program.chmod(0o755)
        monkeypatch.setenv("CXX", str(program))

    return install


@pytest.fixture
def fresh_process():
    """As if nothing had been loaded or said yet."""

    def forget():
        selection.load_cpu_kernels.cache_clear()
        selection.warn_slow.cache_clear()

    forget()
    yield
    forget()


def build_in_child(results):
    os.setsid()
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("pretrain.ops.build").addHandler(handler)
    logging.getLogger("pretrain.ops.build").setLevel(logging.INFO)
    results.put((build.build(), messages))


def start(count):
    results = fork.Queue()
    children = [fork.Process(target=build_in_child, args=(results,)) for _ in range(count)]
    for child in children:
        child.start()
    return children, results


def test_several_processes_share_one_build(cache, compiler, tmp_path):
    compiler(SLOW_COMPILER.format(calls=tmp_path / "calls", seconds=1))
    children, results = start(3)
    built = [results.get(timeout=60) for _ in children]
    libraries = {library for library, _ in built}
    assert len(libraries) == 1
    assert libraries.pop().read_text() == "whole"
    assert len((tmp_path / "calls").read_text().split()) == 2, "one call to compile, one to link"
    said = [message for _, messages in built for message in messages]
    assert sum(message.startswith("compiling the CPU kernels, once, about") for message in said) == 1
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".so"]


def test_a_killed_build_blocks_nothing(cache, compiler, tmp_path):
    compiler(SLOW_COMPILER.format(calls=tmp_path / "calls", seconds=60))
    children, _ = start(1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "calls").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(children[0].pid, signal.SIGKILL)
    children[0].join()
    assert not list(cache.glob("*.so")), "half a library under its final name"
    assert any(path.is_dir() for path in cache.iterdir()), "the test was too slow to kill a build at work"

    compiler(SLOW_COMPILER.format(calls=tmp_path / "calls", seconds=0))
    began = time.monotonic()
    assert build.build().read_text() == "whole"
    assert time.monotonic() - began < 30
    assert not any(path.is_dir() for path in cache.iterdir())


def run_scan():
    x, A = torch.ones(1, 20, 8), -torch.ones(8, 4)
    for _ in range(2):
        y = selective_scan(causal_conv1d(x, torch.ones(8, 4)), x, A, x[..., :4], x[..., 4:])
    return y


def test_without_a_compiler_the_reference_serves_and_says_so_once(monkeypatch, tmp_path, caplog, fresh_process):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert run_scan().isfinite().all()
    assert len(caplog.records) == 1
    for part in ("no C++ compiler", "times slower", "apt install g++"):
        assert part in caplog.text
    status = {s.name: (s.available, s.default) for s in backends()}
    assert status["cpu"] == (False, False)
    assert status["reference"] == (True, True)
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        selective_scan(*[torch.zeros(1, 2, 4)] * 2, torch.zeros(4, 2), *[torch.zeros(1, 2, 2)] * 2, backend="cpu")


def test_a_failing_compiler_is_quoted(cache, compiler, caplog, fresh_process):
    compiler(FAILING_COMPILER)
    assert run_scan().isfinite().all()
    assert len(caplog.records) == 1
    assert "x.h:1: fatal error: no room" in caplog.text
    assert not list(cache.glob("*.so"))


def test_a_library_that_does_not_load_is_not_fatal(cache, compiler, tmp_path, caplog, fresh_process):
    compiler(SLOW_COMPILER.format(calls=tmp_path / "calls", seconds=0))
    assert run_scan().isfinite().all()
    assert "the compiled library does not load" in caplog.text


def test_an_unusable_cache_is_not_fatal(monkeypatch, compiler, tmp_path, caplog, fresh_process):
    compiler(SLOW_COMPILER.format(calls=tmp_path / "calls", seconds=0))
    monkeypatch.setenv("VIDEOMAMBA_CACHE", str(tmp_path / "c++"))  # a file
    assert run_scan().isfinite().all()
    assert "cannot be used" in caplog.text


def test_the_reference_can_be_forced(monkeypatch, tmp_path, caplog, fresh_process):
    monkeypatch.setenv("VIDEOMAMBA_OPS", "reference")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert run_scan().isfinite().all()
    assert not caplog.records


def test_unknown_backend_is_named():
    with pytest.raises(UserError, match="no scan backend 'cuda'"):
        causal_conv1d(torch.zeros(1, 4, 8), torch.zeros(8, 4), backend="cuda")


def test_key_tells_sources_apart(monkeypatch, tmp_path):
    toolchain = build.Toolchain("g++", (), "")
    keys = {build.library_key(toolchain)}
    monkeypatch.setattr(build, "SOURCES", shutil.copytree(build.SOURCES, tmp_path / "csrc"))
    keys.add(build.library_key(toolchain))
    assert len(keys) == 1, "where the sources lie is not part of the key"
    with (tmp_path / "csrc" / "scan.h").open("a") as header:
        header.write("// one more line\n")
    assert build.library_key(toolchain) not in keys


def test_the_library_does_not_know_python():
    """One library for every version of Python: it asks torch and the system alone for what it needs."""
    sources = "".join(path.read_text() for path in build.SOURCES.iterdir())
    assert not re.search(r"#include <(Python|torch/extension|pybind11)", sources)
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler: install g++")
    library = build.build().read_bytes()
    assert not re.search(rb"\0_?Py[A-Za-z]*_\w+\0", library), "a symbol of Python's own"
    assert b"\0libtorch_cpu" in library
    for needed in (b"\0libpython", b"\0libtorch_python"):
        assert needed not in library


def test_key_tells_machines_apart(monkeypatch):
    def key(macros="", options=("-march=native",), compiler="g++"):
        return build.library_key(build.Toolchain(compiler, options, macros))

    keys = {key(), key("#define __AVX512F__ 1"), key(options=()), key(compiler="clang++")}
    monkeypatch.setattr(build.torch, "__version__", "0.0")
    assert len(keys | {key()}) == 5


def test_vector_width_follows_the_compiler():
    def option(*names):
        return build.vector_options("".join(f"#define {name} 1\n" for name in names))[0]

    assert option(*build.AVX512, *build.AVX2) == "-DCPU_CAPABILITY=AVX512"
    assert option(*build.AVX512[:2], *build.AVX2) == "-DCPU_CAPABILITY=AVX2"
    assert option("__AVX2__") == "-DCPU_CAPABILITY=DEFAULT"


# Drops -march=native and puts the options of a lesser machine in its place.
LESSER_COMPILER = """#!/bin/sh
for word; do shift; [ "$word" = -march=native ] || set -- "$@" "$word"; done
exec {compiler} {options} "$@"
"""


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the options are those of x86-64")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler: install g++")
@pytest.mark.parametrize("options", ["-mavx2 -mfma -mf16c", "-msse2"])
def test_other_vector_widths(options, compiler, cache):
    """The same numbers on kernels compiled for lesser CPUs."""
    compiler(LESSER_COMPILER.format(compiler=shutil.which("g++") or shutil.which("clang++"), options=options))
    files = [str(ROOT / "tests" / "pretrain" / f"test_ops_{name}.py") for name in ("agreement", "scan", "conv")]
    chosen = ["-k", "cpu or finite or extreme or nan"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *files],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout
    assert list(cache.glob("*.so"))
