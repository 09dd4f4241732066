"""Randomness that belongs to a sample: a counter-based generator, the same numbers in numpy and in torch.

Every number is a pure function of (seed, stream, counter), so it depends on no rank, worker or call order.
A 64-bit key is the seed mixed with the stream's name; number i is the finaliser of splitmix64 applied to
key + (i + 1) * GOLDEN (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
Uniforms take the top 24 bits, which float32 holds exactly, so both libraries and all devices agree.
torch has no unsigned 64-bit arithmetic: its int64 products wrap as needed, and logical shifts are a shift and a mask.

Letters: B samples, n things to order.
"""

import hashlib
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLY_1 = 0xBF58476D1CE4E5B9
MULTIPLY_2 = 0x94D049BB133111EB
MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


@lru_cache(maxsize=4096)
def name_hash(name: str) -> int:
    """The 64 bits (0 to 2**64 - 1) that stand for a stream's name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _mix(bits: UInt64Array) -> UInt64Array:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(MULTIPLY_1)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(MULTIPLY_2)
    return bits ^ (bits >> np.uint64(31))


def _as_bits(part: Any) -> UInt64Array:
    if isinstance(part, str):
        return np.array([name_hash(part)], dtype=np.uint64)
    if isinstance(part, int):
        return np.array([part & MASK], dtype=np.uint64)
    return np.atleast_1d(np.asarray(part)).astype(np.int64).view(np.uint64)


@overload
def derive(seed: int, *parts: int | str) -> int: ...  # type: ignore[overload-overlap]
@overload
def derive(seed: int | npt.NDArray[Any], *parts: int | str | npt.NDArray[Any]) -> Int64Array: ...
def derive(seed: int | npt.NDArray[Any], *parts: int | str | npt.NDArray[Any]) -> int | Int64Array:
    """A new seed from `seed` and what it is for: an int for plain arguments, an int64 array (broadcast) for arrays.

    The order of the parts matters; equal arguments give equal seeds in every process and on every machine.
    """
    state = _as_bits(seed)
    for part in parts:
        state = _mix((state ^ _mix(_as_bits(part) + np.uint64(GOLDEN))) + np.uint64(GOLDEN))
    signed = state.view(np.int64)
    plain = all(isinstance(value, (int, str)) for value in (seed, *parts))
    return int(signed[0]) if plain else signed


def _bits_np(seeds_B: int | npt.NDArray[Any], stream: str, count: int) -> UInt64Array:
    keys_B = _as_bits(np.atleast_1d(derive(np.atleast_1d(np.asarray(seeds_B)), stream)))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return _mix(keys_B[:, None] + steps[None, :])


def uniform_np(seeds_B: int | npt.NDArray[Any], stream: str, count: int) -> npt.NDArray[np.float32]:
    """(B, count) float32 in [0, 1), row b being the first `count` numbers of that seed's stream."""
    return (_bits_np(seeds_B, stream, count) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def randint_np(seeds_B: int | npt.NDArray[Any], stream: str, low: int, high: int, count: int) -> Int64Array:
    """(B, count) int64 in [low, high); the span must lie in 1 .. 2**31 (ValueError otherwise)."""
    span = _span(low, high)
    top = (_bits_np(seeds_B, stream, count) >> np.uint64(33)).astype(np.int64)
    return low + ((top * span) >> 31)


def permutation_np(seed: int, stream: str, n: int) -> Int64Array:
    """A random order of 0 .. n-1, (n,) int64: the row that `random_order` gives for this seed."""
    return np.argsort(_bits_np(seed, stream, n)[0].view(np.int64), kind="stable")


def _span(low: int, high: int) -> int:
    if not 1 <= high - low <= 1 << 31:
        raise ValueError(f"randint needs 1 <= high - low <= 2**31, got low {low} and high {high}")
    return high - low


def _shift(bits: "Tensor", by: int) -> "Tensor":
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix_torch(bits: "Tensor") -> "Tensor":
    bits = (bits ^ _shift(bits, 30)) * _signed(MULTIPLY_1)
    bits = (bits ^ _shift(bits, 27)) * _signed(MULTIPLY_2)
    return bits ^ _shift(bits, 31)


def derive_torch(seeds_B: "Tensor", *parts: "int | str | Tensor") -> "Tensor":
    """`derive` for int64 tensors on any device; parts are ints, names or int64 tensors that broadcast."""
    state = seeds_B
    for part in parts:
        if isinstance(part, (int, str)):
            mixed: Tensor | int = derive_part(part)
        else:
            mixed = _mix_torch(part + _signed(GOLDEN))
        state = _mix_torch((state ^ mixed) + _signed(GOLDEN))
    return state


@lru_cache(maxsize=4096)
def derive_part(part: int | str) -> int:
    """The signed 64 bits by which a plain part enters `derive`."""
    return _signed(int(_mix(_as_bits(part) + np.uint64(GOLDEN))[0]))


def _bits_torch(seeds_B: "Tensor", stream: str, count: int) -> "Tensor":
    import torch

    steps = torch.arange(1, count + 1, dtype=torch.int64, device=seeds_B.device) * _signed(GOLDEN)
    return _mix_torch(derive_torch(seeds_B, stream)[:, None] + steps[None, :])


def uniform(seeds_B: "Tensor", stream: str, *shape: int) -> "Tensor":
    """(B, *shape) float32 in [0, 1) on the device of `seeds_B` (int64): the numbers of `uniform_np`, reshaped."""
    import torch

    bits = _shift(_bits_torch(seeds_B, stream, math.prod(shape)), 40)
    return (bits.to(torch.float32) * 2**-24).reshape(len(seeds_B), *shape)


def randint(seeds_B: "Tensor", stream: str, low: int, high: int, *shape: int) -> "Tensor":
    """(B, *shape) int64 in [low, high): the numbers of `randint_np`, reshaped."""
    span = _span(low, high)
    top = _shift(_bits_torch(seeds_B, stream, math.prod(shape)), 33)
    return (low + ((top * span) >> 31)).reshape(len(seeds_B), *shape)


def random_order(seeds_B: "Tensor", stream: str, n: int) -> "Tensor":
    """(B, n) int64, each row a random order of 0 .. n-1 drawn from that row's seed."""
    import torch

    return torch.argsort(_bits_torch(seeds_B, stream, n), dim=1, stable=True)
