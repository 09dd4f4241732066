"""`videomamba bench retrieval` at its small sizes: every row, after ours and the baseline gave the same answers."""

import json
from pathlib import Path

import pytest

from videomamba.bench_rerank import rerank_rows
from videomamba.bench_retrieval import QUICK


@pytest.mark.slow
def test_the_quick_bench_has_its_rows(videomamba, tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    done = videomamba("bench", "retrieval", "--quick", "--json", str(result))
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(result.read_text())["rows"]}
    assert {name: row["baseline_name"] for name, row in rows.items()} == {
        "flat-20kx64": "faiss", "dual-60": "numpy argsort", "rerank": "decoder", "rerank-keys": "decoder, keys once",
        "memory-70": "limit",
    }  # fmt: skip
    assert rows["rerank"]["ratio"] == pytest.approx(rows["rerank"]["ours"] / rows["rerank"]["baseline"], abs=0.01)


def test_a_decoder_that_scores_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from retrieval_eval.decoder import PairScorer

    right = PairScorer.score
    monkeypatch.setattr(PairScorer, "score", lambda *arguments: right(*arguments) + 0.01)
    with pytest.raises(AssertionError):
        list(rerank_rows(QUICK.rerank))
