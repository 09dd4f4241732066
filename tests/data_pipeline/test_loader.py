import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from data_pipeline.config import CorpusConfig, DataConfig, FrameConfig
from data_pipeline.decode import decode_video
from data_pipeline.frames import middle_indices
from data_pipeline.loader import EvalLoader, TrainLoader, check_bad_fraction
from data_pipeline.schema import LossReason
from data_pipeline.shards import Corpus, ShardWriter
from data_pipeline.transforms import from_decoder, to_square

BAD = 17  # of clip_corpus
STEPS = 12


def config(*corpora, **changes):
    plain = {"batch": 8, "image_size": 16, "crop_scale": (1.0, 1.0), "workers": 0, "max_bad_fraction": 0.5}
    return DataConfig(train=corpora, frames=FrameConfig(count=4), **{**plain, **changes})


def run(settings, start=0, steps=STEPS, **options):
    loader = TrainLoader(settings, 11, start_step=start, steps=steps, **options)
    return loader, list(loader)


def same(a, b):
    return (
        a.step == b.step
        and (a.captions, a.keys, a.attributes) == (b.captions, b.keys, b.attributes)
        and all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("frames", "identity", "seeds", "index"))
    )


def times_of(frames_CTHW):
    """The frame numbers of a grey-ramp clip (conftest), read from its pixels."""
    return ((frames_CTHW[:, :, 8:].float().mean((0, 2, 3)) - 20) / 15).round().int().tolist()


@pytest.fixture(scope="module")
def plain(clip_corpus):
    return run(config(CorpusConfig(path=str(clip_corpus))))


def test_a_batch_is_what_the_contract_says(plain, clip_corpus):
    loader, batches = plain
    assert [batch.step for batch in batches] == list(range(STEPS))
    for batch in batches:
        plan = loader.order.batch(batch.step)
        kept = plan.index != BAD
        assert batch.index.numpy()[kept].tolist() == plan.index[kept].tolist()
        assert batch.seeds.numpy()[kept].tolist() == plan.seeds[kept].tolist()
        assert len(set(batch.seeds.tolist())) == 8
    corpus = Corpus.open(clip_corpus)
    for batch in batches:
        assert batch.frames.shape == (8, 3, 4, 16, 16)
        assert batch.frames.dtype == torch.uint8
        assert batch.frames.is_contiguous()
        assert batch.identity.dtype == batch.seeds.dtype == batch.index.dtype == torch.int64
        assert (batch.kind, batch.corpus, len(batch)) == ("video", 0, 8)
        for row, index in enumerate(batch.index.tolist()):
            sample = corpus.read(index)
            assert batch.keys[row] == sample.key
            assert batch.captions[row] in sample.captions
            assert batch.all_captions[row] == sample.captions
            assert batch.attributes[row] == sample.attributes
            assert int(batch.identity[row]) == int(sample.sha256, 16) >> 193
            seen = times_of(batch.frames[row])
            assert all(3 * t <= frame <= 3 * t + 2 for t, frame in enumerate(seen)), seen


def test_identity_by_row_is_the_number_in_the_corpus(clip_corpus):
    _, batches = run(config(CorpusConfig(path=str(clip_corpus)), identity="row"), steps=2)
    assert all(batch.identity.equal(batch.index) for batch in batches)


def test_random_frames_and_captions_change_from_epoch_to_epoch(plain):
    _, batches = plain  # 12 steps of 8 are 96 clips of 60: every clip comes once in 7 steps, most twice
    seen, captions = {}, Counter()
    for batch in batches:
        for row, key in enumerate(batch.keys):
            seen.setdefault(key, []).append((batch.captions[row], times_of(batch.frames[row])))
            captions[batch.captions[row].split()[0]] += 1
    twice = [both for both in seen.values() if len(both) == 2]
    assert len(twice) > 20
    assert sum(first[1] != second[1] for first, second in twice) > 0.9 * len(twice)
    assert min(captions["clip"], captions["number"]) > 25


