"""What goes wrong while a run reads: dead and hanging workers, crashing decoders, shards that change under it."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time

import pytest
import torch

from configs.errors import UserError
from data_pipeline.batches import fresh
from data_pipeline.clips import ClipSource
from data_pipeline.config import CorpusConfig, DataConfig, FrameConfig
from data_pipeline.loader import EvalLoader, TrainLoader
from data_pipeline.lost import COLUMNS, Loss, LostCsv
from data_pipeline.schema import LossReason, SampleError
from data_pipeline.shards import Corpus

BAD, STUBBORN, STEPS = 17, 23, 9  # of clip_corpus: no video; the one these tests make trouble with
PATIENCE = 4.0  # seconds for a decode that takes a millisecond: a busy machine is no hang


class Hangs(ClipSource):
    """Decodes every clip but one, over which it sleeps for ever."""

    def decode(self, sample, choose):
        while sample.key == f"{STUBBORN:05d}":
            time.sleep(60)
        return super().decode(sample, choose)


class Crashes(ClipSource):
    """Decodes every clip but one, over which its process dies as over a fault in a C library."""

    def decode(self, sample, choose):
        if sample.key == f"{STUBBORN:05d}":
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().decode(sample, choose)


class Fails(ClipSource):
    """A fault of our own."""

    def decode(self, sample, choose):
        raise ZeroDivisionError("a fault of the program")


def loader(corpus, source=ClipSource, start=0, steps=STEPS, **changes):
    plain = {"batch": 8, "image_size": 16, "crop_scale": (1.0, 1.0), "workers": 2, "max_bad_fraction": 0.5}
    config = DataConfig(train=(CorpusConfig(path=str(corpus)),), frames=FrameConfig(count=4), **{**plain, **changes})
    made = TrainLoader(config, 11, start_step=start, steps=steps)
    for one in made._maker.sources:
        one.__class__ = source
    return made


def same(a, b):
    return (a.step, a.keys, a.captions) == (b.step, b.keys, b.captions) and torch.equal(a.frames, b.frames)


def workers():
    return [child for child in multiprocessing.active_children() if child.is_alive()]


@pytest.fixture(scope="module")
def undisturbed(clip_corpus):
    return list(loader(clip_corpus, workers=0))


def test_killed_workers_are_replaced_and_no_batch_is_lost_or_changed(clip_corpus, undisturbed, caplog):
    got = []
    for batch in loader(clip_corpus):
        got.append(batch)
        if batch.step in (1, 4):
            for worker in workers()[: 1 + batch.step // 4]:
                os.kill(worker.pid, signal.SIGKILL)
    assert len(got) == STEPS
    assert all(map(same, got, undisturbed))
    assert caplog.text.count("died (killed by SIGKILL)") == 3


def test_workers_that_keep_dying_are_an_error_and_no_spin(clip_corpus):
    over = threading.Event()

    def kill_all():
        while not over.is_set():
            for worker in workers():
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.005)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(UserError, match=r"4 workers that read data died .* (SIGKILL|255)") as told:
            list(loader(clip_corpus, steps=1000))
    finally:
        over.set()
        killer.join()
    assert told.value.exit_code == 1
    assert not workers()


def test_a_decode_that_hangs_loses_its_sample_alone_and_a_resumed_run_substitutes_the_same(clip_corpus, undisturbed):
    hung = loader(clip_corpus, Hangs, decode_timeout=PATIENCE)
    got = list(hung)
    met = [loss for batch in got for loss in batch.losses if loss.reason is LossReason.TIMEOUT]
    assert {(loss.index, loss.place[0], loss.detail) for loss in met} == {
        (STUBBORN, "part-000002.tar", f"not decoded after {PATIENCE:g} s")
    }
    at = next(batch.step for batch in got if batch.losses and met[0] in batch.losses)
    assert at > 1, "the sample has to come late enough for a resume before it"
    rows = [
        (mine, theirs)
        for a, b in zip(got, undisturbed, strict=True)
        for mine, theirs in zip(a.keys, b.keys, strict=True)
    ]
    changed = [pair for pair in rows if pair[0] != pair[1]]
    assert {theirs for _, theirs in changed} == {f"{STUBBORN:05d}"}
    assert len(changed) == len(met)

    state = json.loads(json.dumps(hung.state_dict()))
    assert [0, STUBBORN, "timeout"] in state["bad"]
    resumed = loader(clip_corpus, ClipSource, start=at, workers=0)  # this one could decode it
    resumed.load_state_dict(state)
    assert all(map(same, got[at:], resumed))
    assert resumed.lost[LossReason.TIMEOUT] == hung.lost[LossReason.TIMEOUT] + len(met)


def test_a_sample_over_which_workers_crash_is_lost_and_the_run_goes_on(clip_corpus):
    crashing = loader(clip_corpus, Crashes)
    got = list(crashing)
    assert len(got) == STEPS
    met = [loss for batch in got for loss in batch.losses if loss.index == STUBBORN]
    assert met
    assert all("ended the worker (killed by SIGSEGV)" in loss.detail for loss in met)
    assert crashing.lost[LossReason.DECODE_ERROR] == len(met)


def test_an_evaluation_leaves_a_hanging_clip_out(clip_corpus):
    visual = DataConfig(train=(CorpusConfig(path="x"),), image_size=16, frames=FrameConfig(count=4)).visual()
    evaluation = EvalLoader(clip_corpus, visual, batch=16, workers=1)
    evaluation._pool._maker.source.__class__ = Hangs
    evaluation._pool._decode_timeout = PATIENCE
    indices = [index for batch in evaluation for index in batch.index.tolist()]
    assert indices == [index for index in range(60) if index not in (BAD, STUBBORN)]
    assert evaluation.lost == {LossReason.NOT_MEDIA: 1, LossReason.TIMEOUT: 1}


def test_a_stopped_process_is_no_hang_once_it_goes_on(clip_corpus, undisturbed):
    """Ctrl-Z stops the workers with the clock running; after `fg` an overdue decode gets a moment to end."""
    batches = iter(loader(clip_corpus, decode_timeout=0.2))
    got = [next(batches)]
    for _ in range(3):
        for worker in workers():
            os.kill(worker.pid, signal.SIGSTOP)
        time.sleep(0.4)
        for worker in workers():
            os.kill(worker.pid, signal.SIGCONT)
        got.append(next(batches))
    batches.close()
    assert all(map(same, got, undisturbed))


def test_a_fault_of_the_program_is_raised_with_its_traceback_and_not_tried_again(clip_corpus):
    with pytest.raises(RuntimeError, match=r"(?s)in decode\n.*ZeroDivisionError: a fault of the program"):
        list(loader(clip_corpus, Fails))


def test_shards_that_are_cut_while_they_are_read_stop_the_run(clip_corpus, tmp_path):
    copy = shutil.copytree(clip_corpus, tmp_path / "corpus")
    reading = loader(copy, steps=2000, max_bad_fraction=0.01)
    met = []

    def read():
        for batch in reading:
            met.extend(batch.losses)
            if batch.step == 2:
                for shard in copy.glob("*.tar"):
                    os.truncate(shard, shard.stat().st_size // 2)

    with pytest.raises(UserError, match=r"were lost, more than data\.max_bad_fraction=0\.01") as told:
        read()
    assert told.value.exit_code == 1
    damaged = [loss for loss in met if loss.reason is LossReason.DAMAGED_SHARD]
    assert damaged
    assert all("the shard ends" in loss.detail for loss in damaged)


@pytest.mark.parametrize("count", [0, 2])
def test_shards_that_vanish_while_they_are_read_are_named(clip_corpus, tmp_path, count):
    copy = shutil.copytree(clip_corpus, tmp_path / "corpus")
    reading = loader(copy, workers=count, steps=2000)
    for shard in sorted(copy.glob("*.tar"))[2:]:
        shard.unlink()
    with pytest.raises(UserError, match=r"part-00000\d.tar is gone since the corpus was opened") as told:
        list(reading)
    assert told.value.exit_code == 1


def test_a_failing_disk_is_tried_again_and_then_named(clip_corpus, tmp_path, caplog):
    """The memory of a process at address 0 is a file whose every read is an input/output error."""
    copy = shutil.copytree(clip_corpus, tmp_path / "corpus")
    corpus, whole = Corpus.open(copy), Corpus.open(clip_corpus)
    shard = copy / "part-000002.tar"
    shard.unlink()
    shard.symlink_to("/proc/self/mem")
    with caplog.at_level("INFO"), pytest.raises(UserError, match=r"part-000002\.tar could not be read in 4") as told:
        corpus.read(20)
    assert told.value.exit_code == 1
    assert "Input/output error" in told.value.cause
    assert caplog.text.count("attempt") == 3
    shard.unlink()
    shutil.copy(clip_corpus / shard.name, shard)
    assert Corpus.open(copy).read(20) == whole.read(20)


def test_the_list_of_losses_goes_on_where_a_resumed_run_does(tmp_path, clip_corpus):
    corpus = Corpus.open(clip_corpus)
    losses = [
        Loss.of(0, corpus, i, SampleError(LossReason.DECODE_ERROR, f'line {i}, "quoted"\nand broken')) for i in (3, 9)
    ]
    table = LostCsv(tmp_path / "lost.csv")
    table.start(0)
    table.add(4, [[losses[0]], []])
    table.add(5, [[], []])
    table.add(7, [[], [losses[1]]])
    with (tmp_path / "lost.csv").open("a") as file:
        file.write('8,0,0,"cut sho')  # killed while it wrote

    def rows():
        with (tmp_path / "lost.csv").open(newline="") as file:
            return list(csv.reader(file))

    LostCsv(tmp_path / "lost.csv").start(8)
    assert rows()[0] == list(COLUMNS)
    assert [row[:2] for row in rows()[1:]] == [["4", "0"], ["7", "1"]]
    assert rows()[2] == [
        "7",
        "1",
        "0",
        "part-000000.tar",
        "00009",
        str(corpus.offset(9)),
        "decode_error",
        losses[1].detail,
    ]
    LostCsv(tmp_path / "lost.csv").start(7)
    assert len(rows()) == 2
    LostCsv(tmp_path / "lost.csv").start(0)
    assert rows() == []


def test_known_bad_samples_are_not_read_again(clip_corpus):
    reading = loader(clip_corpus, Fails, workers=0)
    reading.bad.load([[0, index, "timeout"] for index in range(60)])
    with pytest.raises(UserError, match="21 samples in a row"):
        list(reading)
    plan = reading.order.batch(0)
    assert isinstance(reading._maker.make(plan, fresh), UserError)
