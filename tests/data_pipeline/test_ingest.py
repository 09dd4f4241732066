import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline.ingest import BuildConfig, build
from data_pipeline.schema import content_digest
from data_pipeline.shards import Corpus
from data_pipeline.sources import Part, open_source
from data_pipeline.verify import verify

ROOT = Path(__file__).parents[2]


def request(source, out, **options):
    options = {"name": "set", "samples_per_shard": 6, "workers": 2, **options}
    return BuildConfig(source=source, out=out, **options)


def files_of(out):
    """The files that a build under way or done shows under final names, but for ledger and card, and their bytes."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name.startswith("set-")}


@pytest.fixture(scope="module")
def built(media_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "corpus"
    seen = []
    summary = build(request(media_folder, out), lambda *numbers: seen.append(numbers))
    return out, summary, seen


def test_every_clip_is_in_a_shard_or_named_as_lost(built, media_folder):
    out, summary, seen = built
    assert (summary.samples, summary.videos, summary.images) == (41, 40, 1)
    assert summary.captions == 43  # clip 3 has its duplicate's too, clip 5 a second row
    lost = {reason: [loss.file for loss in losses.first] for reason, losses in summary.lost.items()}
    cut_reason = next(reason for reason, files in lost.items() if "cut.mp4" in files)
    assert cut_reason in ("not_media", "decode_error")
    lost[cut_reason].remove("cut.mp4")
    assert {reason: files for reason, files in lost.items() if files} == {
        "not_media": ["text.mp4"],
        "empty_file": ["empty.mp4"],
        "duplicate": ["again.mp4"],
        "empty_caption": ["silent.mp4"],
        "missing_file": ["gone.mp4"],
    }
    assert seen[-1] == ("building", 47, 47, 6)
    built = [done for step, done, _, _ in seen if step == "building"]
    assert built == list(range(48 - len(built), 48))
    corpus = Corpus.open(out)
    by_source = {meta["source"]: (i, meta) for i, meta in enumerate(corpus.metas())}
    assert list(by_source) == [f"c{number:02d}.mp4" for number in range(40)] + ["picture.png"]
    assert by_source["c03.mp4"][1]["captions"] == ["clip 3, plain", "clip 3 under another name"]
    assert by_source["c05.mp4"][1]["captions"] == ["clip 5, plain", "another caption of clip 5"]
    sample = corpus.read(by_source["c07.mp4"][0])
    assert sample.media == (media_folder / "c07.mp4").read_bytes()
    assert sample.sha256 == content_digest(sample.media)
    assert sample.attributes == {"place": 7, "colour": "c0", "good": False}
    assert sample.probe == {
        "frames": 6,
        "width": 64,
        "height": 32,
        "fps": 10.0,
        "duration": 0.6,
        "codec": "mpeg4",
        "rotation": 0,
    }
    assert corpus.read(40).kind == "image"
    assert corpus.read(40).extension == "png"
    assert verify(out, "all") == []


def test_the_ledger_points_at_every_clip(built):
    out, _, _ = built
    corpus = Corpus.open(out)
    database = sqlite3.connect(out / "ledger.sqlite")
    rows = database.execute(
        "SELECT shard, key, offset, sha256, bytes FROM clips WHERE status = 'done' ORDER BY position"
    )
    for i, (shard, key, offset, sha256, size) in enumerate(rows):
        assert f"{shard}:{key}@{offset}" == corpus.location(i)
        media = (out / shard).read_bytes()[offset : offset + size]
        assert content_digest(media) == sha256
    assert i == 40
    database.close()


def test_the_card_says_what_is_there(built, media_folder):
    card = json.loads((built[0] / "dataset.json").read_text())
    assert (card["samples"], card["captions"], card["attributes"]) == (41, 43, ["colour", "good", "place"])
    assert card["lost"]["missing_file"] == {
        "count": 1,
        "files": [{"file": "gone.mp4", "detail": "No such file or directory"}],
    }
    assert card["sizes"] == {"64x48": 15, "64x32": 13, "64x64": 13}
    assert card["shards"] == [f"set-{n:06d}.tar" for n in range(7)]
    assert card["command"].startswith(f"videomamba data build {media_folder} {built[0]} --manifest")
    assert card["hours"] == round(sum(0.1 * (4 + n % 5) for n in range(40)) / 3600, 4)


def test_a_finished_build_does_nothing(built, media_folder):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in built[0].iterdir()}
    summary = build(request(media_folder, built[0]))
    assert summary.nothing_to_do
    assert summary.samples == 41
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in built[0].iterdir()} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples_per_shard": 7}, "its samples_per_shard is 6, not 7"),
        ({"columns": ("caption=colour",)}, r"its columns is .*'caption'.* not .*'colour'"),
        ({"min_frames": 2}, "its min_frames is 1, not 2"),
        ({"transcode": {"short_side": 32}}, "its transcode is None, not"),
    ],
)
def test_another_build_into_the_same_folder_is_refused(built, media_folder, change, words):
    before = files_of(built[0])
    with pytest.raises(UserError, match=words):
        build(request(media_folder, built[0], **change))
    assert files_of(built[0]) == before


def test_a_manifest_that_changed_is_refused(built, media_folder, tmp_path):
    changed = tmp_path / "captions.csv"
    changed.write_text((media_folder / "captions.csv").read_text() + "new.mp4,new,,,\n")
    with pytest.raises(UserError, match=r"manifest is .* not"):
        build(request(media_folder, built[0], manifest=changed))


def test_a_world_is_named_in_the_card(media_folder, tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "world.json").write_text('{"version": "7"}')
    (tmp_path / "media" / "a.mp4").write_bytes((media_folder / "c00.mp4").read_bytes())
    (tmp_path / "media" / "list.tsv").write_text("clip\ttext\na.mp4\ta grey clip\n")
    build(request(tmp_path / "media", tmp_path / "out", columns=("file=clip,caption=text",)))
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["world"] == {"version": "7"}


# Interruptions


START = """
import json, sys, time
from pathlib import Path
from data_pipeline.ingest import BuildConfig, build

