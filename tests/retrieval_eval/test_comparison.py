"""Two results side by side: the paired bootstrap against loops, and what may not be compared."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from configs.errors import UserError
from configs.loader import validate
from retrieval_eval.comparison import RANKS, RESULT, compare, write_ranks
from retrieval_eval.config import RetrievalConfig
from retrieval_eval.evaluate import evaluate


def result(folder: Path, ranks: dict[str, list[float]], queries: str = "same", **protocol: object) -> Path:
    folder.mkdir()
    said = {"queries_digest": queries, "captions": 4, "clips": 4} | protocol
    (folder / RESULT).write_text(json.dumps({"protocol": said}))
    write_ranks(folder, {name: np.array(values) for name, values in ranks.items()})
    return folder


def test_differences_are_measured_on_the_same_drawn_queries(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    a_Q = generator.integers(1, 30, 200).astype(float)
    b_Q = np.maximum(1.0, a_Q - 4)  # every query four places better
    a = result(tmp_path / "a", {"dual.t2v": a_Q.tolist(), "dual.v2t": a_Q.tolist()}, frames=8)
    b = result(tmp_path / "b", {"dual.t2v": b_Q.tolist(), "reranked.t2v": b_Q.tolist()}, frames=16)
    found = compare(a, b, samples=400, seed=3)
    assert {(one.scoring, one.direction) for one in found.differences} == {("dual", "t2v")}
    assert found.protocol == {"frames": (8, 16)}

    drawn = np.random.default_rng(3).integers(0, 200, (400, 200))
    gaps = [100 * np.mean([b_Q[q] <= 5 for q in row]) - 100 * np.mean([a_Q[q] <= 5 for q in row]) for row in drawn]
    recall = next(one for one in found.differences if one.measure == "R@5")
    assert (recall.a, recall.b) == (100 * np.mean(a_Q <= 5), 100 * np.mean(b_Q <= 5))
    assert (recall.low, recall.high) == pytest.approx(tuple(np.percentile(gaps, [2.5, 97.5])))
    assert recall.low > 0
    assert recall.p == 0


def test_a_result_does_not_differ_from_itself(tmp_path: Path) -> None:
    a = result(tmp_path / "a", {"dual.t2v": [1.0, 2.0, 7.0, 30.0]})
    found = compare(a, a / RESULT, samples=200)
    assert found.protocol == {}
    assert all((one.b - one.a, one.low, one.high, one.p) == (0, 0, 0, 1) for one in found.differences)


def test_other_queries_and_other_folders_are_refused(tmp_path: Path) -> None:
    a = result(tmp_path / "a", {"dual.t2v": [1.0]})
    with pytest.raises(UserError, match="did not ask the same queries"):
        compare(a, result(tmp_path / "b", {"dual.t2v": [1.0]}, queries="other"))
    with pytest.raises(UserError, match="share no scoring"):
        compare(a, result(tmp_path / "c", {"reranked.t2v": [1.0]}))
    with pytest.raises(UserError, match="holds no result of an evaluation"):
        compare(a, tmp_path)
    (tmp_path / "a" / RANKS).write_bytes(b"cut")
    with pytest.raises(UserError, match="holds no result of an evaluation"):
        compare(a, a)


def test_two_checkpoints_by_the_command(
    make_checkpoint: Callable[..., Path],
    run_folder: Path,
    clips: Path,
    tmp_path: Path,
    videomamba: Callable[..., CompletedProcess[str]],
) -> None:
    runs = {"a": run_folder, "b": make_checkpoint(tmp_path / "other", seed=7)}
    for name, run in runs.items():
        tree = {"checkpoint": str(run), "data": {"path": str(clips), "workers": 0}, "out": str(tmp_path / name)}
        more = {"batch": 4, "device": "cpu", "bootstrap": 0, "controls": [], "dual_softmax": True}
        evaluate(validate(tree | more, RetrievalConfig, "test"))
    done = videomamba("eval", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--samples", "200",
                      "--json", str(tmp_path / "c.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "differs: checkpoint_digest:" in done.stdout
    rows = json.loads((tmp_path / "c.json").read_text())["differences"]
    assert {row["scoring"] for row in rows} == {"dual", "dual_softmax", "reranked"}
    results = [json.loads((tmp_path / name / RESULT).read_text())["results"] for name in runs]
    first = rows[0]
    assert (first["a"], first["b"]) == tuple(found["dual"]["t2v"]["R@1"] for found in results)
    row = (tmp_path / "a/row.md").read_text()
    assert "| dual encoder, dual softmax over all queries |" in row
    assert f"| {results[0]['reranked']['t2v']['R@1']:.1f} / " in row
