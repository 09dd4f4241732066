import json
import os

import numpy as np
import pytest


@pytest.fixture(scope="module")
def built(videomamba, media_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "corpus"
    return out, videomamba("data", "build", media_folder, out, "--samples-per-shard", "20", "--workers", "2")


def test_build_names_and_counts_what_was_lost(built):
    out, run = built
    assert run.returncode == 0, run.stderr
    assert "41 (40 videos, 1 images)" in run.stdout
    for words in ("missing_file", "gone.mp4", "duplicate", "again.mp4", "same content as c03.mp4", "ledger.sqlite"):
        assert words in run.stdout
    assert json.loads((out / "dataset.json").read_text())["samples"] == 41


def test_build_again_says_that_there_is_nothing_to_do(built, videomamba, media_folder):
    run = videomamba("data", "build", media_folder, built[0], "--samples-per-shard", "20")
    assert run.returncode == 0, run.stderr
    assert "nothing to do" in run.stdout


def test_info_prints_the_card(built, videomamba):
    run = videomamba("data", "info", built[0])
    assert run.returncode == 0, run.stderr
    for words in ("41", "corpus", "64x48 (15)", "colour, good, place", "lost: not_media", "text.mp4"):
        assert words in run.stdout


def test_verify_agrees_and_then_does_not(built, videomamba, tmp_path):
    for path in built[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    run = videomamba("data", "verify", tmp_path, "--decode", "-1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "is sound" in run.stdout
    os.truncate(tmp_path / "corpus-000001.tar", 9000)
    run = videomamba("data", "verify", tmp_path)
    assert run.returncode == 1
    assert "corpus-000001.tar: " in run.stdout.replace("\n", " ") or "corpus-000001.tar:" in run.stdout
    assert "cut: 9000 bytes" in run.stdout
    assert "Traceback" not in run.stderr


def test_a_sheet_of_clips_and_captions(built, videomamba, tmp_path):
    from PIL import Image

    sheet = tmp_path / "sheet.png"
    run = videomamba("data", "info", built[0], "--sheet", sheet, "--clips", "5", "--seed", "2")
    assert run.returncode == 0, run.stderr
    assert f"5 random clips are on {sheet}" in run.stdout.replace("\n", "")
    picture = np.asarray(Image.open(sheet).convert("L"))
    assert picture.shape[1] > 2 * 720
    assert 3 * 132 < picture.shape[0] < 6 * 300
    assert (picture < 60).mean() > 0.005  # letters
    assert len(np.unique(picture[14:146, 14:734])) > 20  # the first clip's frames, each of another grey


def test_parts_are_built_and_merged(videomamba, media_folder, tmp_path):
    out = tmp_path / "corpus"
    for index in (1, 2):
        run = videomamba("data", "build", media_folder, out, "--part", f"{index}/2", "--samples-per-shard", "20")
        assert run.returncode == 0, run.stdout + run.stderr
        if index == 1:
            early = videomamba("data", "merge", out)
            assert early.returncode == 2
            assert "lacks 1 of 2 parts: 2/2" in " ".join(early.stderr.split())
    run = videomamba("data", "merge", out)
    assert run.returncode == 0, run.stderr
    assert "41 (40 videos, 1 images)" in run.stdout
    assert "nothing to do" in videomamba("data", "merge", out).stdout
    run = videomamba("data", "build", media_folder, out, "--samples-per-shard", "20", "--retry", "failed")
    assert run.returncode == 0, run.stderr
    assert "Tried 4 lost clips again." in run.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "{media}"], "Give a folder to build into, or --in-place"),
        (["build", "{media}", "out", "--in-place"], "leave OUT away"),
        (["build", "{media}", "--in-place"], "no shards to index in place"),
        (["build", "{media}", "out", "--part", "3/2"], "'3/2' is no part"),
        (["build", "{media}", "out", "--preset", "webvdi"], "Did you mean 'webvid'"),
        (["build", "{media}", "out", "--retry", "luck"], "'luck' is nothing that can be tried again"),
        (["merge", "nowhere"], "no folder nowhere"),
        (["build", "nowhere", "out"], "no source folder nowhere"),
        (["build", "{media}", "out", "--caption-column", "text"], "no column 'text'"),
        (["verify", "nowhere"], "no corpus folder nowhere"),
        (["info", "nowhere"], "no dataset.json in nowhere"),
        (["build", "{media}", "out", "--workers", "0"], "--workers"),
    ],
)
def test_a_wrong_request_is_two_sentences_and_exit_code_2(videomamba, media_folder, tmp_path, arguments, words):
    run = videomamba("data", *(str(a).format(media=media_folder) for a in arguments), cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    assert words in " ".join((run.stdout + run.stderr).replace("│", " ").split())
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_help_has_examples_and_imports_nothing_heavy(python):
    code = (
        "import sys; from data_pipeline.cli import app\n"
        "for command in ('build', 'merge', 'verify', 'info', 'synthetic'):\n"
        "    app([command, '--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'av', 'numpy', 'sqlite3', 'configs'} & set(sys.modules)))"
    )
    run = python("-c", code)
    shown = " ".join(run.stdout.split())
    for command in ("build", "merge", "verify", "info", "synthetic"):
        assert f"Example: videomamba data {command}" in shown
    assert run.stdout.splitlines()[-1] == "[]"