def pause(step, settled, total, lost):
    if step == "building" and settled == pause_at:
        Path(sys.argv[3]).touch()
        time.sleep(100)

if __name__ == "__main__":
    pause_at = int(sys.argv[2])
    build(BuildConfig(**json.loads(sys.argv[1])), pause)
"""


def start(source, out, pause_at=-1, **options):
    """A build in a process group of its own, as from a shell; it pauses after so many clips and makes `paused`."""
    tree = {"source": str(source), "out": str(out), "name": "set", "samples_per_shard": 6, "workers": 1, **options}
    script = out.parent / "start.py"
    script.write_text(START)
    return subprocess.Popen(
        [sys.executable, script, json.dumps(tree), str(pause_at), out.parent / "paused"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None or condition(), process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def session_is_empty(process):
    """Nothing that the process started lives on; its workers lead groups of their own in the same session."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not session_of(process.pid):
            return True
        time.sleep(0.05)
    return False


def session_of(leader):
    """The processes of a session, zombies apart."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("moment", ["ledger.sqlite", "set-000000.idx", "set-000003.tar", 20])
def test_kill_9_then_the_same_call_gives_the_same_bytes(built, media_folder, tmp_path, moment):
    """Killed as soon as a file appears, wherever the build has got to by then, or in the middle of a shard."""
    out = tmp_path / "corpus"
    if isinstance(moment, int):
        process = start(media_folder, out, pause_at=moment)
        wait_for((tmp_path / "paused").exists, process)
    else:
        process = start(media_folder, out)
        wait_for((out / moment).exists, process)
    process.kill()
    process.wait()
    assert session_is_empty(process), "the processes that decode outlive their parent"
    whole = files_of(built[0])
    for name, data in files_of(out).items():
        assert data == whole[name], f"{name} is half-written under its final name"
    finished = (out / "dataset.json").exists()  # the kill may come too late, where it waits for a file
    assert not (finished and isinstance(moment, int))
    print("killed with", sorted(path.name for path in out.iterdir()))
    if not finished:
        with pytest.raises(UserError, match=r"not finished|is empty|no shards"):
            Corpus.open(out)
    summary = build(request(media_folder, out))
    assert summary.nothing_to_do == finished
    assert summary.samples == 41
    assert files_of(out) == whole
    assert not list(out.glob(".*"))
    card, other = (json.loads((folder / "dataset.json").read_text()) for folder in (built[0], out))
    assert {k: card[k] for k in ("content", "lost", "shards", "hours")} == {
        k: other[k] for k in ("content", "lost", "shards", "hours")
    }


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_double_nothing(built, media_folder, tmp_path):
    """Each corpus is killed again and again, from the first instruction on, until it gets through."""
    whole, draws, kills = files_of(built[0]), random.Random(0), 0
    begun = time.monotonic()
    start(media_folder, tmp_path / "first", workers=2).communicate()
    takes = time.monotonic() - begun
    for number in range(6):
        out = tmp_path / f"corpus{number}"
        while not (out / "dataset.json").exists():
            process = start(media_folder, out, workers=2)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=draws.uniform(0.1, 1.2) * takes)
            kills += process.poll() is None
            process.kill()
            process.communicate()
            assert session_is_empty(process)
            if out.exists():
                assert all(data == whole[name] for name, data in files_of(out).items())
        assert files_of(out) == whole
        assert verify(out, "all") == []
    print(f"{kills} kills")
    assert kills >= 6


def test_kill_9_while_ffmpeg_runs(media_dir, tmp_path):
    """ffmpeg dies with the build, what it was writing is cleared away, and the next run gives the same bytes."""
    source = tmp_path / "media"
    source.mkdir()
    for name in ("torchcodec/nasa_13013.mp4", "perception_models/dog.mp4", "exoplayer/testvid_1022ms.mp4"):
        path = Path(shutil.copy(media_dir / "clips" / name, source))
        path.with_suffix(".txt").write_text(f"a clip called {path.stem}\n")
    options = {"transcode": {"short_side": 96, "keyframes": 12}, "samples_per_shard": 1, "name": "set"}
    out = tmp_path / "corpus"
    process = start(source, out, **options)
    wait_for(lambda: any(out.glob(".scratch/*/made.mp4")), process)
    process.kill()
    process.communicate()
    assert session_is_empty(process)
    assert any(out.glob(".scratch/*/made.mp4"))
    assert build(request(source, out, **options)).samples == 3
    assert not list(out.glob(".*"))
    build(request(source, tmp_path / "undisturbed", **options))
    assert files_of(out) == files_of(tmp_path / "undisturbed")
    command = json.loads((out / "dataset.json").read_text())["command"]
    assert command.endswith("--short-side 96 --keyframes 12 --crf 23 --transcode")


def test_ctrl_c_leaves_nothing_half_written(built, media_folder, tmp_path):
    out = tmp_path / "corpus"
    process = start(media_folder, out, pause_at=20)
    wait_for((tmp_path / "paused").exists, process)
    assert list(out.glob(".*"))
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert errors.count("Traceback") == 1, errors  # the parent's KeyboardInterrupt, none of its workers'
    assert session_is_empty(process)
    assert not list(out.glob(".*"))
    build(request(media_folder, out))
    assert files_of(out) == files_of(built[0])


def test_two_builds_at_once_are_refused(media_folder, tmp_path):
    out = tmp_path / "corpus"
    process = start(media_folder, out, pause_at=10)
    wait_for((tmp_path / "paused").exists, process)
    try:
        with pytest.raises(UserError, match="Another build is writing"):
            build(request(media_folder, out))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def mount(*arguments):
    program = shutil.which("mount")
    return program is not None and subprocess.run([program, *arguments], capture_output=True).returncode == 0


def full_disk(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_full_disk_is_said_and_the_next_run_goes_on(built, media_folder, tmp_path):
    """A real small disk where we may mount one, else a limit on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    out = disk / "corpus"
    mounted = mount("-t", "tmpfs", "-o", "size=120k", "tmpfs", disk)
    code = "import sys; from data_pipeline.cli import app; sys.argv[0] = 'data'; app(standalone_mode=False)"
    command = [sys.executable, "-c", code, "build", media_folder, out, "--name", "set", "--samples-per-shard", "6"]
    try:
        failed = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "1000"},
            preexec_fn=None if mounted else lambda: full_disk(20_000),
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert failed.returncode != 0
        assert "UserError" in failed.stderr, failed.stderr
        assert "Free some space" in failed.stderr
        # On the small disk a shard is the first that does not fit, under the limit it is the ledger.
        assert ("disk that is full" if mounted else "ledger.sqlite cannot be written") in failed.stderr
        whole = files_of(built[0])
        assert all(data == whole[name] for name, data in files_of(out).items())
        assert not list(out.glob(".*"))
        if mounted:
            assert mount("-o", "remount,size=64m", disk)
        build(request(media_folder, out))
        assert files_of(out) == whole
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)


