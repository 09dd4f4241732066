"""Writing tensors to a safetensors file, one at a time and at a pace, and hashing them on the way.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, little-endian; the
header, with type, shape and place of each tensor; the tensors' bytes in that order. The library's own writer wants all
tensors in memory at once, and the file read again for its hash.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CHUNK = 2**22
"""Bytes written and hashed together."""


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: what the header of a file says of it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Pace:
    """Lets no more than `mb_s` MB (10^6 bytes) a second through, over all it is told of; None lets everything."""

    def __init__(self, mb_s: float | None = None) -> None:
        self.bytes_s = None if mb_s is None else mb_s * 1e6
        self.chunk = CHUNK if self.bytes_s is None else max(512, min(CHUNK, int(self.bytes_s / 20)))
        self._began: float | None = None
        self._passed = 0

    def passed(self, size: int) -> None:
        """`size` more bytes went through; sleeps for as long as they were too early."""
        if (bytes_s := self.bytes_s) is None:
            return
        if self._began is None:
            self._began = time.monotonic()
        self._passed += size
        time.sleep(max(0.0, self._began + self._passed / bytes_s - time.monotonic()))

    def release(self) -> None:
        """From now on, let everything through: somebody waits. Another thread may ask for it."""
        self.bytes_s = None


def write_tensors(path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor], pace: Pace | None = None) -> str:
    """Write what `entries` announce, in that order, and bring it to the disk; returns the file's sha256 in hex.

    A tensor is asked for when its turn comes, and forgotten when it is written. Raises OSError.
    """
    pace = pace or Pace()
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: memoryview | bytes) -> None:
            for start in range(0, len(data), pace.chunk):
                part = data[start : start + pace.chunk]
                file.write(part)
                digest.update(part)
                pace.passed(len(part))

        put(_header(entries))
        for entry, tensor in zip(entries, tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == (entry.shape, entry.dtype), entry
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            put(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(entries: Sequence[Entry]) -> bytes:
    tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.bytes
        tree[entry.name] = {"dtype": TYPES[entry.dtype], "shape": entry.shape, "data_offsets": (begin, end)}
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def entries_of(named: dict[str, Tensor]) -> list[Entry]:
    """What a state dict's tensors are."""
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()]
