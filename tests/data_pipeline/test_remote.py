"""Shards behind addresses: real requests to servers on loopback that drop, stall and fail."""

import json
import os
import shutil
import threading

import pytest
import torch

from configs.errors import UserError
from data_pipeline.config import CorpusConfig, DataConfig, FrameConfig, RemoteConfig
from data_pipeline.loader import TrainLoader
from data_pipeline.remote import CHUNK, Store
from data_pipeline.shards import Corpus
from tests.data_pipeline.servers import serving

pytest.importorskip("aiohttp")


@pytest.fixture
def folder(clip_corpus, tmp_path):
    """A bucket `bucket` with the clips in it and no card."""
    shutil.copytree(clip_corpus, tmp_path / "served" / "bucket" / "clips")
    return tmp_path / "served"


@pytest.fixture
def server(folder):
    with serving(folder) as state:
        yield state


@pytest.fixture
def card(folder):
    """The card that a build writes, as far as reading needs it."""
    names = sorted(path.name for path in (folder / "bucket" / "clips").glob("*.tar"))
    (folder / "bucket" / "clips" / "dataset.json").write_text(json.dumps({"content": "abc", "shards": names}))


@pytest.fixture
def remote(tmp_path):
    def make(**changes):
        return RemoteConfig(
            **{"cache": str(tmp_path / "cache"), "pause": 0.01, "timeout": 20, "attempts": 4, **changes}
        )

    return make


@pytest.fixture
def s3(server, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return "s3://bucket/clips"


def equal(corpus, other):
    assert corpus.keys == other.keys
    assert corpus.digest == other.digest or not other.folder.joinpath("dataset.json").exists()
    for i in (0, 17, 31, 59, 30):
        assert corpus.read(i) == other.read(i)
        assert corpus.read_meta(i) == other.read_meta(i)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("fetch", ["shards", "ranges"])
def test_a_corpus_over_http_is_the_local_one_and_comes_once(server, remote, clip_corpus, fetch):
    address = f"{server.address}/bucket/clips"
    config = remote(fetch=fetch)
    equal(Corpus.open(address, config), Corpus.open(clip_corpus))
    asked = server.bodies()
    assert asked == (4 if fetch == "shards" else 10)  # four shards were touched; five samples and their captions
    assert all(wanted is not None for path, wanted in server.requests if path.endswith(".tar"))
    indexes = sum(path.endswith(".idx") for path, _ in server.requests)
    assert indexes == 6
    equal(Corpus.open(address, config), Corpus.open(clip_corpus))
    assert server.bodies() == asked, "what is in the cache was fetched again"
    assert sum(path.endswith(".idx") for path, _ in server.requests) == indexes


@pytest.mark.parametrize("with_card", [True, False])
def test_a_corpus_on_s3_is_the_local_one(server, s3, remote, clip_corpus, with_card, request):
    if with_card:
        request.getfixturevalue("card")
    equal(Corpus.open(s3, remote()), Corpus.open(clip_corpus))
    with pytest.raises(UserError, match="lists no shards"):
        Corpus.open("s3://bucket/nothing", remote())


def test_workers_train_on_a_remote_corpus_as_on_a_local_one(server, card, remote, clip_corpus, s3):
    def batches(path, workers):
        config = DataConfig(
            train=(CorpusConfig(path=path),), batch=8, image_size=16, frames=FrameConfig(count=2), workers=workers,
            max_bad_fraction=0.5, remote=remote(),
        )  # fmt: skip
        return list(TrainLoader(config, 3, steps=4))

    local = batches(str(clip_corpus), 0)
    for path in (f"{server.address}/bucket/clips", s3):
        for a, b in zip(batches(path, 2), local, strict=True):
            assert a.keys == b.keys
            assert torch.equal(a.frames, b.frames)


@pytest.mark.usefixtures("card")
def test_a_cache_smaller_than_the_corpus_asks_for_a_window(server, remote):
    address, cache = f"{server.address}/bucket/clips", remote(cache_gb=60e-6)

    def reading(**corpus):
        train = (CorpusConfig(path=address, **corpus),)
        return TrainLoader(
            DataConfig(train=train, batch=5, image_size=16, workers=0, max_bad_fraction=0.5, remote=cache), 3, steps=12
        )

    with pytest.raises(UserError, match=r"would be fetched again and again\. Set shard_window"):
        reading()
    assert len(list(reading(shard_window=1))) == 12  # an epoch
    assert server.bodies() <= 6 + 2, "a shard comes once an epoch, but for the seams"


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("kind", ["http", "s3"])
@pytest.mark.parametrize("fault", ["drop", "503", "429", "stall"])
def test_faults_that_pass_are_waited_out(server, remote, clip_corpus, kind, fault, s3):
    server.fault = lambda path, number: fault if number < (1 if fault == "stall" else 2) and "00001" in path else None
    path = s3 if kind == "s3" else f"{server.address}/bucket/clips"
    corpus = Corpus.open(path, remote(timeout=1.0 if fault == "stall" else 20))
    assert corpus.read(15) == Corpus.open(clip_corpus).read(15)
    assert server.counts["/bucket/clips/part-000001.tar"] >= 2


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    "fault, said",
    [
        ("drop", "in 3 attempts"),
        ("503", "in 3 attempts"),
        ("stall", "in 3 attempts"),
        ("no ranges", "does not know ranges"),
        ("403", "may not be read (403"),
        ("404", "is gone"),
    ],
)
def test_faults_that_stay_end_in_a_sentence_that_names_the_shard(server, remote, fault, said):
    server.fault = lambda path, number: fault if path.endswith(".tar") else None
    config = remote(attempts=3, timeout=0.4 if fault == "stall" else 20)
    corpus = Corpus.open(f"{server.address}/bucket/clips", config)
    with pytest.raises(UserError) as told:
        corpus.read(0)
    assert said in str(told.value)
    assert f"{server.address}/bucket/clips/part-000000.tar" in str(told.value)
    assert server.bodies() == (3 if "attempts" in said else 1)
    content = [path for path in (corpus._reader.cache.folder).iterdir() if not path.name.startswith(".")]
    assert content == []


