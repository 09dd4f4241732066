"""The peak memory of a process tree is seen, that of its children included."""

import subprocess
import sys
import time

from configs.processes import TreeMemory, tree_bytes

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