def test_a_bad_clip_is_counted_told_once_and_replaced_with_the_substitutes_own_caption(clip_corpus, caplog):
    with caplog.at_level(logging.WARNING):
        loader, batches = run(config(CorpusConfig(path=str(clip_corpus))), steps=21)
    keys = [key for batch in batches for key in batch.keys]
    assert f"{BAD:05d}" not in keys
    assert len(keys) == loader.seen == 21 * 8
    met = loader.lost.total()
    assert 2 <= met <= 6  # three epochs of 56 of 60 clips, and as a substitute perhaps
    assert set(loader.lost) == {LossReason.NOT_MEDIA}
    told = [record.getMessage() for record in caplog.records if "lost" in record.getMessage()]
    assert len(told) == 1
    assert f"part-000001.tar:{BAD:05d}@" in told[0]
    _, again = run(config(CorpusConfig(path=str(clip_corpus))), steps=21)
    assert all(map(same, batches, again))


def test_workers_ranks_and_resumption_change_nothing(plain, clip_corpus):
    _, whole = plain
    settings = config(CorpusConfig(path=str(clip_corpus)))
    state = torch.get_rng_state()
    _, by_workers = run(settings.model_copy(update={"workers": 2}), start=5)
    assert all(map(same, whole[5:], by_workers))
    assert torch.equal(state, torch.get_rng_state()), "making a loader drew from the run's random numbers"
    for world in (2, 4):
        ranks = [run(settings, start=3, steps=7, rank=rank, world=world)[1] for rank in range(world)]
        for step in range(4):
            parts = [ranks[rank][step] for rank in range(world)]
            assert torch.equal(torch.cat([part.frames for part in parts]), whole[3 + step].frames)
            assert [c for part in parts for c in part.captions] == whole[3 + step].captions


@pytest.mark.parametrize("workers, prefetch", [(1, 1), (3, 1), (3, 4)])
def test_any_number_of_workers_gives_the_same_sequence_over_shards_of_any_sizes(
    clip_corpus, tmp_path, workers, prefetch
):
    samples = [Corpus.open(clip_corpus).read(i) for i in range(13)]
    for number, count in enumerate((1, 5, 1, 6)):  # fewer shards than ranks, and shards of one sample
        with ShardWriter(tmp_path, "odd", count, first=number) as writer:
            for sample in samples[:count]:
                writer.write(sample)
        del samples[:count]
    settings = config(CorpusConfig(path=str(tmp_path), shard_window=2), batch=6).model_copy(
        update={"workers": workers, "prefetch": prefetch}
    )
    _, whole = run(settings.model_copy(update={"workers": 0}))
    assert all(map(same, whole, run(settings)[1]))
    ranks = [
        run(settings.model_copy(update={"workers": rank % 2}), start=4, rank=rank, world=6)[1] for rank in range(6)
    ]
    assert {len(rank) for rank in ranks} == {STEPS - 4}
    for step, parts in enumerate(zip(*ranks, strict=True), start=4):
        assert [key for part in parts for key in part.keys] == whole[step].keys


def test_micro_batches_are_parts_of_a_batch(plain):
    batch = plain[1][0]
    parts = [batch.part(0, 3), batch.part(3, 8)]
    assert torch.equal(torch.cat([part.frames for part in parts]), batch.frames)
    assert parts[0].captions + parts[1].captions == batch.captions
    assert [len(part) for part in parts] == [3, 5]


def test_groups_share_their_attribute(clip_corpus):
    settings = config(CorpusConfig(path=str(clip_corpus), group_by=("colour",), group_size=4))
    _, batches = run(settings, steps=6)
    groups = [
        {attributes["colour"] for attributes in batch.attributes[first : first + 4]}
        for batch in batches
        for first in (0, 4)
    ]
    assert sum(len(group) == 1 for group in groups) >= 9  # 8 labels of 8 clips and one of 4, less the substituted one


def test_images_and_videos_take_turns_one_kind_a_step(clip_corpus, image_corpus):
    settings = config(
        CorpusConfig(path=str(clip_corpus), weight=1),
        CorpusConfig(path=str(image_corpus), kind="image", weight=1),
        image_batch=6,
    )
    _, batches = run(settings, steps=8)
    assert Counter(batch.kind for batch in batches) == {"video": 4, "image": 4}
    for batch in batches:
        expected = (8, 3, 4, 16, 16) if batch.kind == "video" else (6, 3, 1, 16, 16)
        assert batch.frames.shape == expected
        assert batch.corpus == (batch.kind == "image")


