import multiprocessing
import pickle

import numpy as np
import pytest

from configs.errors import UserError
from data_pipeline.frame_cache import ALIGNMENT, LOST_CODES, CacheSpec, FrameCache
from data_pipeline.schema import LossReason, SampleError

SPEC = CacheSpec("c0ffee", samples=40, frames=4, size=8, resize="stretch", interpolation="bicubic")


def clip(number, frames=4):
    return np.random.default_rng(number).integers(0, 256, (frames, 8, 8, 3), np.uint8)


def test_what_is_put_is_there_for_the_next_run_and_the_rest_is_not(tmp_path):
    cache = FrameCache(tmp_path / "deep" / "cache", SPEC)
    assert cache.get(3) is None
    cache.put(3, clip(3))
    cache.put(39, clip(39, frames=2))
    again = FrameCache(tmp_path / "deep" / "cache", SPEC)
    assert np.array_equal(again.get(3), clip(3))
    assert np.array_equal(again.get(39), clip(39, frames=2))
    assert again.get(38) is None
    assert again.filled() == 2
    assert cache.path.stat().st_size == ALIGNMENT + 40 * 4 * 8 * 8 * 3


def test_lost_samples_are_remembered_with_their_reason_and_timeouts_are_not(tmp_path):
    cache = FrameCache(tmp_path, SPEC)
    for index, reason in enumerate(LOST_CODES):
        cache.put_lost(index, reason)
        with pytest.raises(SampleError) as told:
            FrameCache(tmp_path, SPEC).get(index)
        assert told.value.reason is reason
    cache.put_lost(30, LossReason.TIMEOUT)
    assert cache.get(30) is None


def test_any_other_corpus_or_preprocessing_is_another_file(tmp_path):
    changes = {
        "corpus_digest": "x",
        "samples": 41,
        "frames": 5,
        "size": 9,
        "resize": "crop",
        "interpolation": "bilinear",
        "first_seconds": 30.0,
    }
    assert set(changes) == set(SPEC.__dict__), "a new field needs a line here"
    keys = {SPEC.key} | {CacheSpec(**{**SPEC.__dict__, name: value}).key for name, value in changes.items()}
    assert len(keys) == len(changes) + 1


def fill(cache, numbers):
    for number in numbers:
        cache.put(number, clip(number))


def test_processes_that_make_and_fill_one_file_at_once_agree(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=open_and_fill, args=(tmp_path, part)) for part in (range(40), range(39, -1, -1))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    cache = FrameCache(tmp_path, SPEC)
    assert cache.filled() == 40
    assert all(np.array_equal(cache.get(number), clip(number)) for number in range(40))


def open_and_fill(folder, numbers):
    cache = pickle.loads(pickle.dumps(FrameCache(folder, SPEC)))
    for number in numbers:
        cache.put(number, clip(number))


def test_a_full_disk_is_told_at_once_and_leaves_nothing(tmp_path):
    huge = CacheSpec("c0ffee", samples=10**8, frames=200, size=512, resize="stretch", interpolation="bicubic")
    with pytest.raises(UserError) as told:
        FrameCache(tmp_path, huge)
    assert told.value.exit_code == 1
    assert "no room" in told.value.cause
    assert "GiB" in told.value.cause
    assert "data.cache" in told.value.cure
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
from pathlib import Path
from configs.errors import UserError
from data_pipeline.frame_cache import CacheSpec, FrameCache
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    FrameCache(Path(sys.argv[1]), CacheSpec("c", 40, 4, 8, "stretch", "bicubic"))
except UserError as error:
    print(error.exit_code, error)
"""


def test_a_limit_on_file_sizes_is_told_like_a_full_disk(tmp_path, python):
    ran = python("-c", LIMITED, str(tmp_path))
    assert ran.stdout.startswith("1 The disk of"), ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_cut_while_it_was_made_is_made_whole(tmp_path):
    cache = FrameCache(tmp_path, SPEC)
    path = cache.path
    del cache
    path.write_bytes(bytes(100))
    cache = FrameCache(tmp_path, SPEC)
    assert cache.filled() == 0
    fill(cache, [0])
    assert np.array_equal(cache.get(0), clip(0))


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        FrameCache(tmp_path / "file" / "cache", SPEC)
