"""Every command of docs/data.md does what the page says, in the order of the page."""

import csv
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.ingest import BuildConfig, build
from data_pipeline.shards import Corpus

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in PAGE.splitlines() if re.match(r"    (videomamba|for|sqlite3) ", line)]


def write_rows(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, ramp):
    """The folders and files that the page names."""
    at = tmp_path_factory.mktemp("docs")
    names = [f"c{n}.mp4" for n in range(6)]
    for folder in ("clips", "films", "folder/deep", "webvid/videos/000001_000050"):
        (at / folder).mkdir(parents=True)
    for number, name in enumerate(names):
        (at / "clips" / name).write_bytes(ramp(6, number))
        (at / "folder" / "deep" / name).write_bytes(ramp(6, number))
        (at / "folder" / "deep" / name).with_suffix(".txt").write_text(f"clip {number}\nnumber {number}\n")
        (at / "webvid" / "videos" / "000001_000050" / f"10{number}.mp4").write_bytes(ramp(6, number))
    (at / "films" / "film.mp4").write_bytes(ramp(12))
    write_rows(at / "clips" / "captions.csv", [{"file": name, "caption": f"clip {name}"} for name in names])
    write_rows(at / "train.tsv", [{"path": name, "title": f"clip {name}"} for name in names], "\t")
    with sqlite3.connect(at / "clips.db") as database:
        database.execute("CREATE TABLE captioned (id, filename, caption)")
        database.execute("CREATE TABLE another (x)")
        database.executemany(
            "INSERT INTO captioned VALUES (?, ?, ?)", [(n, f, f"clip {n}") for n, f in enumerate(names)]
        )
    database.close()
    webvid = {"contentUrl": "u", "duration": "PT00H00M01S", "page_dir": "000001_000050"}
    rows = [{"videoid": f"10{n}", **webvid, "name": f"clip {n}"} for n in range(6)]
    write_rows(at / "results_2M_train.csv", rows)
    spans = [("0", "0.3"), ("0:00.5", "0:01"), ("00:00:01", "")]
    scenes = [{"file": "film.mp4", "caption": f"scene {a}", "from": a, "to": b} for a, b in spans]
    write_rows(at / "scenes.csv", scenes)
    build(BuildConfig(source=at / "clips", out=at / "shards", workers=1))
    for made in ("ledger.sqlite", "dataset.json", "README.md", "shards-000000.idx"):
        (at / "shards" / made).unlink()
    (at / "bin").mkdir()
    shim = at / "bin" / "videomamba"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m videomamba "$@"\n')
    shim.chmod(0o755)
    return at


def samples(command):
    return 3 if "films/" in command else 6


@pytest.mark.slow
def test_the_commands_of_the_page(workplace):
    assert len(COMMANDS) == 14
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{workplace / 'bin'}:{os.environ['PATH']}",
    }
    for command in COMMANDS:
        makes = re.search(r"data build \S+ corpus/|for ", command) and "--retry" not in command
        if makes or "--retry" in command:
            shutil.rmtree(workplace / "corpus", ignore_errors=True)
        if "--retry" in command:
            build(BuildConfig(source=workplace / "clips", out=workplace / "corpus", workers=1))
        if command.startswith("sqlite3"):
            with sqlite3.connect(workplace / "corpus" / "ledger.sqlite") as database:
                database.execute(re.search(r'"(.*)"', command)[1])
            database.close()
            continue
        done = subprocess.run(
            ["bash", "-c", command], cwd=workplace, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if makes and not command.startswith("for"):
            assert len(Corpus.open(workplace / "corpus")) == samples(command), command
    assert len(Corpus.open(workplace / "corpus")) == 6
    assert len(Corpus.open(workplace / "shards")) == 6
    assert (workplace / "sheet.png").stat().st_size > 1000
    assert json.loads((workplace / "corpus" / "dataset.json").read_text())["lost"] == {}


def test_the_page_names_every_reason_and_option():
    from data_pipeline.schema import LossReason

    for reason in LossReason:
        assert f"`{reason}`" in PAGE
    for option in ("--preset", "--columns", "--format", "--table", "--in-place", "--part", "--retry", "--time-limit"):
        assert option in PAGE
