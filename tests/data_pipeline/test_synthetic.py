"""The rendered world as files: what ffmpeg wrote is what was drawn, clip by clip."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from configs.errors import UserError
from data_pipeline import ffmpeg as ffmpeg_place
from data_pipeline.ffmpeg import _wheel_program
from data_pipeline.synthetic import COLUMNS, KEYFRAME_EVERY, render_batch, render_world
from data_pipeline.world import CAMERAS, DISCLAIMER, WORLD_VERSION, WorldConfig, clip_specs
from data_pipeline.world_damage import WAYS, damaged
from data_pipeline.world_render import render_clip

SMALL = WorldConfig(train=126, val=4, test=10, images=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world, rendered by two processes."""
    out = tmp_path_factory.mktemp("rendered") / "world"
    seen = []
    summary = render_world(out, SMALL, workers=2, progress=lambda done, total: seen.append((done, total)))
    assert summary.rendered == ("train", "val", "test", "images")
    assert summary.kept == ()
    assert summary.files == 146
    assert seen[0] == (0, 146)
    assert seen[-1] == (146, 146)
    assert sorted(seen) == seen
    return out


def decoded(path):
    """Frames (T, H, W, 3), their times in seconds, the stream's rate and codec, and which are keyframes."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        shown = [
            (frame.to_ndarray(format="rgb24"), frame.pts * frame.time_base, frame.key_frame)
            for frame in container.decode(stream)
        ]
        return (
            np.stack([frame for frame, _, _ in shown]),
            [when for _, when, _ in shown],
            [key for _, _, key in shown],
            stream.average_rate,
            stream.codec_context.name,
            stream.codec_context.pix_fmt,
        )


def apart(one, other):
    """Mean absolute difference of two frames, in levels."""
    return np.abs(one.astype(int) - other.astype(int)).mean()


def test_the_folder_holds_the_splits_and_nothing_half_written(world):
    assert sorted(path.name for path in world.iterdir()) == ["images", "test", "train", "val", "world.json"]
    for split, count in (("train", 126 - 1), ("val", 4), ("test", 10), ("images", 6)):  # one damaged clip is missing
        names = sorted(path.name for path in (world / split).iterdir())
        assert len(names) == count + 1
        assert names[0] == "captions.csv"


def test_world_json_says_what_it_is(world):
    card = json.loads((world / "world.json").read_text())
    assert card["version"] == WORLD_VERSION
    assert card["note"] == DISCLAIMER
    assert "not a benchmark" in card["note"]
    assert {key: card[key] for key in ("seed", "train", "val", "test", "images")} == {
        "seed": 0, "train": 126, "val": 4, "test": 10, "images": 6,
    }  # fmt: skip
    assert card["damaged"] == damaged(SMALL)
    assert set(card["damaged"].values()) == set(WAYS)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_file_holds_its_own_clip_and_no_frame_of_its_neighbours(world, split):
    harmed = {Path(file).name for file in damaged(SMALL)}
    sizes = set()
    for spec in clip_specs(SMALL, split):
        if spec.name in harmed and split == "train":
            continue
        frames, times, keys, rate, codec, pixels = decoded(world / split / spec.name)
        drawn = render_clip(spec)
        assert frames.shape == drawn.shape == (spec.frames, spec.height, spec.width, 3)
        assert times == [Fraction(t) / spec.rate for t in range(spec.frames)]
        assert (rate, codec, pixels) == (spec.rate, "h264", "yuv420p")
        assert [t for t, key in enumerate(keys) if key] == list(range(0, spec.frames, KEYFRAME_EVERY))
        assert max(apart(a, b) for a, b in zip(frames, drawn, strict=True)) < 8
        sizes.add((spec.width, spec.height, spec.rate))
    assert split != "train" or sizes == set(CAMERAS)


def test_the_index_stands_before_the_pictures(world):
    content = (world / "test" / "test-000000.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_pictures_are_the_drawn_frames(world):
    for spec in clip_specs(SMALL, "images"):
        (frame,) = decoded(world / "images" / spec.name)[0]
        np.testing.assert_array_equal(frame, render_clip(spec)[0])


@pytest.mark.parametrize("split", ["train", "val", "test", "images"])
def test_the_table_agrees_with_the_specs(world, split):
    with (world / split / "captions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    captions = defaultdict(list)
    for row in rows:
        captions[row["file"]].append(row["caption"])
    specs = {spec.name: spec for spec in clip_specs(SMALL, split)}
    assert {name: tuple(found) for name, found in captions.items()} == {n: s.captions for n, s in specs.items()}
    for row in rows:
        spec = specs[row["file"]]
        first = spec.objects[0].what
        motion = "none" if split == "images" else first.motion
        assert (row["shape"], row["colour"], row["size"], row["motion"]) == (*first[:3], motion)
        assert row["look"] == f"{first.colour} {first.shape}"
        assert row["seen"] == str(spec.seen).lower()
        assert int(row["objects"]) == len(spec.objects)
    assert Counter(row["seen"] for row in rows)["false"] >= (len(rows) / 2 if split in ("val", "test") else 0)


@pytest.mark.parametrize("way", list(WAYS))
def test_damaged_files_do_not_decode(world, way):
    (file,) = (file for file, how in damaged(SMALL).items() if how == way)
    assert file.startswith("train/")
    with pytest.raises((av.error.InvalidDataError, FileNotFoundError)):
        decoded(world / file)


def test_a_small_training_split_is_damaged_less():
    assert damaged(WorldConfig(train=19)) == {}
    assert list(damaged(WorldConfig(train=40)).values()) == list(WAYS)[:2]
    assert damaged(WorldConfig(train=400)) == damaged(WorldConfig(train=4000)) != damaged(WorldConfig(seed=1))


def test_a_batch_of_one_clip_is_one_file(tmp_path):
    spec = replace(clip_specs(WorldConfig(test=1, train=0), "test")[0], frames=32, rate=Fraction(8))
    assert render_batch([spec], tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == [spec.name]
    assert len(decoded(tmp_path / spec.name)[0]) == 32


# ---- again, elsewhere, interrupted


def test_run_again_it_keeps_finished_splits_and_renders_the_missing_one(tmp_path):
    config = WorldConfig(train=0, val=2, test=3, images=1)
    first = render_world(tmp_path / "w", config)
    assert first.rendered == ("val", "test", "images")
    assert not (tmp_path / "w" / "train").exists()
    before = {path: path.read_bytes() for path in (tmp_path / "w").rglob("*.*") if path.is_file()}
    for path in (tmp_path / "w" / "test").iterdir():
        path.unlink()
    (tmp_path / "w" / "test").rmdir()
    leftover = tmp_path / "w" / ".test.partial"
    leftover.mkdir()
    (leftover / "test-000000.mp4").write_text("half a clip")
    again = render_world(tmp_path / "w", config)
    assert again.rendered == ("test",)
    assert again.kept == ("val", "images")
    assert again.files == 3
    assert {path: path.read_bytes() for path in (tmp_path / "w").rglob("*.*") if path.is_file()} == before
    assert render_world(tmp_path / "w", config).rendered == ()


@pytest.mark.parametrize("change", [{"seed": 1}, {"test": 4}, {"two_objects": 0.5}])
def test_another_world_is_refused(tmp_path, change):
    config = WorldConfig(train=0, val=0, test=3, images=0)
    render_world(tmp_path / "w", config)
    with pytest.raises(UserError, match=f"another world: {next(iter(change))} is") as refused:
        render_world(tmp_path / "w", config.model_copy(update=change))
    assert refused.value.exit_code == 2
    assert len(list((tmp_path / "w" / "test").iterdir())) == 4


def test_another_version_of_the_world_is_refused(tmp_path):
    config = WorldConfig(train=0, val=0, test=1, images=0)
    render_world(tmp_path / "w", config)
    card = tmp_path / "w" / "world.json"
    card.write_text(card.read_text().replace(f'"version": "{WORLD_VERSION}"', '"version": "0"'))
    with pytest.raises(UserError, match="version is '0'"):
        render_world(tmp_path / "w", config)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="no rendered world"):
        render_world(tmp_path, SMALL)
    with pytest.raises(UserError, match="no rendered world"):
        render_world(tmp_path / "thesis.txt", SMALL)
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "world.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        render_world(tmp_path / "w", SMALL)
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["world.json"]


RENDER = """
import sys
from pathlib import Path
from configs.errors import UserError
from data_pipeline.synthetic import render_world
from data_pipeline.world import WorldConfig

