import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline.ingest import BuildConfig, build
from data_pipeline.merge import merge
from data_pipeline.shards import Corpus
from data_pipeline.verify import verify

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory, ramp):
    """Twelve clips, some with two captions, of which c09 is c02 again under other words; one is missing."""
    folder = tmp_path_factory.mktemp("media")
    rows = ["file,caption,n"] + [f"c{n:02d}.mp4,clip {n},{n}" for n in range(12)]
    rows += [f"c{n:02d}.mp4,again {n},{n}" for n in range(0, 12, 3)] + ["gone.mp4,not there,0"]
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    for n in range(12):
        (folder / f"c{n:02d}.mp4").write_bytes(ramp(5, 2 if n == 9 else n))
    return folder


def request(source, out, **options):
    return BuildConfig(source=source, out=out, name="set", samples_per_shard=2, workers=1, **options)


@pytest.fixture(scope="module")
def built_parts(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("parts") / "corpus"
    for index in (2, 3, 1):
        build(request(source, out, part=f"{index}/3"))
    return out


@pytest.fixture
def parts(built_parts, tmp_path):
    return Path(shutil.copytree(built_parts, tmp_path / "corpus"))


def contents(folder):
    corpus = Corpus.open(folder)
    read = [corpus.read(i) for i in range(len(corpus))]
    return {s.source: (s.key, s.media, s.captions, s.attributes) for s in read}


def test_parts_merge_into_what_one_build_makes(source, parts, tmp_path):
    whole = tmp_path / "whole"
    one = build(request(source, whole))
    summary = merge(parts)
    assert (summary.samples, summary.captions) == (one.samples, one.captions) == (11, 16)
    assert {reason: losses.count for reason, losses in summary.lost.items()} == {"duplicate": 1, "missing_file": 1}
    assert summary.lost["duplicate"].first == one.lost["duplicate"].first
    assert contents(parts) == contents(whole)
    assert contents(parts)["c02.mp4"][2] == ("clip 2", "clip 9", "again 9")
    assert sorted(path.name for path in parts.iterdir() if path.is_dir()) == []
    card = json.loads((parts / "dataset.json").read_text())
    assert card["shards"] == sorted(path.name for path in parts.glob("*.tar"))
    assert card["command"].startswith(f"videomamba data build {source} {parts} --manifest")
    assert verify(parts, "all") == []
    before = {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert merge(parts).nothing_to_do
    assert {path: path.stat().st_mtime_ns for path in parts.iterdir()} == before
    assert build(request(source, parts)).nothing_to_do  # the merged corpus goes on as one build
    (source / "gone.mp4").write_bytes((source / "c01.mp4").read_bytes() + b"\0\0\0\x08free")
    try:
        again = build(request(source, parts, retry=("failed",)))
    finally:
        (source / "gone.mp4").unlink()
    assert (again.retried, again.samples) == (1, 12)
    assert verify(parts, "all") == []


def test_shards_that_do_not_change_are_not_copied(parts):
    before = {path.stat().st_ino for path in parts.rglob("*.tar")}
    merge(parts, keep_parts=True)
    after = {path.stat().st_ino for path in parts.glob("*.tar")}
    assert len(after - before) <= 2  # the shards of c02 and c09
    assert len(after & before) >= 4
    assert len(list(parts.glob("part-*"))) == 3
    assert verify(parts, "all") == []


KILLED = """
import os, signal, sys
from pathlib import Path
from data_pipeline import merge as module

count = int(sys.argv[2])

def die(*_):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[3] == "removing":
    module.shutil.rmtree = lambda path: (os.unlink(path / "dataset.json"), die(), None)
    module.merge(Path(sys.argv[1]))
else:
    module.merge(Path(sys.argv[1]), die)
"""


@pytest.mark.parametrize(("moment", "count"), [("merging", 0), ("merging", 2), ("merging", 5), ("removing", 1)])
def test_kill_9_then_merge_again(source, parts, built_parts, tmp_path, moment, count):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    killed = subprocess.run(
        [sys.executable, script, parts, str(count), moment], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert killed.returncode == -signal.SIGKILL
    if moment == "merging":
        with pytest.raises(UserError, match="has not finished"):
            Corpus.open(parts)
    merge(parts)
    whole = Path(shutil.copytree(built_parts, tmp_path / "undisturbed"))
    merge(whole)
    tars = {path.name: path.read_bytes() for path in whole.glob("set-*")}
    assert {path.name: path.read_bytes() for path in parts.glob("set-*")} == tars
    assert not list(parts.glob("part-*"))
    assert not list(parts.glob(".*"))
    assert verify(parts, "all") == []


def test_parts_that_do_not_belong_together(source, parts, tmp_path):
    part = parts / "part-00002-of-00003"
    aside = part.rename(tmp_path / "aside")
    with pytest.raises(UserError, match="lacks 1 of 3 parts: 2/3") as failure:
        merge(parts)
    assert failure.value.exit_code == 2
    build(request(source, parts, part="2/3", min_frames=3))
    with pytest.raises(UserError, match=r"part-00002-of-00003 is of another build .* its min_frames is 3, not 1"):
        merge(parts)
    shutil.rmtree(part)
    aside.rename(part)
    (part / "dataset.json").rename(part / "card")
    with pytest.raises(UserError, match="1 of 3 parts are not finished: part-00002-of-00003"):
        merge(parts)
    (part / "card").rename(part / "dataset.json")
    shutil.copytree(part, parts / "part-00001-of-00002")
    with pytest.raises(UserError, match=r"parts of several divisions \(of 2, of 3\), which overlap"):
        merge(parts)
    shutil.rmtree(parts / "part-00001-of-00002")
    shutil.rmtree(part)
    shutil.copytree(parts / "part-00001-of-00003", part)
    with pytest.raises(UserError, match=r"part-00002-of-00003 holds c.*mp4, which another part has too"):
        merge(parts)
    assert not list(parts.glob("*.tar"))
    empty = tmp_path / "empty"
    with pytest.raises(UserError, match="no folder"):
        merge(empty)
    empty.mkdir()
    with pytest.raises(UserError, match=r"no parts in .*--part 1/4"):
        merge(empty)


def test_parts_beside_another_corpus_are_left_alone(source, parts, tmp_path):
    other = tmp_path / "other"
    build(request(source, other))
    (parts / "part-00001-of-00003").rename(other / "part-00001-of-00003")
    with pytest.raises(UserError, match="holds a build of its own beside the parts"):
        merge(other)
    assert (other / "part-00001-of-00003" / "dataset.json").exists()