# Wrong requests


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,text\na.mp4,x\n", "no column 'file'; it has path, text"),
        ("file,captions\na.mp4,x\n", "no column 'caption'.*Did you mean 'captions'"),
        ("file,caption\na.mp4,\nb.mp4,  \n", "Every caption in column 'caption' .* is empty"),
        ("file,caption\n", "a header and no rows"),
        ("", "has no column 'file'; it has nothing in it"),
        ("file,caption\na.mp4,red, green\n", r"Row 1 of .* has 3 fields, the header has 2.*double quotes"),
        ("file,caption\n,red\n", "Row 1 of .* names no file"),
        ("file,caption\na.mp4,red\nb.mp4,blue\n", r"None of the 2 files .* \(the first is a.mp4\)"),
    ],
)
def test_a_manifest_that_is_wrong(tmp_path, text, words):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=words) as failure:
        build(request(tmp_path, tmp_path / "out"))
    assert failure.value.exit_code == 2
    if (tmp_path / "out").exists():
        assert not files_of(tmp_path / "out")


def test_a_source_that_is_wrong(tmp_path):
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "notes.md").touch()
    for source, manifest, words in [
        (tmp_path / "nowhere", None, "no source folder"),
        (empty, None, "is empty"),
        (other, None, "no manifest .* no tar and no media in"),
        (other, tmp_path / "no.csv", "no manifest"),
        (tmp_path / "nowhere", tmp_path / "no.csv", "no source folder"),
    ]:
        with pytest.raises(UserError, match=words) as failure:
            build(request(source, tmp_path / "out", manifest=manifest))
        assert failure.value.exit_code == 2
        assert not (tmp_path / "out").exists()
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.tsv").touch()
    with pytest.raises(UserError, match=r"2 manifests \(a.csv, b.tsv\)"):
        open_source(tmp_path)
    (other / "latin.csv").write_bytes("file,caption\na.mp4,é\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        list(open_source(other).clips(Part()))


def test_a_corpus_of_which_nothing_is_left(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    (tmp_path / "list.csv").write_text("file,caption\na.mp4,a caption\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"Not one clip .* \(1 not_media\): a.mp4") as failure:
            build(request(tmp_path, tmp_path / "out"))
        assert failure.value.exit_code == 1
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_folders_that_hold_something_else(media_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        build(request(media_folder, tmp_path / "file"))
    (tmp_path / "foreign.tar").touch()
    with pytest.raises(UserError, match="no ledger"):
        build(request(media_folder, tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    (other / "ledger.sqlite").write_text("this is no database" * 100)
    with pytest.raises(UserError, match="cannot be used as a ledger"):
        build(request(media_folder, other))
