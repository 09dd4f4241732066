"""What a call holds at its peak."""

MEBIBYTE = 2**20

PEAK = """
import torch
from videomamba.memory import give_back_memory, peak_of

def hold():
    for _ in range(3):
        torch.ones(64 * 2**18)

give_back_memory()
print(peak_of(hold))
"""


def test_the_peak_is_what_was_held_at_once(python) -> None:
    """In a process of its own: one that has run long may have 64 MiB to spare, and then grows by nothing."""
    done = python("-c", PEAK)
    assert done.returncode == 0, done.stderr
    assert 64 * MEBIBYTE <= int(done.stdout) < 80 * MEBIBYTE