if __name__ == "__main__":
    try:
        render_world(Path(sys.argv[1]), WorldConfig(train=300, val=0, test=0, images=0), workers=2)
    except UserError as error:
        print(error)
        sys.exit(error.exit_code)
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path):
    """On a file system of a few hundred kilobytes, in a mount namespace of our own."""
    (tmp_path / "render.py").write_text(RENDER)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = f"mount -t tmpfs -o size=400k none {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system here")
    program = f"{mounted} && {sys.executable} {tmp_path}/render.py {disk}/w; code=$?; ls -A {disk}/w; exit $code"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", program], env=environment, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 1, run.stderr
    cause, left = run.stdout.strip().splitlines()
    assert "The disk is full. Free some space" in cause
    assert left == "world.json"
    assert "Traceback" not in run.stderr


def test_interrupted_it_leaves_nothing_half_written(tmp_path):
    (tmp_path / "render.py").write_text(RENDER)
    out = tmp_path / "w"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "render.py"), str(out)],
        env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(out.glob(".train.partial/*.mp4")):  # the first batch has just been finished
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to us and to every process we started
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.strip().endswith("KeyboardInterrupt")
    assert [path.name for path in out.iterdir()] == ["world.json"]


# ---- the program


def test_without_ffmpeg_on_path_the_wheel_serves(monkeypatch, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = ffmpeg_place.ffmpeg_program.__wrapped__()
    assert Path(found).is_file()
    assert "imageio_ffmpeg" in found


def test_an_ffmpeg_that_cannot_write_h264_is_passed_over(monkeypatch, tmp_path):
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\necho 'Codec libx264 is not recognized by FFmpeg.'\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert ffmpeg_place.ffmpeg_program.__wrapped__() != str(tmp_path / "ffmpeg")


def test_with_no_ffmpeg_at_all_the_cure_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))  # what the wheel then answers
    with pytest.raises(UserError, match="pip install imageio-ffmpeg") as refused:
        ffmpeg_place.ffmpeg_program.__wrapped__()
    assert refused.value.exit_code == 1
    assert "none on PATH" in refused.value.cause


@pytest.mark.parametrize("which", ["system", "wheel"])
def test_every_release_of_ffmpeg_cuts_at_the_same_frames(tmp_path, monkeypatch, which):
    """Releases round the times of forced keyframes differently; a cut that slips shifts every later caption."""
    program = shutil.which("ffmpeg") if which == "system" else _wheel_program()
    if program is None:
        pytest.skip(f"no ffmpeg of the {which}")
    monkeypatch.setattr("data_pipeline.synthetic.ffmpeg_program", lambda: program)
    for rate in ("30", "24", "12.5"):
        camera = [spec for spec in clip_specs(WorldConfig(train=600), "train") if spec.rate == Fraction(rate)]
        size = (camera[0].width, camera[0].height)
        specs = [spec for spec in camera if (spec.width, spec.height) == size][:24]
        folder = tmp_path / rate
        folder.mkdir()
        render_batch(specs, folder)
        for spec in specs:
            assert len(decoded(folder / spec.name)[0]) == spec.frames
