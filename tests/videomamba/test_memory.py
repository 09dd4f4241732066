"""The peak memory of a process tree is seen, that of its children included."""

import subprocess
import sys
import time

from videomamba.memory import TreeMemory, tree_bytes

MEBIBYTE = 2**20
HOLD = "import time; held = bytearray(b'x') * (96 << 20); print('ready', flush=True); time.sleep(30)"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD!r}])"


def test_a_child_s_memory_counts() -> None:
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    try:
        with TreeMemory(process.pid, interval=0.05) as memory:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 10
            while memory.peak < 96 * MEBIBYTE and time.monotonic() < deadline:
                time.sleep(0.05)
        assert 96 * MEBIBYTE <= memory.peak < 400 * MEBIBYTE
    finally:
        subprocess.run(["pkill", "-P", str(process.pid)], check=False)
        process.kill()
        process.wait()
    assert tree_bytes(process.pid) == 0  # an ended process holds nothing, and is no error


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
