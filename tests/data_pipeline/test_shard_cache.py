"""The bounded cache under several processes, kill -9 and disks without room."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline.shard_cache import ShardCache

ROOT = Path(__file__).parents[2]
SIZE = 1000


def fill_with(text):
    return lambda file: file.write((text * SIZE)[:SIZE].encode())


def never(file):
    raise AssertionError("this entry should be there")


def read(cache, name, fill=None):
    with cache.open(name, SIZE, fill or fill_with(name)) as file:
        return file.readall().decode()


def names(cache):
    return sorted(path.name for path in cache.folder.iterdir() if not path.name.startswith("."))


def test_an_entry_is_filled_once(tmp_path):
    cache = ShardCache(tmp_path / "c", 10 * SIZE)
    assert read(cache, "a") == "a" * SIZE
    assert read(ShardCache(tmp_path / "c", 10 * SIZE), "a", never) == "a" * SIZE
    assert cache.used() == SIZE


def test_what_was_used_longest_ago_goes_and_the_bound_holds(tmp_path):
    cache = ShardCache(tmp_path, 3 * SIZE)
    for name in "abc":
        read(cache, name)
        time.sleep(0.01)
    read(cache, "a", never)
    read(cache, "d")
    assert cache.used() <= 3 * SIZE
    assert "b" not in names(cache)
    assert {"a", "d"} <= set(names(cache))


def test_an_open_entry_outlives_its_eviction(tmp_path):
    cache = ShardCache(tmp_path, 2 * SIZE)
    with cache.open("a", SIZE, fill_with("a")) as file:
        read(cache, "b")
        read(cache, "c")
        assert "a" not in names(cache)
        assert file.readall() == b"a" * SIZE


def test_a_fill_that_fails_leaves_nothing(tmp_path):
    cache = ShardCache(tmp_path, 2 * SIZE)
    with pytest.raises(ZeroDivisionError):
        read(cache, "a", lambda file: file.write(b"x") and 1 // 0)
    with pytest.raises(ValueError, match="1 bytes were written"):
        read(cache, "a", lambda file: file.write(b"x"))
    assert cache.used() == 0
    assert int((tmp_path / ".total").read_text()) == 0
    assert read(cache, "a") == "a" * SIZE


def test_an_entry_larger_than_the_cache_is_refused(tmp_path):
    with pytest.raises(UserError, match="too little") as told:
        read(ShardCache(tmp_path, SIZE - 1), "a")
    assert "cache_gb" in told.value.cure


def _busy(folder, seed, over):
    cache = ShardCache(folder, 5 * SIZE)
    for turn in range(120):
        name = f"{(turn * (seed + 3)) % 11:02d}"
        assert read(cache, name) == (name * SIZE)[:SIZE]
        if cache.used() > 5 * SIZE:
            over.value = 1


def test_several_processes_share_it(tmp_path):
    context = multiprocessing.get_context("fork")
    over = context.Value("i", 0)
    processes = [context.Process(target=_busy, args=(tmp_path, seed, over)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert over.value == 0
    assert int((tmp_path / ".total").read_text()) == ShardCache(tmp_path, 1).used()


KILLED = """
import os, sys, time
from pathlib import Path
from data_pipeline.shard_cache import ShardCache

def slow(file):
    file.write(b"half")
    Path(sys.argv[1], ".started").touch()
    time.sleep(60)

ShardCache(Path(sys.argv[1]), 2500).open("a", 1000, slow)
"""


def test_what_a_killed_process_was_fetching_is_fetched_again_or_cleared(tmp_path):
    def kill_amid():
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        patience = time.monotonic() + 60
        while not (tmp_path / ".started").exists() and time.monotonic() < patience:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (tmp_path / ".started").unlink()
        assert (tmp_path / ".a.part").stat().st_size == 1000, "its disk is reserved from the start"

    cache = ShardCache(tmp_path, 2500)
    kill_amid()
    read(cache, "b")
    assert read(cache, "a") == "a" * SIZE
    (tmp_path / "a").unlink()
    kill_amid()
    (tmp_path / ".total").write_text("")  # killed between its making and its writing
    read(cache, "c")
    assert not (tmp_path / ".a.part").exists(), "making room clears what was abandoned"
    assert cache.used() <= 2500
    (tmp_path / ".total").write_text("12")  # spoilt by a power cut
    read(ShardCache(tmp_path, 2500), "d")
    assert cache.used() <= 2500
    assert int((tmp_path / ".total").read_text()) == cache.used()


FULL = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
from configs.errors import UserError
from data_pipeline.shard_cache import ShardCache
try:
    ShardCache(Path(sys.argv[1]), 10_000).open("a", 1000, lambda file: file.write(b"x" * 1000))
except UserError as error:
    print(error.exit_code, error)
"""


def test_a_file_past_what_the_system_allows_is_a_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "1 The disk of the shard cache" in done.stdout, done.stderr
    assert "has no room" in done.stdout
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name or path.name == "a"] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_a_sentence_and_leaves_the_rest_usable(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        cache = ShardCache(tmp_path / "cache", 1 << 20)
        read(cache, "a")
        with pytest.raises(UserError, match=r"has no room for 0\.1 MiB more"):
            cache.open("big", 100_000, never)
        assert read(cache, "a", never) == "a" * SIZE
        assert names(cache) == ["a"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
