"""Every command of docs/reproduce.md on small stand-ins: builds and lists are made, runs are checked, media are found.

What a command names is what is there; only sizes are changed, and what a run would start with is left out.
"""

import csv
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.tiny_clip import write_tiny_clip

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
LINES = [line.strip() for line in PAGE.splitlines() if re.match(r"    (videomamba|for) ", line)]
SIDE, FRAMES = 32, 4
SMALL = [
    "vision.name=null", "vision.depth=1", "vision.width=32", "vision.patch_size=8", f"vision.image_size={SIDE}",
    f"vision.frames={FRAMES}", f"data.image_size={SIDE}", f"data.frames.count={FRAMES}", "data.batch=16",
    "data.workers=0", "data.image_batch=16", "micro_batch=null", "optim.warmup_epochs=0.1", "epochs=2", "init=null",
]  # fmt: skip
SMALL_TEXT = ["text.name=null", "text.width=32", "text.heads=2", "text.init=null", "text.vocab_size=300",
              "text.layers=1", "text.fusion_layers=1", "text.intermediate=32"]  # fmt: skip
SMALL_TEACHER = ["teacher.source=weights/tiny", "teacher.weights=null"]


def commands() -> list[list[str]]:
    """The page's commands in order, loops unrolled, without the program's name."""
    found = []
    for line in LINES:
        loop = re.fullmatch(r"for i in ([\d ]+); do (.*); done", line)
        turns = [loop[2].replace("$i", i) for i in loop[1].split()] if loop else [line]
        found += [shlex.split(turn)[1:] for turn in turns]
    return found


def video(number: int) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for t in range(8):
            frame = np.random.default_rng(100 * number + t).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def picture(number: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def put(path: Path, content: bytes | str | Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content))
    path.write_bytes(made if isinstance(made, bytes) else made.encode())


