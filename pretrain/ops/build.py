"""Compile the C++ kernels at first use, once for all ranks, into a cache that outlives the process.

No build tool and no Python.h: one call of g++ or clang++ against torch's own headers, one to link. The result's name
holds a digest of the sources, torch, the compiler and what it compiles for, so that a home shared by machines with
different CPUs holds one library for each.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
USUAL_SECONDS = 15
AVX512 = ("__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__")
AVX2 = ("__AVX2__", "__FMA__", "__F16C__")


class BuildError(Exception):
    """The kernels could not be compiled; says why, in one line."""


@dataclass(frozen=True)
class Toolchain:
    """A compiler, the options it is called with, and a text that tells one from another."""

    compiler: str
    options: tuple[str, ...]
    identity: str


def cache_folder() -> Path:
    """Where compiled kernels are kept: $VIDEOMAMBA_CACHE, else $XDG_CACHE_HOME/videomamba, with `ops` added."""
    named = os.environ.get("VIDEOMAMBA_CACHE")
    if named:
        return Path(named) / "ops"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "videomamba" / "ops"


def find_toolchain(target: tuple[str, ...] | None = None) -> Toolchain:
    """The first of $CXX, g++ and clang++ that is here, compiling for this machine's CPU or for the given `target`."""
    asked = os.environ.get("CXX")
    compiler = next((found for name in (asked, "g++", "clang++") if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise BuildError("no C++ compiler (g++ or clang++) is installed")
    for options in (target,) if target is not None else (("-march=native",), ("-mcpu=native",), ()):
        probe = subprocess.run(
            [compiler, *options, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False
        )
        if probe.returncode == 0:
            # The predefined macros name the compiler's version and every instruction set that it will use.
            return Toolchain(compiler, (*options, *vector_options(probe.stdout)), probe.stdout)
    raise BuildError(f"{compiler} does not run: {_last_line(probe.stderr)}")


def vector_options(macros: str) -> tuple[str, ...]:
    """Which of ATen's vector types to compile with, so that their width is the machine's; from predefined macros."""
    defined = {line.split()[1] for line in macros.splitlines() if line.startswith("#define ")}
    for name, needed in (("AVX512", AVX512), ("AVX2", AVX2)):
        if defined.issuperset(needed):
            return (f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}")
    return ("-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT")


def library_key(toolchain: Toolchain) -> str:
    """The digest that names a compiled library."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(repr((torch.__version__, toolchain)).encode())
    return digest.hexdigest()[:20]


def build(toolchain: Toolchain | None = None) -> Path:
    """The compiled library, from the cache or made now. Other processes that want it wait; BuildError if it fails."""
    toolchain = toolchain or find_toolchain()
    key = library_key(toolchain)
    library = cache_folder() / f"{key}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _alone(library.with_suffix(".lock")):
            if not library.exists():
                _remove_leftovers(library.parent, key)
                _compile_announced(toolchain, library)
    except OSError as error:
        raise BuildError(f"the cache folder {library.parent} cannot be used: {error}") from error
    return library


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock that the system releases when its holder dies, however it dies."""
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process to finish compiling the CPU kernels")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks: the worst is that two processes do the same work
            log.debug("no lock on %s: %s", lock, error)
        yield


def _remove_leftovers(folder: Path, key: str) -> None:
    """What a build that was killed left behind; called under the lock, so that no live build loses its folder."""
    for leftover in folder.glob(f"{key}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _compile_announced(toolchain: Toolchain, library: Path) -> None:
    log.info("compiling the CPU kernels, once, about %d s (kept in %s)", USUAL_SECONDS, library.parent)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{library.stem}-", dir=library.parent) as folder:
        compiled = _compile(toolchain, Path(folder))
        compiled.replace(library)
    log.info("compiled the CPU kernels in %.0f s", time.monotonic() - began)


def _compile(toolchain: Toolchain, folder: Path) -> Path:
    home = Path(torch.__file__).parent
    objects, library = folder / "library.o", folder / "library.so"
    openmp = ["-fopenmp"] if torch.backends.openmp.is_available() else []
    shared = ["-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", *toolchain.options]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    include = ["-isystem", str(home / "include")]
    _call([toolchain.compiler, *shared, *openmp, abi, *include, "-c", str(SOURCES / "library.cpp"), "-o", str(objects)])
    # gcc's OpenMP calls are left open, to be found in the runtime that torch brings: linking the system's would give
    # the process two pools of threads, and torch.set_num_threads would not reach ours.
    threads = openmp if "__clang__" in toolchain.identity else []
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    link = [*threads, *undefined, f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(library)]
    _call([toolchain.compiler, "-shared", str(objects), *link])
    return library


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        log.debug("%s\n%s", " ".join(command), done.stderr)
        raise BuildError(f"{Path(command[0]).name} failed: {_error_line(done.stderr) or f'exit {done.returncode}'}")


def _error_line(output: str) -> str:
    errors = [line for line in output.splitlines() if "error" in line]
    return errors[0].strip() if errors else _last_line(output)


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
