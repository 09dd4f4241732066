"""Shards that others made: indexed where they are, or built anew from."""

import io
import json
import tarfile

import pytest

from configs.errors import UserError
from data_pipeline.ingest import BuildConfig, build
from data_pipeline.shards import Corpus
from data_pipeline.verify import verify


@pytest.fixture
def foreign(tmp_path, ramp):
    """Two tars as video2dataset writes them (and one sample as WebDataset's users do), with what can be wrong."""
    folder = tmp_path / "foreign"
    folder.mkdir()

    def told(caption, **more):
        return json.dumps({"caption": caption, "status": "success", **more}).encode()

    write(
        folder / "00000.tar",
        ("000000000.mp4", ramp(5, 0)),
        ("000000000.txt", b"grey 0"),
        ("000000000.json", told("grey 0", url="u0")),
        ("000000001.json", told("text, no video")),
        ("000000001.mp4", b"no video"),
        ("000000002.mp3", b"sound"),
        ("000000002.json", told("only sound")),
        ("000000003.txt", b"a caption\nof two lines\n"),
        ("000000003.mp4", ramp(6, 3)),
    )
    write(
        folder / "00001.tar",
        ("a b/000000010.json", told(["one", "two"])),
        ("a b/000000010.m4a", b"sound"),
        ("a b/000000010.mp4", ramp(7, 10)),
        ("000000011.mp4", ramp(5, 0)),
        ("000000011.txt", b"the first clip again"),
        ("000000012.mp4", ramp(5, 12)),
        ("000000012.json", told(None)),
    )
    return folder


def write(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def lost(summary):
    return {reason: [loss.file for loss in losses.first] for reason, losses in summary.lost.items()}


LOST = {
    "damaged_shard": ["00000.tar:000000002.mp3"],
    "not_media": ["00000.tar:000000001.mp4"],
    "duplicate": ["00001.tar:000000011.mp4"],
    "empty_caption": ["00001.tar:000000012.mp4"],
}


def test_shards_are_indexed_where_they_are(foreign):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in foreign.iterdir()}
    summary = build(BuildConfig(source=foreign, out=None, workers=1))
    assert (summary.samples, summary.captions) == (3, 4)
    assert lost(summary) == LOST
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    corpus = Corpus.open(foreign)
    read = [corpus.read(i) for i in range(len(corpus))]
    assert [(s.key, s.captions) for s in read] == [
        ("000000000", ("grey 0",)),
        ("000000003", ("a caption\nof two lines",)),
        ("a b/000000010", ("one", "two")),
    ]
    assert verify(foreign, "all") == []
    lines = (foreign / "00001.idx").read_text().splitlines()
    with tarfile.open(foreign / "00001.tar") as tar:
        place = {member.name: member.offset_data for member in tar}
    name = "a b/000000010"
    sizes = {
        m: len(data) for m, data in (("m4a", b"sound"), ("json", read_member(foreign / "00001.tar", f"{name}.json")))
    }
    assert lines == [
        "v1.2 1",
        f"mp4 {place[f'{name}.mp4']} {len(read[2].media)} {name}.mp4 "
        f"json {place[f'{name}.json']} {sizes['json']} {name}.json m4a {place[f'{name}.m4a']} 5 {name}.m4a",
    ]
    assert build(BuildConfig(source=foreign, out=None)).nothing_to_do


def read_member(path, name):
    with tarfile.open(path) as tar:
        return tar.extractfile(name).read()


