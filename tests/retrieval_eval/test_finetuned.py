"""Fine-tuned retrieval by the same code: a train split read by the readers, built, trained on, and the test split."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from configs.errors import UserError
from configs.loader import validate
from data_pipeline.ingest import BuildConfig, build
from data_pipeline.shards import Corpus
from retrieval_eval.config import BenchmarkData, RetrievalConfig, RetrievalData
from retrieval_eval.evaluate import evaluate
from retrieval_eval.testset import open_set

Command = Callable[..., CompletedProcess[str]]
BROKEN = 5  # of the corpus that the clips are from


@pytest.fixture(scope="module")
def split(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DiDeMo's form: train.json and test.json over the clips as files, two descriptions a train video, one missing."""
    at = tmp_path_factory.mktemp("didemo")
    corpus = Corpus.open(clips)
    lists: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for i in range(len(corpus)):
        if i == BROKEN:
            continue
        sample, part = corpus.read(i), "train" if i < 9 else "test"
        (at / part).mkdir(exist_ok=True)
        (at / part / f"{sample.key}.mp4").write_bytes(sample.media)
        for text in (sample.captions[0], "that is all")[: 2 if part == "train" else 1]:
            entry = {"video": f"{sample.key}.mov", "description": text, "times": [[0, 0]], "annotation_id": i}
            lists[part].append(entry)
    lists["train"].append({"video": "gone.mov", "description": "x", "times": [[0, 0]], "annotation_id": 99})
    for part, entries in lists.items():
        (at / f"{part}.json").write_text(json.dumps(entries))
    return at


def data(split: Path, part: str) -> dict[str, Any]:
    return {"type": "didemo", "annotations": str(split / f"{part}.json"), "media": str(split / part), "max_tokens": 12,
            "workers": 0}  # fmt: skip


def test_a_train_split_becomes_a_table_by_the_sets_own_rules(split: Path) -> None:
    asked = validate({"checkpoint": "c", "out": "o", "data": data(split, "train")}, RetrievalConfig, "test").data
    assert isinstance(asked, BenchmarkData)
    found = open_set(asked)
    rows = found.manifest()
    assert [row["video"] for row in rows] == [f"clip{n:03d}.mp4" for n in range(9) if n != BROKEN]
    assert all(row["caption"][0].endswith(" that is all") for row in rows), "descriptions are one paragraph"
    assert list(found.missing) == ["gone.mov"]


def test_shards_need_no_table(clips: Path) -> None:
    with pytest.raises(UserError, match="is a corpus already"):
        open_set(RetrievalData(path=str(clips))).manifest()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_checkpoint_trained_further_on_a_train_split(
    split: Path, run_folder: Path, tmp_path: Path, videomamba: Command
) -> None:
    asked = validate({"checkpoint": "c", "out": "o", "data": data(split, "train")}, RetrievalConfig, "test").data
    (tmp_path / "train.json").write_text(json.dumps(open_set(asked).manifest()))
    shards, listed = tmp_path / "shards", tmp_path / "train.json"
    build(BuildConfig(source=split / "train", out=shards, manifest=listed, preset="umt", workers=1))

    step = next(run_folder.glob("checkpoints/step-*"))
    run = yaml.safe_load((step / "config.yaml").read_text())
    run |= {"out": str(tmp_path / "tuned"), "init": str(run_folder), "tokenizer": str(step / "tokenizer"), "steps": 3}
    run["data"] |= {"train": [{"path": str(shards)}], "batch": 4, "workers": 0}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(run | {"device": "cpu", "threads": 1}))
    trained = videomamba("pretrain", str(tmp_path / "tune.yaml"))
    assert trained.returncode == 0, trained.stderr

    results = {}
    for name, checkpoint in (("zero-shot", run_folder), ("fine-tuned", tmp_path / "tuned")):
        tree = {"checkpoint": str(checkpoint), "out": str(tmp_path / name), "data": data(split, "test"), "batch": 4}
        config = validate(tree | {"device": "cpu", "bootstrap": 0, "controls": []}, RetrievalConfig, "test")
        results[name] = evaluate(config)
    one, other = results.values()
    assert one["protocol"]["checkpoint_digest"] != other["protocol"]["checkpoint_digest"]
    assert one["protocol"]["queries_digest"] == other["protocol"]["queries_digest"]
    assert one["protocol"]["clips"] == other["results"]["reranked"]["t2v"]["n"] == 5
    # the embeddings of the one are not taken for the other's
    shutil.copytree(tmp_path / "zero-shot", tmp_path / "mixed")
    mixed = tree | {"out": str(tmp_path / "mixed"), "device": "cpu", "controls": []}
    with pytest.raises(UserError, match=r"embeddings made otherwise \(checkpoint is"):
        evaluate(validate(mixed, RetrievalConfig, "test"))
