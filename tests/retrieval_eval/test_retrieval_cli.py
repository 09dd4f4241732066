"""The commands as a user calls them: tables, files, and one sentence of cause and one of cure."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

Videomamba = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def config_file(run_folder: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    path = folder / "retrieval.yaml"
    tree = {"checkpoint": str(run_folder), "data": {"path": str(clips), "workers": 0}, "out": str(folder / "out")}
    path.write_text(yaml.safe_dump(tree | {"device": "cpu", "bootstrap": 10, "rerank": {"top": 4}}))
    return path


def test_eval_prints_named_columns_and_leaves_the_result(videomamba: Videomamba, config_file: Path) -> None:
    done = videomamba("eval", str(config_file))
    assert done.returncode == 0, done.stderr
    for said in ("text to video (dual encoder)", "(re-ranked, top 4)", "frames shuffled", "one frame repeated"):
        assert said in done.stdout
    assert "1 clip could not be read" in done.stdout
    result = json.loads((config_file.parent / "out" / "result.json").read_text())
    assert set(result["results"]) == {"dual", "reranked", "controls"}
    assert sorted(path.name for path in (config_file.parent / "out").iterdir()) == [
        "config.yaml", "embeddings", "queries.jsonl", "ranks.npz", "report.html", "result.json", "row.md",
        "similarity.png",
    ]  # fmt: skip


def test_embed_then_search(videomamba: Videomamba, run_folder: Path, clips: Path, tmp_path: Path) -> None:
    made = videomamba("embed", str(clips), str(tmp_path / "index"), "--checkpoint", str(run_folder), "--workers", "0")
    assert made.returncode == 0, made.stderr
    assert "13 clips" in made.stdout
    found = videomamba("search", str(tmp_path / "index"), "a red square moves left", "--top", "3")
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines() if "clip0" in line]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert all("clips-00000" in " ".join(line) and "0.0–1.5 s" in " ".join(line) for line in lines)
    assert float(lines[0][1]) > float(lines[2][1])


@pytest.mark.parametrize(
    "arguments, cause",
    [
        (["data.pth=x"], "unknown key 'data.pth'. cure: Did you mean 'path'?"),
        (["data.path=nowhere"], "There is no folder of shards nowhere."),
        (["checkpoint=nowhere"], "There is no checkpoint nowhere."),
        (["rerank.top=-1"], "rerank.top is -1"),
        (["controls=[single, single]"], "controls names one twice"),
    ],
)
def test_a_wrong_request_is_two_sentences(
    videomamba: Videomamba, config_file: Path, arguments: list[str], cause: str
) -> None:
    done = videomamba("eval", str(config_file), *arguments)
    assert done.returncode == 2, done.stdout
    assert cause in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_check_reads_nothing_but_says_what_it_would(videomamba: Videomamba, config_file: Path, tmp_path: Path) -> None:
    done = videomamba("eval", str(config_file), f"out={tmp_path / 'out'}", "--check")
    assert done.returncode == 0, done.stderr
    assert "14 samples in 3 shards" in done.stdout
    assert not (tmp_path / "out").exists()


def test_an_empty_query_and_a_folder_without_embeddings(videomamba: Videomamba, tmp_path: Path) -> None:
    assert "The query is empty" in videomamba("search", str(tmp_path), "  ").stderr
    done = videomamba("search", str(tmp_path), "a dog")
    assert done.returncode == 2
    assert "no folder of embeddings" in done.stderr