def test_an_index_made_by_wds2idx_is_read(foreign):
    """As DALI's script lists them: every member of a sample, in the order of the tar."""
    with tarfile.open(foreign / "00000.tar") as tar:
        place = {member.name: f"{member.offset_data} {member.size} {member.name}" for member in tar}
    first = " ".join(f"{ext} {place[f'000000000.{ext}']}" for ext in ("mp4", "txt", "json"))
    last = " ".join(f"{ext} {place[f'000000003.{ext}']}" for ext in ("txt", "mp4"))
    (foreign / "00000.idx").write_text(f"v1.2 2\n{first}\n{last}\n")
    (foreign / "00001.tar").unlink()
    corpus = Corpus.open(foreign)
    assert [corpus.read(i).captions for i in range(2)] == [("grey 0",), ("a caption\nof two lines",)]
    (foreign / "00000.idx").write_text(f"v1.2 1\nmp3 {place['000000002.mp3']}\n")
    with pytest.raises(UserError, match="expected a medium and a json or txt"):
        Corpus.open(foreign)


def test_a_sample_that_changed_in_place_is_named(foreign):
    build(BuildConfig(source=foreign, out=None, workers=1))
    corpus = Corpus.open(foreign)
    data = bytearray((foreign / "00000.tar").read_bytes())
    data[corpus.offset(1) + 300] ^= 1
    (foreign / "00000.tar").write_bytes(data)
    (fault,) = verify(foreign)
    assert (fault.shard, fault.key, fault.offset) == ("00000.tar", "000000003", corpus.offset(1))
    assert fault.what == "the medium has another sha256 than the ledger says"
    data[corpus.offset(1) + 300] ^= 1
    at = data.index(b"a caption\nof")
    data[at] = ord("A")
    (foreign / "00000.tar").write_bytes(data)
    assert [fault.what for fault in verify(foreign)] == ["it has other captions than the ledger says"]


def test_shards_are_built_anew_and_again_from_our_own(foreign, tmp_path):
    first = BuildConfig(source=foreign, out=tmp_path / "small", workers=1, transcode={"short_side": 24})
    summary = build(first)
    assert summary.samples == 3
    assert lost(summary) == LOST
    corpus = Corpus.open(tmp_path / "small")
    read = [corpus.read(i) for i in range(3)]
    assert [s.source for s in read] == [
        "00000.tar:000000000.mp4",
        "00000.tar:000000003.mp4",
        "00001.tar:a b/000000010.mp4",
    ]
    assert read[0].captions == ("grey 0", "the first clip again")  # the duplicate's too
    assert [s.attributes for s in read] == [{"status": "success", "url": "u0"}, {}, {"status": "success"}]
    assert {(s.probe["width"], s.probe["height"]) for s in read} == {(32, 24)}
    build(BuildConfig(source=tmp_path / "small", out=tmp_path / "one", workers=1, samples_per_shard=1))
    again = Corpus.open(tmp_path / "one")
    assert len(again.shards) == 3
    for old, new in zip(read, (again.read(i) for i in range(3)), strict=True):
        assert (new.media, new.captions, new.attributes, new.sha256) == (
            old.media,
            old.captions,
            old.attributes,
            old.sha256,
        )
    assert verify(tmp_path / "one", "all") == []


def test_a_tar_that_breaks_off_keeps_what_stands_before(foreign):
    path = foreign / "00001.tar"
    with tarfile.open(path) as tar:
        cut = tar.getmember("000000012.mp4").offset_data + 100
    path.write_bytes(path.read_bytes()[:cut])
    summary = build(BuildConfig(source=foreign, out=None, workers=1))
    assert summary.samples == 3
    assert "00001.tar: a tar reader gives up: unexpected end of data" in {
        f"{loss.file}: {loss.detail}" for loss in summary.lost["damaged_shard"].first
    }
    assert len(Corpus.open(foreign)) == 3


def test_what_cannot_be_done_in_place(foreign, tmp_path, ramp):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.mp4").write_bytes(ramp())
    for options, words in [
        ({"source": tmp_path / "media"}, "no shards to index in place"),
        ({"source": foreign, "part": "1/2"}, "as they are, a folder at a time"),
        ({"source": foreign, "transcode": {}}, "as they are, a folder at a time"),
        ({"source": foreign / "00000.tar"}, "as they are, a folder at a time"),
    ]:
        with pytest.raises(UserError, match=words):
            build(BuildConfig(out=None, **options))