def table(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def corpora(at: Path) -> None:
    """The tables and media that section 1 names, 16 of each, in the folder of downloads."""
    rows: dict[str, list[dict[str, Any]]] = {"k400": [], "webvid": [], "cc3m": []}
    for n in range(16):
        put(at / f"k400/train/id{n}_000001_000011.mp4", video(n))
        rows["k400"].append({"label": f"act {n}", "youtube_id": f"id{n}", "time_start": 1, "time_end": 11})
        put(at / f"webvid/videos/000/{n}.mp4", video(100 + n))
        rows["webvid"].append(
            {"videoid": n, "contentUrl": "u", "duration": "d", "page_dir": "000", "name": f"clip {n}"}
        )
        put(at / f"cc3m/images/{n}.jpg", picture(n))
        rows["cc3m"].append({"path": f"{n}.jpg", "caption": f"picture {n}"})
        put(at / f"coco/{n}.jpg", picture(100 + n))
    put(at / "k400/train.csv", table(rows["k400"]))
    put(at / "results_2M_train.csv", table(rows["webvid"]))
    put(at / "cc3m.csv", table(rows["cc3m"]))
    put(at / "coco.json", [{"image": f"{n}.jpg", "caption": f"picture {n}"} for n in range(16)])


def benchmarks(at: Path) -> None:
    """The annotation files of the five sets in their authors' forms, and the videos they name."""
    data, didemo = at / "data", []
    for n in range(16):
        put(data / f"msrvtt/videos/video{n}.mp4", video(n))
        put(data / f"didemo/videos/a{n}.mov", video(n))
        put(data / f"didemo/train_videos/b{n}.mov", video(50 + n))
        didemo.append({"video": f"a{n}.mov", "description": f"then {n}", "times": [[0, 0]], "annotation_id": n})
        put(data / f"activitynet/videos/v_{n}.mkv", video(n))
        put(data / f"lsmdc/clips/1_Film_0{n}.avi", video(n))
        put(data / f"msvd/videos/-x_{n}_1_2.avi", video(n))
    sentence = table([{"key": n, "vid_key": n, "video_id": f"video{n}", "sentence": f"clip {n}"} for n in range(16)])
    put(data / "msrvtt/MSRVTT_JSFUSION_test.csv", sentence)
    choices = [{"video": f"video{n}", "caption": ["one", "two"], "answer": n % 2} for n in range(16)]
    put(data / "msrvtt/mc_test.json", choices)
    put(data / "didemo/test_data.json", didemo)
    put(data / "didemo/train_data.json", [entry | {"video": entry["video"].replace("a", "b")} for entry in didemo])
    spans = {"duration": 9.0, "timestamps": [[0, 1], [1, 2]], "sentences": ["first", " then"]}
    put(data / "activitynet/val_1.json", {f"v_{n}": spans for n in range(16)})
    times = "\t".join(["00.00.01.000"] * 4)
    lines = [f"1_Film_0{n}\t{times}\tSOMEONE leaves {n}.\n" for n in range(16)]
    put(data / "lsmdc/LSMDC16_challenge_1000_publictect.csv", "".join(lines))
    put(data / "msvd/captions.json", {f"-x_{n}_1_2": ["a", f"b {n}"] for n in range(16)})
    put(data / "msvd/test_list.txt", "".join(f"-x_{n}_1_2\n" for n in range(16)) + "\n")


def weights(at: Path) -> None:
    """A tiny CLIP as open_clip writes it, a tokenizer, and a published joint file of small shapes."""
    from pretrain.tokenizer import train_tokenizer

    write_tiny_clip(at / "weights/tiny", SIDE)
    torch.manual_seed(0)
    train_tokenizer(["clip 1 picture"], at / "weights/bert-base-uncased", 300)
    spec = importlib.util.spec_from_file_location("published", ROOT / "tests/pretrain/released/conftest.py")
    assert spec is not None
    assert spec.loader is not None
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    torch.save({"module": published.tensors(published.NAMES["joint"])}, at / "videomamba_m16_25M_f8_res224.pth")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    put(at / "vocab.txt", "\n".join([*special, *(f"w{n}" for n in range(published.WORDS - len(special)))]) + "\n")


def on_stand_ins(command: list[str]) -> list[str]:
    """A command as it stands, with small sizes where it names a run, and no further than its checks."""
    name, config = command[0], command[1]
    if name == "pretrain":
        small = [*SMALL, *(SMALL_TEXT if "stage2" in config else []), *([] if "unmasked" in config else SMALL_TEACHER)]
        return [*command, *small, *([] if "--check" in command else ["--check"])]
    if name == "import-released":
        return [*command, "--heads", "4"]
    if name == "eval" and "--manifest" not in command:
        return [*command, *([] if "--check-data" in command else ["--check-data"])]
    return command


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from videomamba.cli import app

    monkeypatch.chdir(tmp_path)
    corpora(tmp_path / "downloads")
    benchmarks(tmp_path)
    weights(tmp_path)
    seen = set()
    for command in commands():
        asked = on_stand_ins(command)
        done = CliRunner().invoke(app, asked)
        seen.add(command[0])
        assert done.exit_code == 0, f"{shlex.join(asked)}\n{done.output}\n{done.exception!r}"
        if command[0] == "pretrain":
            assert "this run can start" in done.output, done.output
        if command[0] == "eval":
            assert " 16 found in" in done.output, done.output
            assert " 0 missing" in done.output
    assert seen == {"data", "pretrain", "import-released", "eval"}
    rows = json.loads((tmp_path / "didemo_train.json").read_text())
    assert len(rows) == 16
    assert rows[0] == {"video": "b0.mov", "caption": ["then 0"]}
    assert (tmp_path / "data/didemo_train/dataset.json").is_file()
    assert (tmp_path / "runs/released/25m").is_dir()


def test_the_page_has_every_field_that_changes_a_number() -> None:
    from retrieval_eval.config import PUBLISHED

    for values in PUBLISHED.values():
        for field in values:
            assert f"`data.{field}`" in PAGE
    for field in ("rerank.top", "data.captions", "data.clean", "ties", "dual_softmax"):
        assert f"`{field}`" in PAGE


def test_no_number_of_ours_stands_on_the_page() -> None:
    """The fields for ours are empty as long as nothing was measured: two columns of each direction."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if re.search("5M|7M", line)]
    table_rows = [row for row in rows if len(row) == 8]
    assert len(table_rows) == 15
    assert all(row[place] == "" for row in table_rows for place in (3, 4, 6, 7))
