"""What a build that has finished, or had losses, does when it is run again."""

import json
import sqlite3

import pytest

from configs.errors import UserError
from data_pipeline.ingest import BuildConfig, build
from data_pipeline.shards import Corpus
from data_pipeline.verify import verify


@pytest.fixture
def source(tmp_path, ramp):
    """Five good clips; two that are missing, one that is text, one without captions."""
    folder = tmp_path / "media"
    folder.mkdir()
    rows = ["file,caption"] + [f"{name}.mp4,clip {name}" for name in "abcdefgh"] + ["silent.mp4,"]
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    for number, name in enumerate("abcde"):
        (folder / f"{name}.mp4").write_bytes(ramp(6, number))
    (folder / "f.mp4").write_text("no video yet")
    (folder / "silent.mp4").write_bytes(ramp(6, 9))
    return folder


def run(source, **options):
    out = source.parent / "out"
    return build(BuildConfig(source=source, out=out, name="set", samples_per_shard=2, workers=1, **options))


def lost(summary):
    return {reason: [loss.file for loss in losses.first] for reason, losses in summary.lost.items()}


def shards(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name.startswith("set-")}


def test_failed_clips_are_tried_again_and_nothing_else(source, ramp):
    out = source.parent / "out"
    first = run(source)
    assert (first.samples, first.shards) == (5, 3)
    assert lost(first) == {
        "empty_caption": ["silent.mp4"],
        "missing_file": ["g.mp4", "h.mp4"],
        "not_media": ["f.mp4"],
    }
    before = shards(out)
    (source / "f.mp4").write_bytes(ramp(6, 5))
    (source / "g.mp4").write_bytes((source / "b.mp4").read_bytes())  # content that an earlier run has built
    assert run(source).nothing_to_do
    some = run(source, retry=("missing_file",))
    assert (some.retried, some.samples) == (2, 5)
    assert lost(some) == {
        "duplicate": ["g.mp4"],
        "empty_caption": ["silent.mp4"],
        "missing_file": ["h.mp4"],
        "not_media": ["f.mp4"],
    }
    assert some.lost["duplicate"].first[0].detail == "same content as b.mp4"
    rest = run(source, retry=("failed",))
    assert (rest.retried, rest.samples, rest.shards) == (2, 6, 4)
    assert lost(rest) == {"duplicate": ["g.mp4"], "empty_caption": ["silent.mp4"], "missing_file": ["h.mp4"]}
    after = shards(out)
    assert {name: after[name] for name in before} == before
    assert sorted(after.keys() - before.keys()) == ["set-000003.idx", "set-000003.tar"]
    corpus = Corpus.open(out)
    assert [meta["source"] for meta in corpus.metas()] == [f"{name}.mp4" for name in "abcdef"]
    assert corpus.keys == [f"{row:09d}" for row in range(6)]
    assert verify(out, "all") == []
    assert json.loads((out / "dataset.json").read_text())["samples"] == 6


def test_media_of_a_folder_may_be_mended(source, ramp):
    for name in ("list.csv", "silent.mp4"):
        (source / name).unlink()
    for path in source.glob("*.mp4"):
        path.with_suffix(".txt").write_text(f"clip {path.stem}")
    assert lost(run(source)) == {"not_media": ["f.mp4"]}
    (source / "f.mp4").write_bytes(ramp(6, 5))
    assert run(source, retry=("failed",)).samples == 6
    (source / "f.txt").write_text("another caption")
    with pytest.raises(UserError, match="has changed since the build in"):
        run(source)


def test_nothing_to_try_again_is_nothing_to_do(source):
    run(source)
    summary = run(source, retry=("timeout", "decode_error"))
    assert summary.nothing_to_do
    assert summary.retried == 0
    with pytest.raises(
        UserError, match=r"'duplicate' is nothing that can be tried again.*failed, or one of missing_file"
    ):
        run(source, retry=("duplicate",))


def test_a_corpus_is_unfinished_while_clips_are_tried_again(source, ramp):
    """A retry that is interrupted leaves no card, and the plain command ends it."""
    run(source)
    (source / "f.mp4").write_bytes(ramp(6, 5))
    (source / "g.mp4").write_bytes(ramp(6, 6))
    seen = []

    def interrupt(step, done, total, lost):
        seen.append(step)
        if step == "building":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(
            BuildConfig(
                source=source, out=source.parent / "out", name="set", samples_per_shard=2, workers=1, retry=("failed",)
            ),
            interrupt,
        )
    assert seen[-1] == "building"
    with pytest.raises(UserError, match="has not finished"):
        Corpus.open(source.parent / "out")
    summary = run(source)
    assert (summary.samples, summary.resumed, summary.nothing_to_do) == (7, True, False)
    assert verify(source.parent / "out", "all") == []


def test_equal_outcomes_of_different_files_are_found_too(source, ramp):
    """Two files that differ only in what a transcode drops: found by the content that would be stored twice."""
    (source / "f.mp4").write_bytes((source / "a.mp4").read_bytes() + b"\0\0\0\x10free" + bytes(8))
    summary = run(source, transcode={"short_side": 24})
    assert lost(summary)["duplicate"] == ["f.mp4"]
    assert summary.samples == 5


def test_a_ledger_of_another_version_is_refused(source):
    run(source)
    with sqlite3.connect(source.parent / "out" / "ledger.sqlite") as database:
        database.execute("PRAGMA user_version = 1")
    database.close()
    with pytest.raises(UserError, match="version 1, this program writes version 2"):
        run(source)


def test_a_readme_of_somebody_else_stays(source):
    (source.parent / "out").mkdir()
    (source.parent / "out" / "README.md").write_text("mine")
    run(source)
    assert (source.parent / "out" / "README.md").read_text() == "mine"
    (source.parent / "out" / "README.md").unlink()
    (source.parent / "out" / "dataset.json").unlink()
    run(source)
    page = (source.parent / "out" / "README.md").read_text()
    for words in (
        "# set",
        "| samples | 5 (5 videos, 0 images) |",
        "| missing_file | 2 | `g.mp4`, `h.mp4` |",
        "videomamba data build",
    ):
        assert words in page
