import json
import os
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest

from configs.errors import UserError
from data_pipeline.schema import LossReason, Sample, SampleError, content_digest
from data_pipeline.shards import Corpus, ShardWriter
from data_pipeline.verify import verify


def numbered(number):
    media = bytes([number % 251]) * (100 + 37 * number)
    return Sample(
        key=f"{number:09d}",
        media=media,
        extension="mp4" if number % 3 else "webm",
        kind="video",
        captions=(f"clip {number}", "über “quotes” \n lines"),
        source=f"folder/{number}.mp4",
        sha256=content_digest(media),
        probe={"frames": number, "fps": 12.5},
        attributes={"colour": f"c{number % 3}", "n": number} if number != 4 else {},
    )


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(tmp_path, "set", 5) as writer:
        for number in range(13):
            writer.write(numbered(number))
    return tmp_path


def test_what_is_written_is_read(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        f"set-00000{shard}.{suffix}" for shard in range(3) for suffix in ("idx", "tar")
    ]
    corpus = Corpus.open(folder)
    assert len(corpus) == 13
    assert corpus.keys == [f"{number:09d}" for number in range(13)]
    for number in (12, 0, 7, 5, 4):
        assert corpus.read(number) == numbered(number)
    assert corpus.read_meta(3)["captions"] == list(numbered(3).captions)
    assert corpus.attribute("n") == [n if n != 4 else None for n in range(13)]
    assert corpus.location(6) == f"set-000001.tar:000000006@{corpus.offset(6)}"
    with pytest.raises(UserError, match=r"attribute 'colr'.*colour, n"):
        corpus.attribute("colr")


def test_webdataset_alone_reads_the_shards(folder):
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == Corpus.open(folder).keys
    for number, sample in enumerate(found):
        expected = numbered(number)
        assert sample[expected.extension] == expected.media
        assert json.loads(sample["json"])["captions"] == list(expected.captions)


def test_the_index_is_wds2idx_text_v1_2(folder):
    """The layout that DALI's wds2idx 1.2 writes: extension, offset of the data, size and name of each member."""
    lines = (folder / "set-000001.idx").read_text().splitlines()
    assert lines[0] == "v1.2 5"
    with tarfile.open(folder / "set-000001.tar") as tar:
        members = [(m.name.partition(".")[2], m.offset_data, m.size, m.name) for m in tar]
    pairs = [members[i] + members[i + 1] for i in range(0, len(members), 2)]
    assert lines[1:] == [" ".join(map(str, pair)) for pair in pairs]