def test_the_cache_gives_the_same_clips_and_needs_no_decoder_later(clip_corpus, tmp_path):
    copy = tmp_path / "corpus"
    shutil.copytree(clip_corpus, copy)
    settings = config(CorpusConfig(path=str(copy)), cache=str(tmp_path / "cache"), cache_frames=12)
    loader, first = run(settings)
    _, plain = run(config(CorpusConfig(path=str(copy))))
    assert all(map(same, first, plain)), "a cache that holds every frame gives what decoding gives"
    for tar in copy.glob("*.tar"):  # spoil every medium, leave every json member
        corpus, data = Corpus.open(copy), bytearray(tar.read_bytes())
        for i in range(len(corpus)):
            if corpus.location(i).startswith(tar.name):
                at, size = corpus._spans[i][:2]
                data[at : at + size] = bytes(int(size))
        tar.write_bytes(data)
    again, second = run(settings)
    assert all(map(same, first, second))
    assert again.lost == loader.lost


def test_fewer_cached_frames_are_chosen_by_the_same_rule(clip_corpus, tmp_path):
    settings = config(CorpusConfig(path=str(clip_corpus)), cache=str(tmp_path), cache_frames=6)
    kept = set(middle_indices(12, 6).tolist())
    _, batches = run(settings, steps=3)
    seen = {t for batch in batches for row in range(8) for t in times_of(batch.frames[row])}
    assert seen == kept


def test_flips_mirror_half_of_the_clips_and_crops_are_the_same_for_all_frames(clip_corpus, tmp_path):
    base = config(CorpusConfig(path=str(clip_corpus)))
    _, straight = run(base, steps=7)
    _, flipped = run(config(CorpusConfig(path=str(clip_corpus), flip=True)), steps=7)
    mirrored = 0
    for a, b in zip(straight, flipped, strict=True):
        for row in range(8):
            is_mirrored = torch.equal(a.frames[row].flip(-1), b.frames[row])
            assert is_mirrored or torch.equal(a.frames[row], b.frames[row])
            mirrored += is_mirrored
    assert 15 < mirrored < 41
    _, cropped = run(base.model_copy(update={"crop_scale": (0.3, 0.6)}), steps=1)
    assert not torch.equal(cropped[0].frames, straight[0].frames)
    single = config(CorpusConfig(path=str(clip_corpus))).model_copy(
        update={"crop_scale": (0.3, 0.6), "frames": FrameConfig(count=4, rule="single")}
    )
    frames = run(single, steps=1)[1][0].frames
    assert torch.equal(frames, frames[:, :, :1].expand_as(frames))


def test_leaving_the_loop_ends_the_workers_and_signals_do_not(clip_corpus):
    loader = TrainLoader(config(CorpusConfig(path=str(clip_corpus)), workers=2), 1, steps=500)
    taken = iter(loader)
    next(taken)
    workers = [child for child in multiprocessing.active_children() if child.is_alive()]
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker.pid, number)
    for _ in range(10):
        next(taken)
    assert all(worker.is_alive() for worker in workers)
    taken.close()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


