"""One evaluation by several processes, or by one that is killed: the same numbers to the last bit, whoever did what."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from configs.errors import UserError
from configs.loader import validate
from data_pipeline.sources import Part
from pretrain.launch import World, free_port
from retrieval_eval import cli_eval
from retrieval_eval.config import RetrievalConfig
from retrieval_eval.evaluate import evaluate, run_stages
from retrieval_eval.ranks import Crew, share

Command = Callable[..., subprocess.CompletedProcess[str]]
CHUNKS = 5  # of 3 clips, the last of 2


def tree(run: Path, clips: Path, out: Path) -> dict[str, Any]:
    return {
        "checkpoint": str(run),
        "data": {"path": str(clips), "workers": 0},
        "out": str(out),
        "chunk": 3,
        "batch": 2,
        "rerank": {"top": 3},
        "controls": ["single"],
        "device": "cpu",
        "threads": 1,
        "bootstrap": 20,
    }


def config(run: Path, clips: Path, out: Path, **changes: Any) -> RetrievalConfig:
    return validate(tree(run, clips, out) | changes, RetrievalConfig, "test")


@pytest.fixture(scope="module")
def whole(run_folder: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the evaluation by one process."""
    out = tmp_path_factory.mktemp("whole")
    evaluate(config(run_folder, clips, out))
    return out


def contents(out: Path) -> dict[str, bytes]:
    """Everything that decides a number, file by file; what npz files hold, without their time stamps."""
    files = [path for path in sorted((out / "embeddings").rglob("*")) if path.is_file()]
    found = {str(path.relative_to(out)): path.read_bytes() for path in files if path.suffix != ".npz"}
    for path in [*files, out / "ranks.npz"]:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                found[str(path.relative_to(out))] = b"".join(arrays[name].tobytes() for name in sorted(arrays.files))
    return found | {"results": json.dumps(json.loads((out / "result.json").read_text())["results"]).encode()}


def test_the_work_is_cut_into_chunks(whole: Path) -> None:
    names = contents(whole)
    assert sum(name.endswith("tokens.f16") for name in names) == CHUNKS
    assert sum("matches-" in name for name in names) == CHUNKS


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_that_share_nothing_give_the_same_bits(
    parts: int, whole: Path, run_folder: Path, clips: Path, tmp_path: Path
) -> None:
    asked = config(run_folder, clips, tmp_path)
    for stage in ("embed", "rerank"):
        for index in range(parts, 0, -1):  # the order does not count
            assert run_stages(asked, only=stage, crew=Crew(Part(index, parts))) is None
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "embeddings").rglob("*") if path.is_file()}
    assert not (tmp_path / "result.json").exists()
    evaluate(asked)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "only the metrics were left to do"
    assert contents(tmp_path) == contents(whole)


def test_each_part_does_its_share_and_no_more(run_folder: Path, clips: Path, tmp_path: Path) -> None:
    asked = config(run_folder, clips, tmp_path, controls=[])
    run_stages(asked, only="embed", crew=Crew(Part(2, 3)))
    assert sorted(path.name for path in (tmp_path / "embeddings/clips").iterdir()) == ["000001", "000004"]
    with pytest.raises(UserError, match=r"3 of 5 pieces of .*clips are not there") as refused:
        run_stages(asked, only="rerank", crew=Crew(Part(1, 3)))
    assert "--only embed" in refused.value.cure


def test_ranks_share_a_part_without_gap_or_overlap() -> None:
    chunks = range(50)
    for parts in (1, 2, 3):
        for size in (1, 2, 5):
            shares = [share(Part(part, parts), World(rank, rank, size)) for part in range(1, parts + 1)
                      for rank in range(size)]  # fmt: skip
            owners = [[place for place, one in enumerate(shares) if one.has_turn(chunk)] for chunk in chunks]
            assert all(len(found) == 1 for found in owners)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_of_one_command_give_the_same_bits(
    ranks: int, whole: Path, run_folder: Path, clips: Path, tmp_path: Path, videomamba: Command
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree(run_folder, clips, tmp_path / "out")))
    done = videomamba("eval", str(tmp_path / "r.yaml"), "--ranks", str(ranks))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Zero-shot retrieval") == 1, "the first rank prints the table"
    assert contents(tmp_path / "out") == contents(whole)


DIES = """
import os, signal, sys
import numpy as np
from retrieval_eval import matches, store

at, stage, config = sys.argv[1:]
count = 0
def dying(right):
    def call(*arguments, **named):
        global count
        count += 1
        if count == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        return right(*arguments, **named)
    return call

store.RowWriter.write = dying(store.RowWriter.write) if stage == "embed" else store.RowWriter.write
matches.np.savez = dying(np.savez) if stage == "rerank" else np.savez
sys.argv[1:] = ["eval", config]
from videomamba.cli import main
main()
"""


