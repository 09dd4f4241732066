"""Cut, flipped and overwritten bytes of real clips: every case ends in frames or a SampleError, in bounded time.

The cases run in a process of their own, so that a crash or a hang of a decoder fails the test and not the test run.
"""

import json
import multiprocessing
import time
from collections import Counter

import numpy as np
import pytest

from configs.errors import UserError
from data_pipeline.config import CorpusConfig, DataConfig
from data_pipeline.decode import decode_image, decode_video, probe
from data_pipeline.loader import TrainLoader
from data_pipeline.schema import LossReason, SampleError

CASES = 300
SECONDS_A_CASE = 10.0
LARGEST = 60_000  # bytes of a clip that is damaged: what is learned does not grow with the size


def damaged(data, generator):
    """`data` cut, or with some bytes flipped, or a stretch of it overwritten, zeroed, doubled or taken out."""
    way = generator.integers(6)
    start = int(generator.integers(1, len(data)))
    stop = min(len(data), start + int(generator.integers(1, 400)))
    if way == 0:
        return data[:start]
    if way == 1:
        changed = bytearray(data)
        head = min(len(data), 600) if generator.random() < 0.5 else len(data)
        for place in generator.integers(0, head, int(generator.integers(1, 30))):
            changed[place] ^= 1 << int(generator.integers(8))
        return bytes(changed)
    middle = [generator.bytes(stop - start), bytes(stop - start), 2 * data[start:stop], b""][way - 2]
    return data[:start] + middle + data[stop:]


def look(data, picture):
    """What comes of some bytes, whichever way they are read: "frames" or a reason."""
    outcomes = []
    for read in (
        lambda: probe(data, time_limit=SECONDS_A_CASE),
        lambda: decode_video(data, lambda n, _: np.linspace(0, n - 1, 4).astype(int), size=(16, 16)),
        lambda: decode_image(data, max_short_side=20) if picture else None,
    ):
        try:
            read()
            outcomes.append("frames")
        except SampleError as error:
            outcomes.append(error.reason.value)
    return outcomes


def run_cases(sources, seed, connection):
    generator = np.random.default_rng(seed)
    for case in range(CASES):
        name, data = sources[case % len(sources)]
        harmed = damaged(data, generator)
        began = time.monotonic()
        outcomes = look(harmed, case % 3 == 0)
        connection.send((case, name, outcomes, time.monotonic() - began))


@pytest.fixture(scope="module")
def sources(media_dir):
    """Name and bytes of the smaller real clips and of some images."""
    files = []
    for listed in ("clips.jsonl", "images.jsonl"):
        paths = [media_dir / json.loads(line)["file"] for line in (media_dir / listed).read_text().splitlines()]
        files += [path for path in paths if 0 < path.stat().st_size <= LARGEST][:20]
    return [(path.name, path.read_bytes()) for path in files]


def test_damaged_bytes_give_frames_or_a_typed_error_and_never_a_crash_or_a_hang(sources):
    assert len({name.rpartition(".")[2] for name, _ in sources}) >= 5
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=run_cases, args=(sources, 20261122, theirs))
    process.start()
    theirs.close()
    counts = Counter()
    try:
        for case in range(CASES):
            assert ours.poll(SECONDS_A_CASE), f"case {case} ({sources[case % len(sources)][0]}) hangs"
            number, name, outcomes, seconds = ours.recv()  # EOFError: the decoder crashed the process
            assert number == case
            assert seconds < SECONDS_A_CASE, name
            counts.update(outcomes)
    finally:
        process.kill()
        process.join()
    assert set(counts) <= {"frames", *LossReason}
    assert counts["frames"] > 20
    assert counts["decode_error"] > 50


def test_garbage_is_no_media():
    generator = np.random.default_rng(5)
    for size in (1, 7, 100, 5000):
        for head in (
            b"",
            b"\x00\x00\x00\x18ftypmp42",
            b"\x1aE\xdf\xa3",
            b"RIFF\x10\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x02",
            b"GIF89a",
        ):
            with pytest.raises(SampleError):
                decode_video(head + generator.bytes(size), lambda n, _: np.arange(n))


def test_what_names_other_media_opens_none_of_them(media_dir, tmp_path, monkeypatch):
    clip = next(path for path in sorted(media_dir.rglob("*.mp4")))
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    scripts = ("ffconcat version 1.0\nfile clip.mp4\n", f"ffconcat version 1.0\nfile {tmp_path}/clip.mp4\n",
               "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nclip.mp4\n#EXT-X-ENDLIST\n",
               "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n")  # fmt: skip
    for script in scripts:
        with pytest.raises(SampleError) as lost:
            probe(script.encode(), time_limit=5)
        assert lost.value.reason == LossReason.NOT_MEDIA, script


def test_a_decode_that_takes_too_long_is_typed(media_dir):
    clip = (media_dir / "clips/moviepy/chaplin.mp4").read_bytes()
    for read in (
        lambda: probe(clip, time_limit=0.02),
        lambda: decode_video(clip, lambda n, _: np.array([n - 1]), time_limit=0.02),
    ):
        began = time.monotonic()
        with pytest.raises(SampleError) as told:
            read()
        assert told.value.reason is LossReason.TIMEOUT
        assert time.monotonic() - began < 5


def test_a_run_without_workers_loses_slow_clips_too(clip_corpus):
    """With workers, a watchdog sees them from outside; here the decoder's own limit does."""
    config = DataConfig(train=(CorpusConfig(path=str(clip_corpus)),), batch=4, workers=0, decode_timeout=1e-6)
    with pytest.raises(UserError, match="timeout: decoding took longer"):
        next(iter(TrainLoader(config, 0, steps=1)))
