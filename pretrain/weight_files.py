"""Read a file that somebody published, without running anything in it: torch pickles and safetensors.

A torch file is a pickle, and a pickle may name any function of any program to be called. `weights_only=True` lets
none be called but torch's own builders of tensors. Training files also hold their arguments and configs, as objects
of classes that are not here (`argparse.Namespace`, an EasyDict); such names are looked up beforehand and given empty
stand-ins, so that the weights beside them can be read and the classes themselves are never imported.
"""

import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import UserError

State = dict[str, Tensor]

WRAPPERS = ("model", "module", "state_dict", "model_state_dict")
"""Keys under which training programs keep the weights, beside the optimizer, the epoch and the rest."""

DAMAGED = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError,
           AssertionError, OSError, struct.error)  # fmt: skip
"""What torch.load raises on bytes that are no checkpoint, or half of one."""


RUNNERS = re.compile(
    r"(os|posix|nt|sys|subprocess|commands|pty|socket|importlib|runpy|ctypes|webbrowser)\."
    r"|(builtins|__builtin__)\.(eval|exec|compile|open|getattr|__import__)$"
)
"""Functions that no published checkpoint names, and that one made to harm would; pickles may use Python 2's names."""


class Source(NamedTuple):
    """The tensors of a file by their names there, and what stood beside them and was not read."""

    path: Path
    tensors: State
    beside: tuple[str, ...] = ()
    """Keys next to the weights, such as optimizer, epoch and args."""
    unread: tuple[str, ...] = ()
    """Classes of other programs that the file names; nothing of them was loaded or run."""


class _Rebuilt:
    """What calling a stand-in gives: takes any state and keeps none."""

    def __setstate__(self, state: object) -> None:
        """Forget it."""


class _Called(type):
    def __call__(cls, *_arguments: Any, **_named: Any) -> Any:
        return _Rebuilt()


class _StandIn(metaclass=_Called):
    """In place of a class that is not here. Made by `__new__` it is a mapping, since torch fills no other kind."""

    def __new__(cls, *_arguments: Any) -> Any:
        return OrderedDict()


@dataclass(frozen=True)
class _Kind:
    """What the first bytes of a file that is no checkpoint say it is, and what to do."""

    what: str
    cure: str


_FETCH = "Fetch the file itself (on a hub: the download link, not the page) and give that."
_NOT_WEIGHTS = (
    (b"<", _Kind("a web page that was saved under this name", _FETCH)),
    (b"version https://git-lfs", _Kind("a Git LFS pointer, not the file it points to", "Run `git lfs pull` there.")),
    (b"{", _Kind("JSON text, not weights", "Give the file of weights beside it.")),
    (b"\x1f\x8b", _Kind("compressed with gzip", "Unpack it first with gunzip.")),
)


def read(path: str | Path) -> Source:
    """The weights in a .pth, .pt, .bin or .safetensors file, on the CPU (a torch file's stay on disk until used).

    Raises UserError: no such file, a page or pointer saved under its name, a truncated file, no tensors in it.
    """
    path = Path(path)
    start = _first_bytes(path)
    if _is_safetensors(path, start):
        return _read_safetensors(path)
    for magic, kind in _NOT_WEIGHTS:
        if start.lstrip().startswith(magic):
            raise UserError(f"{path} is {kind.what}.", kind.cure)
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise UserError(f"{path} is neither a torch file nor safetensors: it begins with {start[:8]!r}.", _FETCH)
    return _read_torch(path, zipped=start.startswith(b"PK"))


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        ours = (path / "meta.json").is_file() or (path / "checkpoints").is_dir()
        cure = "It is one of ours: use it as it stands (init=, checkpoint=)." if ours else "Give a file inside it."
        raise UserError(f"{path} is a folder, not a published file.", cure)
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.", "Mend the path.") from error
    if not start:
        raise UserError(f"{path} is empty.", "Fetch it again.", exit_code=1)
    return start


def _is_safetensors(path: Path, start: bytes) -> bool:
    """By its name, or by a header's length followed by a JSON header."""
    return path.suffix == ".safetensors" or (len(start) > 8 and start[8:9] == b"{" and not start.startswith(b"PK"))


def _read_safetensors(path: Path) -> Source:
    try:
        return Source(path, _plain(load_file(path)))
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def _read_torch(path: Path, zipped: bool) -> Source:
    try:
        unread = tuple(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))) if zipped else ()
        _refuse_runners(path, unread)
        stand_ins: list[Any] = [(_StandIn, name) for name in {*unread, "argparse.Namespace"}]
        with torch.serialization.safe_globals([*stand_ins, _Rebuilt]):
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except DAMAGED as error:
        raise _damaged(path, str(error)) from error
    tensors, beside = _weights(tree, path)
    return Source(path, tensors, beside, unread)


def _refuse_runners(path: Path, named: tuple[str, ...]) -> None:
    runners = [name for name in named if RUNNERS.match(name)]
    if runners:
        raise UserError(
            f"{path} asks for {', '.join(runners)} to be called when it is read; that is no checkpoint but a program, "
            "and nothing of it was run.",
            "Do not use this file; fetch the published one from its own page.",
            exit_code=1,
        )


def _damaged(path: Path, said: str) -> UserError:
    size = path.stat().st_size / 2**20
    first = " ".join(said.split(". ")[0].split())[:160] or "it ends too early"
    return UserError(
        f"{path} ({size:.1f} MiB) is damaged or was not fetched whole: {first}.",
        "Fetch it again and compare its size with the one published.",
        exit_code=1,
    )


def _weights(tree: Any, path: Path) -> tuple[State, tuple[str, ...]]:
    """The state dict inside what a file held, and the names of what stood beside it."""
    beside: list[str] = []
    while isinstance(tree, Mapping) and not any(isinstance(value, Tensor) for value in tree.values()):
        key = next((key for key in WRAPPERS if isinstance(tree.get(key), Mapping)), None)
        if key is None:
            break
        beside += [str(name) for name in tree if name != key]
        tree = tree[key]
    if not isinstance(tree, Mapping) or not any(isinstance(value, Tensor) for value in tree.values()):
        held = (
            f"keys {', '.join(map(str, list(tree)[:6]))}" if isinstance(tree, Mapping) else f"a {type(tree).__name__}"
        )
        raise UserError(
            f"{path} holds no weights by name: {held}.", f"Give a state dict, plain or under {', '.join(WRAPPERS)}."
        )
    odd = [f"{name} ({type(value).__name__})" for name, value in tree.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(f"{path} has what is no tensor among its weights: {', '.join(odd[:6])}.", "Save them apart.")
    return _plain(dict(tree)), tuple(beside)


def _plain(tensors: Mapping[str, Tensor]) -> State:
    """Names without the `module.` that a distributed wrapper puts before all of them."""
    wrapped = bool(tensors) and all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in tensors.items()}