def test_equal_samples_give_equal_bytes(folder, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    with ShardWriter(again, "set", 5) as writer:
        for number in range(13):
            writer.write(numbered(number))
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert Corpus.open(folder).digest == Corpus.open(again).digest


def test_the_digest_tells_corpora_apart(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    with ShardWriter(other, "set", 5) as writer:
        for number in range(12):
            writer.write(numbered(number))
    assert Corpus.open(folder).digest != Corpus.open(other).digest


def test_a_writer_that_fails_leaves_only_whole_shards(tmp_path):
    def write_and_fail():
        with ShardWriter(tmp_path, "set", 5) as writer:
            for number in range(7):
                writer.write(numbered(number))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set-000000.idx", "set-000000.tar"]


def _read_many(corpus, seed):
    return [corpus.read((seed * 7 + i * 5) % len(corpus)).key for i in range(100)]


def test_processes_and_threads_read_at_once(folder, monkeypatch):
    monkeypatch.setattr("data_pipeline.shards._OPEN_FILES", 1)  # threads take one another's files away
    corpus = Corpus.open(folder)
    expected = {seed: [f"{(seed * 7 + i * 5) % 13:09d}" for i in range(100)] for seed in range(8)}
    corpus.read(0)  # a file is open when the processes start
    assert pickle.loads(pickle.dumps(corpus)).read(5) == numbered(5)
    for method in ("fork", "spawn"):
        with ProcessPoolExecutor(2, get_context(method)) as pool:
            assert dict(zip(range(4), pool.map(_read_many, [corpus] * 4, range(4)), strict=True)) == {
                seed: expected[seed] for seed in range(4)
            }
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(_read_many, [corpus] * 8, range(8))) == list(expected.values())


def test_a_folder_that_is_no_corpus_is_refused(tmp_path, folder):
    for broken, words in [
        (tmp_path / "nowhere", "no corpus folder"),
        (tmp_path / "empty", "is empty"),
        (tmp_path / "other", r"no shards \(\*.tar\)"),
    ]:
        if broken.name != "nowhere":
            broken.mkdir()
        if broken.name == "other":
            (broken / "readme.txt").write_text("hello")
        with pytest.raises(UserError, match=words) as failure:
            Corpus.open(broken)
        assert failure.value.exit_code == 2
    (folder / "ledger.sqlite").touch()
    with pytest.raises(UserError, match="has not finished"):
        Corpus.open(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: os.truncate(folder / "set-000001.tar", 4000),
            r"set-000001.tar is cut: it has 4000 bytes.*\d{4}",
        ),
        (lambda folder: (folder / "set-000002.idx").unlink(), "has no index set-000002.idx"),
        (lambda folder: os.truncate(folder / "set-000000.idx", 150), "set-000000.idx promises 5 samples"),
        (lambda folder: (folder / "set-000000.idx").write_text("v1.1 3\n"), "begins with 'v1.1 3'"),
        (
            lambda folder: (folder / "dataset.json").write_text('{"shards": ["set-000003.tar"]}'),
            "lacks the shard set-000003",
        ),
    ],
)
def test_a_damaged_corpus_is_named_and_verify_agrees(folder, damage, words):
    damage(folder)
    with pytest.raises(UserError, match=words) as failure:
        Corpus.open(folder)
    assert failure.value.cure
    assert verify(folder, decode_sample=0)


def test_damage_inside_a_shard_is_one_lost_sample(folder):
    corpus = Corpus.open(folder)
    with (folder / "set-000001.tar").open("r+b") as file:
        file.seek(corpus.offset(6) - 512)  # the tar header of sample 6
        file.write(bytes(100))
    with pytest.raises(SampleError, match=r"set-000001\.tar:000000006") as failure:
        corpus.read(6)
    assert failure.value.reason is LossReason.DAMAGED_SHARD
    assert corpus.read(5) == numbered(5)
    assert corpus.read(7) == numbered(7)


def test_a_shard_that_is_cut_or_vanishes_while_it_is_read(folder):
    corpus = Corpus.open(folder)
    os.truncate(folder / "set-000000.tar", 2000)
    with pytest.raises(SampleError, match=r"ends .* bytes before"):
        corpus.read(4)
    (folder / "set-000002.tar").unlink()
    with pytest.raises(UserError, match=r"set-000002.tar is gone"):
        corpus.read(12)


def test_many_samples_open_from_the_index_alone(tmp_path):
    """10 shards of 20,000 samples whose tars are holes: opening reads none of them."""
    line = "mp4 {} 700 {:09d}.mp4 json {} 300 {:09d}.json\n"
    for shard in range(10):
        first = shard * 20_000
        rows = (line.format(2560 * i + 512, first + i, 2560 * i + 2048, first + i) for i in range(20_000))
        (tmp_path / f"big-{shard:06d}.idx").write_text("v1.2 20000\n" + "".join(rows))
        with (tmp_path / f"big-{shard:06d}.tar").open("wb") as tar:
            tar.truncate(2560 * 20_000 + 1024)  # a hole: no bytes on the disk
    corpus = Corpus.open(tmp_path)
    assert len(corpus) == 200_000
    assert corpus.location(123456) == "big-000006.tar:000123456@8847872"