KILLED = """
import multiprocessing, os, signal, sys
from data_pipeline.config import CorpusConfig, DataConfig
from data_pipeline.loader import TrainLoader

if __name__ == "__main__":
    corpus = CorpusConfig(path=sys.argv[1])
    batches = iter(TrainLoader(DataConfig(train=(corpus,), batch=4, image_size=16, workers=2), 0, steps=10_000))
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_the_main_process_is_killed(clip_corpus, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    with (tmp_path / "out").open("w") as out:  # a file: an orphan would keep a pipe open
        command = [sys.executable, str(script), str(clip_corpus)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        ran = subprocess.run(command, stdout=out, env=environment, timeout=110)
    assert ran.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in (tmp_path / "out").read_text().split()]
    assert len(workers) == 2
    patience = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < patience, "the workers outlive the run"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corpus_where_everything_is_bad_is_an_error_and_no_spin(tmp_path, workers, make_bad_corpus):
    folder = make_bad_corpus(tmp_path / "bad", 20)
    with pytest.raises(UserError, match="21 samples in a row") as told:
        run(config(CorpusConfig(path=str(folder)), workers=workers))
    assert told.value.exit_code == 1


def test_the_run_stops_past_the_stated_share(clip_corpus):
    with pytest.raises(UserError, match=r"^1 of \d+ samples") as told:
        run(config(CorpusConfig(path=str(clip_corpus)), max_bad_fraction=0.0), steps=21)
    assert told.value.exit_code == 1
    assert run(config(CorpusConfig(path=str(clip_corpus)), max_bad_fraction=0.01), steps=7)
    run(config(CorpusConfig(path=str(clip_corpus)), max_bad_fraction=0.0), steps=21, rank=0, world=2)  # the trainer's


@pytest.mark.parametrize("lost, seen, limit, stops", [(0, 1, 0, False), (1, 1, 0, True), (10, 64, 0.01, False),
    (11, 64, 0.01, True), (100, 10_000, 0.01, False), (101, 10_000, 0.01, True)])  # fmt: skip
def test_the_share_is_held_against_a_thousand_at_least(lost, seen, limit, stops):
    if stops:
        with pytest.raises(UserError, match=f"{lost} of {seen}"):
            check_bad_fraction(lost, seen, limit)
    else:
        check_bad_fraction(lost, seen, limit)


def test_counters_go_on_after_a_resume(clip_corpus):
    settings = config(CorpusConfig(path=str(clip_corpus)))
    whole, _ = run(settings, steps=21)
    first, _ = run(settings, steps=10)
    second = TrainLoader(settings, 11, start_step=10, steps=21)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    list(second)
    assert second.state_dict() == whole.state_dict()
    assert (second.seen, second.lost) == (whole.seen, whole.lost)


def test_wrong_requests_are_told_before_anything_is_read(clip_corpus, image_corpus, tmp_path):
    def refused(settings, **options):
        with pytest.raises(UserError) as told:
            TrainLoader(settings, 0, steps=1, **options)
        return str(told.value)

    here = str(clip_corpus)
    assert "no corpus folder" in refused(config(CorpusConfig(path=str(tmp_path / "none"))))
    assert "8 clips do not divide by 3 ranks. Use 9, or 2 ranks" in refused(config(CorpusConfig(path=here)), world=3)
    assert "holds images" in refused(config(CorpusConfig(path=str(image_corpus))))
    assert "colour" in refused(config(CorpusConfig(path=here, group_by=("color",), group_size=2)))
    assert "fewer than 64" in refused(config(CorpusConfig(path=here), batch=64))
    with pytest.raises(ValueError, match="Give one"):
        CorpusConfig(path=here, weight=2, epochs=2)
    with pytest.raises(ValueError, match="shard_window shuffles a few shards"):
        CorpusConfig(path=here, shard_window=2, group_by=("colour",), group_size=2)


def test_evaluation_is_in_order_by_middle_frames_without_the_lost_clip(clip_corpus):
    visual = config(CorpusConfig(path="x")).visual()
    loader = EvalLoader(clip_corpus, visual, batch=16)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [16, 15, 16, 12]
    assert [batch.step for batch in batches] == list(range(len(loader)))
    assert [i for batch in batches for i in batch.index.tolist()] == [i for i in range(60) if i != BAD]
    assert loader.lost == {LossReason.NOT_MEDIA: 1}
    sample = Corpus.open(clip_corpus).read(33)
    decoded = from_decoder(decode_video(sample.media, lambda n, _: middle_indices(n, 4)))
    expected = to_square(decoded, 16, "stretch", "bicubic").transpose(0, 1)
    row = batches[2].index.tolist().index(33)
    assert torch.equal(batches[2].frames[row], expected)
    assert batches[2].captions[row] == sample.captions[0]
    assert batches[2].all_captions[row] == sample.captions


def test_the_controls_take_motion_away_and_nothing_else(clip_corpus, tmp_path):
    visual = config(CorpusConfig(path="x")).visual()
    views = {
        control: torch.cat(
            [b.frames for b in EvalLoader(clip_corpus, visual, 16, control=control, cache=str(tmp_path))]
        )
        for control in ("normal", "shuffled", "repeated")
    }
    plain = torch.cat([batch.frames for batch in EvalLoader(clip_corpus, visual, 16)])
    assert torch.equal(views["normal"], plain), "an evaluation cache holds exactly the middle frames"
    assert torch.equal(views["repeated"], plain[:, :, 2:3].expand_as(plain))
    for clip, shuffled in zip(plain, views["shuffled"], strict=True):
        order = [next(t for t in range(4) if torch.equal(shuffled[:, s], clip[:, t])) for s in range(4)]
        assert sorted(order) == [0, 1, 2, 3]
        assert order != [0, 1, 2, 3]


def test_evaluation_ranks_share_the_corpus(clip_corpus):
    visual = config(CorpusConfig(path="x")).visual()
    parts = [EvalLoader(clip_corpus, visual, 7, rank=rank, world=3, workers=rank == 1) for rank in range(3)]
    indices = [i for part in parts for batch in part for i in batch.index.tolist()]
    assert indices == [i for i in range(60) if i != BAD]
