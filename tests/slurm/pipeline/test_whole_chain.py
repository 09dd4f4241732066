"""The shipped pipeline from clips to encoders, small: as jobs of a real cluster, and here, with the same artefacts."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL = {
    "data.batch": 8,
    "data.cache": None,
    "vision.depth": 1,
    "vision.width": 64,
    "optim.warmup_steps": 1,
    "log.every_steps": 1,
}
TEXT = {"losses.mlm.every": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered clips and their captions."""
    out = tmp_path_factory.mktemp("world") / "media"
    command = ["data", "synthetic", "--out", str(out), "--train", "24", "--val", "2", "--test", "8", "--images", "2"]
    subprocess.run([sys.executable, "-P", "-m", "videomamba", *command], check=True)
    return out


@pytest.fixture
def pipeline(tmp_path, world):
    """`pipeline(folder)`: the shipped pipeline with a teacher of its own, on small models."""

    def write(folder: Path) -> Path:
        path = tmp_path / f"{folder.name}.yaml"
        variables = {
            "clips": str(world / "train"), "captions": str(world / "train" / "captions.csv"),
            "test_clips": str(world / "test"), "test_captions": str(world / "test" / "captions.csv"),
            "bert": None, "tokenizer": "{own_teacher}/tokenizer", "image_size": 64,
            "stage1_config": "demo/stage1", "stage2_config": "demo/stage2", "unmasked_config": "demo/stage2_unmasked",
            "build_parts": 3, "eval_parts": 2, "ranks": 2,
        }  # fmt: skip
        steps = {
            "own_teacher": {"overrides": {"steps": 2, "data.batch": 8}},
            "stage1": {"overrides": {**SMALL, "steps": 3}},
            "stage2": {"overrides": {**SMALL, **TEXT, "steps": 3}},
            "stage2_unmasked": {"overrides": {**SMALL, **TEXT, "steps": 2}},
        }
        tree = {"base": "pipelines/own_teacher", "folder": str(folder), "variables": variables, "steps": steps}
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def artefacts(folder: Path) -> dict[str, object]:
    """What a chain leaves, without what tells where and when it was made."""
    tars = sorted((folder / "corpus").glob("*.tar"))
    logs = [folder / name / "log.jsonl" for name in ("stage1", "stage2", "stage2_unmasked")]
    weights = sorted((folder / "encoders").rglob("*.safetensors"))
    return {
        "shards": {tar.name: hashlib.sha256(tar.read_bytes()).hexdigest() for tar in tars},
        "losses": [[json.loads(line)["losses"] for line in log.read_text().splitlines()] for log in logs],
        "weights": {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in weights},
        "results": json.loads((folder / "retrieval" / "result.json").read_text())["results"],
    }


def test_the_whole_chain_on_a_cluster_and_here(cluster, site, runs, pipeline, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    file = pipeline(there)
    said = runs(file, "--cluster", site(), command="submit")
    ids = dict(re.findall(r"^(\w+): job (\d+)", said, flags=re.MULTILINE))
    assert list(ids) == [
        "shards", "corpus", "test", "own_teacher", "stage1", "stage2", "stage2_unmasked", "embed", "rerank",
        "retrieval", "export",
    ]  # fmt: skip
    gpus = {name: cluster("scontrol", "show", "job", ids[name]).count("gres:gpu") > 0 for name in ids}
    assert {name for name, asks in gpus.items() if not asks} == {"shards", "corpus", "test"}
    jobs = set(ids.values())
    cluster.wait_for(lambda: not {job.partition("_")[0] for job in cluster.jobs()} & jobs, "the end of the chain", 900)
    said = runs(there, command="status")
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in said.splitlines() if row.startswith("│")]
    assert {row[0]: row[1] for row in rows} == dict.fromkeys(ids, "done"), said
    progress = {row[0]: row[4] for row in rows}
    assert (progress["shards"], progress["stage1"], progress["embed"]) == (
        "3 of 3 parts", "step 3 of 3 kept", "2 of 2 parts"
    )  # fmt: skip
    assert runs(file).count("finished before") == 11

    runs(pipeline(here), "--jobs", "2", timeout=900)
    there, here = artefacts(there), artefacts(here)
    assert len(here["shards"]) == 3
    assert [len(losses) for losses in here["losses"]] == [3, 3, 2]
    assert here == there