@pytest.mark.usefixtures("card")
def test_a_shard_is_fetched_in_pieces_and_goes_on_from_the_piece_that_failed(server, remote, folder):
    big = folder / "bucket" / "clips" / "big.bin"
    big.write_bytes(os.urandom(2 * CHUNK + 1000))
    server.fault = lambda path, number: "drop" if number == 1 else None
    target = folder / "copy"
    with target.open("wb", buffering=0) as file:
        Store(f"{server.address}/bucket/clips", remote()).copy("big.bin", 0, 2 * CHUNK + 1000, file)
    assert target.read_bytes() == big.read_bytes()
    begins = [int(wanted[6:].split("-")[0]) for path, wanted in server.requests]
    assert begins == [0, CHUNK, CHUNK, 2 * CHUNK]


@pytest.mark.usefixtures("card")
def test_a_cut_upload_and_a_missing_index_are_named(server, remote, folder):
    clips = folder / "bucket" / "clips"
    address = f"{server.address}/bucket/clips"
    os.truncate(clips / "part-000002.tar", 4096)
    with pytest.raises(UserError, match=r"part-000002\.tar is cut"):
        Corpus.open(address, remote()).read(25)
    (clips / "part-000003.idx").unlink()
    (clips / "dataset.json").write_text((clips / "dataset.json").read_text().replace("abc", "abd"))
    with pytest.raises(UserError, match=r"part-000003\.tar has no index part-000003.idx"):
        Corpus.open(address, remote())


@pytest.mark.usefixtures("card")
def test_many_readers_fetch_a_shard_once(server, remote, clip_corpus):
    local = Corpus.open(clip_corpus)
    corpora = [Corpus.open(f"{server.address}/bucket/clips", remote()) for _ in range(4)]
    failed = []

    def read(corpus):
        failed.extend(i for i in range(0, 60, 7) if corpus.read(i) != local.read(i))

    threads = [threading.Thread(target=read, args=(corpus,)) for corpus in corpora]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert server.bodies() == 6


def test_what_cannot_be_read_says_why(server, remote, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"has no dataset\.json and lists no shards"):
        Corpus.open(f"{server.address}/bucket", remote())
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"(?i)credentials"):
        Corpus.open("s3://bucket/clips", remote())
    with pytest.raises(UserError, match="gcsfs") as told:
        Corpus.open("gs://bucket/clips", remote())
    assert "videomamba[gs]" in told.value.cure
