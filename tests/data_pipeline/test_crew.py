"""Decoders that hang or die: a pipe that nobody writes into keeps a process waiting for ever."""

import os
import signal
import time
from multiprocessing import active_children
from threading import Timer

import pytest

from data_pipeline.crew import prepare_all
from data_pipeline.prepare import Lost, Recipe, Task
from data_pipeline.schema import LossReason


@pytest.fixture
def tasks(media_folder, tmp_path):
    hanging = tmp_path / "hanging.mp4"
    os.mkfifo(hanging)
    paths = [media_folder / f"c{number:02d}.mp4" for number in range(40)]
    paths[21] = hanging
    return [Task(position, str(path), 1000, ".mp4") for position, path in enumerate(paths)]


def test_a_clip_that_takes_too_long_is_one_lost_clip(tasks):
    results = list(prepare_all(tasks, Recipe(), 2, time_limit=3.0))
    assert [result.position for result in results] == list(range(40))
    assert [result for result in results if isinstance(result, Lost)] == [
        Lost(21, LossReason.TIMEOUT, "took longer than 3 s")
    ]


def test_a_decoder_that_dies_is_one_lost_clip(tasks):
    kill = Timer(0, lambda: [os.kill(child.pid, signal.SIGKILL) for child in active_children()])
    results = []
    for result in prepare_all(tasks, Recipe(), 1, time_limit=60.0):
        results.append(result)
        if result.position == 20:
            time.sleep(0.3)
            kill.start()
    assert [result.position for result in results] == list(range(40))
    assert [result for result in results if isinstance(result, Lost)] == [
        Lost(21, LossReason.DECODE_ERROR, "the process that decoded it died of SIGKILL")
    ]


def test_tasks_are_taken_as_they_are_needed(media_folder):
    """A list of any length is never drawn ahead of the work by more than a few chunks."""
    paths = [media_folder / f"c{number:02d}.mp4" for number in range(40)]
    drawn = 0

    def endless():
        nonlocal drawn
        while True:
            path = paths[drawn % 40]
            yield Task(drawn, str(path), path.stat().st_size, ".mp4")
            drawn += 1

    results = prepare_all(endless(), Recipe(), 1, time_limit=60.0)
    for at, result in zip(range(100), results, strict=False):
        assert result.position == at
        assert drawn < at + 80
    results.close()
    assert active_children() == []