@pytest.mark.parametrize("stage,call", [("embed", 4), ("rerank", 3)])
def test_killed_at_a_write_it_goes_on_to_the_same_bits(
    stage: str, call: int, whole: Path, run_folder: Path, clips: Path, tmp_path: Path, python: Command
) -> None:
    """kill -9 while a piece is half written: the second chunk's tokens, the third chunk's scores."""
    out = tmp_path / "out"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree(run_folder, clips, out)))
    died = python("-c", DIES, str(call), stage, str(tmp_path / "r.yaml"))
    assert died.returncode == -signal.SIGKILL, died.stderr
    kind = "clips" if stage == "embed" else next((out / "embeddings").glob("matches-*")).name
    left = sorted(path.name for path in (out / "embeddings" / kind).iterdir())
    asides = [name for name in left if name.startswith(".")]
    assert len(asides) == 1, "what was half written has no name of a piece"
    whole_pieces = [out / "embeddings" / kind / name for name in left if name not in asides]
    assert 0 < len(whole_pieces) < CHUNKS
    before = {path: path.stat().st_mtime_ns for path in whole_pieces}
    evaluate(config(run_folder, clips, out))
    assert {path: path.stat().st_mtime_ns for path in whole_pieces} == before
    assert contents(out) == contents(whole), "and nothing half written is left"


def test_parts_of_another_evaluation_are_refused(
    whole: Path, run_folder: Path, clips: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Each thing that changes a vector: the checkpoint, frames, words, the data, the numbers' width, the chunks."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    other = make_checkpoint(tmp_path / "other", seed=9)
    more = tmp_path / "more"
    shutil.copytree(clips, more)
    for shard in sorted(more.glob("*-000002*")):
        shard.unlink()
    (more / "dataset.json").unlink(missing_ok=True)
    changed = {
        "checkpoint": config(other, clips, out),
        "corpus": config(run_folder, more, out),
        "precision": config(run_folder, clips, out, precision="bf16"),
        "seed": config(run_folder, clips, out, seed=3),
        "chunk": config(run_folder, clips, out, chunk=4),
    }
    for name, asked in changed.items():
        for stage in ("embed", "rerank", None):
            with pytest.raises(UserError, match=rf"holds embeddings made otherwise \(.*{name} is"):
                run_stages(asked, only=stage, crew=Crew(Part(1, 2) if stage else Part()))


def test_another_top_scores_its_own_pairs_and_keeps_the_embeddings(
    whole: Path, run_folder: Path, clips: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    before = set((tmp_path / "out/embeddings").glob("clips/*"))
    found = evaluate(config(run_folder, clips, tmp_path / "out", rerank={"top": 5}))
    alone = evaluate(config(run_folder, clips, tmp_path / "alone", rerank={"top": 5}))
    assert found["results"] == alone["results"]
    assert set((tmp_path / "out/embeddings").glob("clips/*")) == before
    assert len(list((tmp_path / "out/embeddings").glob("matches-*"))) == 2


def test_the_command_line_of_parts(run_folder: Path, clips: Path, tmp_path: Path, videomamba: Command) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree(run_folder, clips, tmp_path / "out") | {"controls": []}))
    done = videomamba("eval", str(tmp_path / "r.yaml"), "--only", "embed", "--part", "2/3")
    assert done.returncode == 0, done.stderr
    assert "embed of part 2/3 is done" in done.stdout


@pytest.mark.parametrize(
    "asked,cause",
    [
        (("1/2", None, False), "--part is a share of one stage"),
        (("3/2", "embed", False), "'3/2' is no part"),
        (("1/2", "embed", True), "--fresh would remove what the other parts made"),
    ],
)
def test_a_part_that_makes_no_sense_is_refused(asked: tuple[Any, ...], cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        cli_eval._share(*asked)


def test_a_rank_whose_fellow_dies_says_so_and_leaves(run_folder: Path, clips: Path, tmp_path: Path) -> None:
    """Two ranks, of which the second is started with another config and refused: the first must not wait for ever."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree(run_folder, clips, tmp_path / "out")))
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2",
              "PYTHONPATH": str(Path(__file__).parents[2])}  # fmt: skip
    command = [sys.executable, "-P", "-m", "videomamba", "eval", str(tmp_path / "r.yaml")]
    first, second = (
        subprocess.Popen([*command, *more], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for rank, more in enumerate(([], [f"checkpoint={tmp_path}"]))
    )  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert "holds no checkpoint" in said[1]
    assert first.returncode == 1
    assert "Another rank of this evaluation ended early." in " ".join(said[0].split())
